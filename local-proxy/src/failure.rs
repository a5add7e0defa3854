//! Why one request, line or call to the relay failed.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_ops::time::rfc3339;
use throwline_tunnel::carrier::{DialError, OpenError};
use throwline_tunnel::http2_error;
use throwline_tunnel::line::LineError;
use throwline_tunnel::proto::messages::Refusal;
use throwline_tunnel::proto::wire::WireError;

use crate::refusal_text::{line_end_message, refusal_message};

/// Why one request, line or relay call failed. Clonable, because requests that wait for the same
/// session share its outcome.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The relay or the agent refused the request, with a code.
    #[error("{}", refusal_text(cluster, refusal))]
    Refused { cluster: String, refusal: Refusal },
    /// Nothing answers at the relay's address, or the answer is not a relay's.
    #[error("the relay {relay} cannot be reached: {source}")]
    RelayUnreachable { relay: String, source: Unreachable },
    /// The relay's TLS certificate is not one we trust.
    #[error("the relay {relay} cannot be trusted: {source}")]
    RelayNotTrusted {
        relay: String,
        source: Arc<DialError>,
    },
    /// The relay did not accept our identity.
    #[error(
        "the relay {relay} did not accept this machine's identity: {source}; if it was revoked, run 'throwline login' with a new token"
    )]
    RelayRefusesUs {
        relay: String,
        source: Arc<DialError>,
    },
    #[error("your identity was revoked; run 'throwline login' with a new token")]
    Revoked,
    #[error("your certificate expired on {}: run 'throwline login' with a new token", rfc3339(*not_after))]
    CertificateExpired { not_after: SystemTime },
    /// The far end of the line is not the agent of that cluster, or its certificate is not from
    /// our authority. A third party between may be tampering.
    #[error("the sealed session to cluster {cluster} failed: {source}")]
    SessionNotTrusted {
        cluster: String,
        source: Arc<io::Error>,
    },
    /// The far end proved to be that agent, by a certificate that does not count any more.
    #[error(
        "the certificate of the agent of cluster {cluster} was revoked; the agent must be enrolled again with a new token"
    )]
    ClusterRevoked { cluster: String },
    /// The agent did not take our certificate.
    #[error("the agent of cluster {cluster} did not accept your certificate: {source}")]
    AgentRefusesUs {
        cluster: String,
        source: CertificateRejection,
    },
    /// The line or its session ended before the answer began.
    #[error("the connection to cluster {cluster} was lost before it answered: {source}")]
    Lost { cluster: String, source: Cause },
    /// The line was not established, and another attempt would not be either.
    #[error("the connection to cluster {cluster} has ended: {source}")]
    Ended { cluster: String, source: Cause },
    /// What had begun over a line ended with it.
    #[error("{}", line_end_message(cluster, source))]
    LineEnded { cluster: String, source: LineError },
    /// What had begun over a session ended with its byte stream.
    #[error("the connection to cluster {cluster} has ended: {source}; run the command again")]
    StreamEnded {
        cluster: String,
        source: Arc<io::Error>,
    },
    #[error("cluster {cluster} did not answer within {seconds} s")]
    Timeout { cluster: String, seconds: u64 },
    #[error("the local proxy is stopping")]
    Stopping,
    /// A fault of ours, or of the relay where it is not one of the above.
    #[error("{0}")]
    Internal(#[source] Arc<dyn Error + Send + Sync>),
}

/// Why there is no connection to the relay.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Unreachable {
    #[error(transparent)]
    Dial(Arc<DialError>),
    /// No dial has failed, nor come to an end.
    #[error("no connection within {} s", after.as_secs())]
    Timeout { after: Duration },
}

/// What an agent has against a user's certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateRejection {
    #[error("it has expired")]
    Expired,
    #[error("it was revoked")]
    Revoked,
    #[error("it is from an authority that the agent does not know")]
    UnknownAuthority,
    #[error("none was sent")]
    Missing,
    #[error("it is not a valid user certificate")]
    Invalid,
    #[error("access is denied")]
    Denied,
}

/// Why a line or a session to an agent was not established, or was lost before the answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Cause {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Line(#[from] LineError),
    /// Of the sealed session.
    #[error(transparent)]
    Io(Arc<io::Error>),
    /// The HTTP connection in the session was not set up.
    #[error(transparent)]
    Handshake(Arc<hyper::Error>),
    /// The HTTP connection in the session ended.
    #[error("{}", innermost(.0))]
    Http(Arc<hyper::Error>),
    #[error("{0}")]
    Body(#[source] Arc<dyn Error + Send + Sync>),
    #[error(transparent)]
    Message(Arc<WireError>),
    #[error("its line has no stream")]
    Detached,
    #[error("the answer switches to a protocol that was not asked for")]
    OtherProtocol,
    #[error("it sends interim answers (1xx) without end")]
    InterimAnswers,
}

/// The innermost cause is the most specific.
fn innermost(error: &hyper::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    match cause.downcast_ref::<h2::Error>() {
        Some(cause) => http2_error::describe(cause),
        None => cause.to_string(),
    }
}

impl Failure {
    /// A fault of ours.
    pub(crate) fn internal(error: impl Error + Send + Sync + 'static) -> Self {
        Self::Internal(Arc::new(error))
    }

    /// A constant word for what went wrong, the same for all failures of a kind.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Refused { .. } => "refused",
            Self::RelayUnreachable { .. } => "unreachable",
            Self::RelayNotTrusted { .. } => "not-trusted",
            Self::RelayRefusesUs { .. } => "identity",
            Self::Revoked => "revoked",
            Self::CertificateExpired { .. } => "expired",
            Self::SessionNotTrusted { .. } => "session-not-trusted",
            Self::ClusterRevoked { .. } => "cluster-revoked",
            Self::AgentRefusesUs { .. } => "agent-refuses",
            Self::Lost { .. } => "lost",
            Self::LineEnded {
                source: LineError::Expired { .. },
                ..
            } => "given-up",
            Self::LineEnded { .. } | Self::StreamEnded { .. } | Self::Ended { .. } => "ended",
            Self::Timeout { .. } => "timeout",
            Self::Stopping => "stopping",
            Self::Internal(_) => "internal",
        }
    }

    /// The wait that the relay asks for.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RelayUnreachable {
                source: Unreachable::Dial(error),
                ..
            } => error.retry_after(),
            _ => None,
        }
    }

    /// Whether trying again at once, with nothing changed, can help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::RelayUnreachable { source, .. } => match source {
                Unreachable::Dial(error) => error.is_transient(),
                Unreachable::Timeout { .. } => true,
            },
            Self::Lost { .. } | Self::Timeout { .. } => true,
            _ => false,
        }
    }
}

impl throwline_uplink::DialFailure for Failure {
    fn kind(&self) -> &'static str {
        Self::kind(self)
    }

    fn retry_after(&self) -> Option<Duration> {
        Self::retry_after(self)
    }

    /// One carrier alone has no relay to avoid.
    fn is_unwanted(&self) -> bool {
        false
    }
}

fn refusal_text(cluster: &str, refusal: &Refusal) -> String {
    refusal_message(cluster, refusal, SystemTime::now())
}
