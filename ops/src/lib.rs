//! What every process needs around its work: signals, drain, readiness, telemetry, admin endpoint.
//!
//! **Invariant:** nothing here knows what the work is; no product crate is named.

pub mod admin;
pub mod drain;
pub mod limits;
pub mod memory;
pub mod network;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;

pub use drain::{Drain, DrainGuard};
pub use readiness::{Readiness, ReadinessGuard};
pub use shutdown::{Shutdown, ShutdownTrigger};
