//! What every process needs around its work: signals, drain, readiness, telemetry, admin endpoint.
//!
//! **Invariant:** nothing here depends on what the work is; no product crate is imported.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

pub mod admin;
pub mod core_dumps;
pub mod drain;
pub mod gauge_guard;
pub mod limits;
pub mod live;
pub mod log_throttle;
pub mod network;
pub mod readiness;
pub mod shares;
pub mod shed_oldest;
pub mod shutdown;
pub mod telemetry;
pub mod text;
pub mod time;

pub use drain::{Drain, DrainGuard};
pub use gauge_guard::GaugeGuard;
pub use live::{Ending, Live, LiveGuard};
pub use log_throttle::LogThrottle;
pub use readiness::{Readiness, ReadinessGuard};
pub use shares::{Denied, Share, Shares};
pub use shed_oldest::ShedOldest;
pub use shutdown::{Shutdown, ShutdownTrigger};
