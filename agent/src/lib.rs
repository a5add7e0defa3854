//! The component in the cluster: holds carriers to the relays, terminates the sealed sessions of users,
//! and forwards their requests to the API server.
//!
//! ```text
//! agent ─ uplink_handler ── carriers to the relays, by `throwline-uplink`; renewal of the certificate
//!         lines ─────────── a relay's stream → line → sealed session → the user of a certificate
//!         session ───────── HTTP/2 for requests, HTTP/1.1 for one upgrade
//!         request ───────── policy (pure) → audit → plain (pool) or upgrade (fresh connection)
//!         live ──────────── every live session, and why it is ended early
//!         quotas ────────── shares of users
//!         upstream ──────── the API server
//!         audit
//! ```
//!
//! Files import in this order only. Each folder has a struct that owns its dependencies: `LineAcceptor`,
//! `SessionServer`, `Gateway`, `Upstream`, `Sink`. `agent` builds them.
//!
//! **Invariant:** the API server sees the identity of the verified certificate, set by
//! [`throwline_policy::rules`], and no other identity that a request claims. A request without one is
//! refused.
//!
//! **Invariant:** an answer that was cut is passed on as cut, never as a short one.

#![warn(clippy::mod_module_files)]

mod agent;
pub mod audit;
mod config;
mod connect_error;
mod error;
mod identity;
pub mod lines;
pub mod live;
mod message;
mod metrics;
pub mod quotas;
mod renewal;
pub mod request;
pub mod session;
pub mod state;
mod status_report;
mod uplink_handler;
pub mod upstream;

pub use agent::run;
pub use audit::Audit;
pub use config::{Config, Limits, Timing};
pub use error::Error;
pub use metrics::Metrics;
pub use request::Gateway;
pub use state::secret::StateSecret;
pub use state::{enrol, is_enrolled, is_new_token};
pub use upstream::ClusterAccess;
pub use upstream::uid::cluster_uid;
