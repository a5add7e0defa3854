//! Why a line ended before its end, or did not begin.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::proto::line::machine::Ended;
use crate::proto::line::{ResetCode, VERSION, Violation};

use super::HANDSHAKE;

#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The peer's fault.
    #[error("the other end of the line broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer's decision.
    #[error("the other end reset the line: {code:?}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    Reset { code: ResetCode, reason: String },
    #[error(
        "the other end speaks line version {theirs}, this end {VERSION}; update the older of the two"
    )]
    Version { theirs: u32 },
    /// Somebody's in between: the stream ended without an end of the line.
    #[error("the line was cut")]
    Cut,
    #[error("the line did not come up within {HANDSHAKE:?}")]
    Timeout,
    /// Resumption was tried for as long as the line may be without a stream.
    #[error("the line was cut and could not be resumed within {} s: {why}", after.as_secs())]
    Expired { after: Duration, why: String },
    /// The other end has no such line any more, or the user may not have it.
    #[error("the line was cut and cannot be resumed: {0}")]
    Gone(String),
    #[error("the line failed: {0}")]
    Io(Arc<io::Error>),
}

impl From<LineError> for io::Error {
    fn from(error: LineError) -> Self {
        io::Error::new(io::ErrorKind::ConnectionReset, error)
    }
}

impl From<Ended> for LineError {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Violation(violation) => Self::Violation(violation),
            Ended::Reset { code, reason } => Self::Reset { code, reason },
        }
    }
}

/// What a failure of the stream below means.
pub(super) fn lost(error: io::Error) -> LineError {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => LineError::Cut,
        _ => LineError::Io(Arc::new(error)),
    }
}
