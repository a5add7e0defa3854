//! The part in the cluster. It throws a carrier out to the relay, ends the sealed sessions of users,
//! and speaks for each of them to the API server.
//!
//! ```text
//! carriers ── to the relays, kept for ever; the agent's certificate renewed over them
//!   lines ── a relay's stream → line → sealed session → the user of a verified certificate
//!     session ── HTTP/2 for requests, HTTP/1.1 for one upgrade
//!       gateway ── rules (pure) → audit → upstream (pool) or upgrade (fresh connection)
//! ```
//!
//! **Invariant:** the API server sees the identity of the verified certificate, set by [`rules`], and
//! nothing else of who a request says it is from. A request without one is refused.
//!
//! **Invariant:** an answer that was cut is passed on as cut, never as a short one.

mod agent;
mod attributes;
pub mod audit;
mod body;
pub mod carriers;
mod catch_up;
mod config;
mod error;
mod gateway;
pub mod kept;
mod lines;
mod metrics;
mod owner;
mod renewal;
pub mod rules;
mod said;
pub mod session;
mod state;
mod status;
mod status_report;
mod upgrade;
pub mod upstream;

pub use agent::run;
pub use audit::Audit;
pub use config::{Config, Limits, Lines, Timing};
pub use error::Error;
pub use gateway::Gateway;
pub use metrics::Metrics;
pub use state::{enrol, is_enrolled};
pub use upstream::ClusterAccess;
