//! Keeps carriers to relays up, for agents, local proxies and relays among each other.
//!
//! ```text
//! supervisor ─┐  each keeps one carrier: dials, serves, dials again when it is lost or due
//! supervisor ─┴─ carriers: which supervisor holds which relay, and how many relays there are
//! ```
//!
//! [`Successor`] renews an identity over such a carrier.
//!
//! What differs between components is behind [`UplinkHandler`] (how to dial, what to do with a
//! stream) and in [`Config`] (how many carriers, how long to wait). Waits, jitter and rate limits are
//! decided in `schedule`, which reads no clock and draws no randomness that was not passed in.
//!
//! **Invariant:** a carrier that still works has a successor, or a sibling at another relay, before it
//! is retired. Only then are the sessions on it asked to move.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

mod carriers;
mod config;
mod context;
mod control;
mod demand;
mod dial;
mod handler;
mod metrics;
mod pool;
mod renewal;
mod retire;
mod schedule;
mod supervisor;

pub use carriers::Carriers;
pub use config::{Config, FirstRetry};
pub use control::CONTROL_STREAMS;
pub use demand::{Demand, Waiting};
pub use dial::{RelayTarget, prover};
pub use handler::{DialFailure, ReplaceReason, UplinkHandler};
pub use metrics::Metrics;
pub use pool::{Environment, Pool, Remaining};
pub use renewal::{RenewalError, Successor};
