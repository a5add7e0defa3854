//! One request of a user to the API server and back, plain or upgraded.
//!
//! ```text
//! gateway ── audit, rules, policy ─┬─ plain ──── pooled connections, downloads
//!                                  └─ upgrade ── a fresh connection, output_first, read_ahead
//! ```

use std::time::Duration;

mod answer;
mod api_server;
mod download;
mod explanation;
mod gateway;
mod lifetime;
mod output_first;
mod plain;
mod probe_trigger;
pub mod read_ahead;
mod upgrade;

pub(crate) use answer::AnswerBody;
pub(crate) use api_server::ApiServer;
pub use gateway::Gateway;
pub use lifetime::Lifetime;
pub(crate) use probe_trigger::ProbeReason;

/// Knobs of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A request's body of which nothing arrives for this long is broken off. Default 180 s: longer
    /// than its line may be without a stream.
    pub upload_idle: Duration,
    /// For reading the refusal of a request from the API server, as a whole. Default 10 s.
    pub refusal: Duration,
    /// Output of the API server that is read while a user reads nothing.
    pub read_ahead: read_ahead::Limits,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            upload_idle: Duration::from_secs(180),
            refusal: Duration::from_secs(10),
            read_ahead: read_ahead::Limits::default(),
        }
    }
}
