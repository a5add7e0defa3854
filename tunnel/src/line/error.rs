//! Why a line ended before its end, or did not begin.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::proto::line::machine::Ended;
use crate::proto::line::{ResetCode, VERSION, Violation};

/// Longest exchange of hellos.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a line ended before its end, or did not begin.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The peer broke the protocol.
    #[error("the other end of the line broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer reset the line.
    #[error("the other end reset the line: {code:?}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    Reset {
        /// The code.
        code: ResetCode,
        /// The reason, as text.
        reason: String,
    },
    /// The peer has another version of the protocol.
    #[error(
        "the other end speaks line version {theirs}, this end {VERSION}; update the older of the two"
    )]
    Version {
        /// The peer's version.
        theirs: u32,
    },
    /// The stream ended without an end of the line.
    #[error("the line was cut")]
    Cut,
    /// The hellos were not exchanged in time.
    #[error("the line did not come up within {HANDSHAKE:?}")]
    Timeout,
    /// Resumption was tried for as long as the line may be without a stream.
    #[error("the line was cut and could not be resumed within {} s: {why}", after.as_secs())]
    Expired {
        /// The time limit.
        after: Duration,
        /// The reason, as text.
        why: String,
    },
    /// The other end has no such line any more, or the user may not have it.
    #[error("the line was cut and cannot be resumed: {0}")]
    Gone(String),
    /// The stream failed for another reason.
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
