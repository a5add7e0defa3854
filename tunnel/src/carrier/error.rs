//! What can go wrong with a carrier. Each text names the component at fault and the remedy.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::proto::close::CloseReason;
use crate::proto::messages::Refusal;
use crate::proto::wire::WireError;

use super::ProxyFault;

/// Any error, for callers' callbacks.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why a relay could not be reached, or rejected the carrier.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The configuration's fault.
    #[error("the relay URL {url} cannot be used: {why}")]
    BadUrl {
        /// The URL.
        url: String,
        /// The reason, as text.
        why: &'static str,
    },
    /// The relay's name does not resolve.
    #[error(
        "cannot find the address of {host}: {source}; check the relay's name and this machine's DNS"
    )]
    Resolve {
        /// The host that was dialled.
        host: String,
        /// The cause.
        source: io::Error,
    },
    /// Of all addresses tried, the last one's error.
    #[error(
        "cannot connect to {host}: {source}; check that the relay runs and that outbound connections to it are allowed"
    )]
    Connect {
        /// The host that was dialled.
        host: String,
        /// The cause.
        source: io::Error,
    },
    /// The TLS handshake failed for another reason.
    #[error(
        "the TLS handshake with {host} failed: {source}; check that this is a relay and that nothing in between ends TLS"
    )]
    Tls {
        /// The host that was dialled.
        host: String,
        /// The cause.
        source: io::Error,
    },
    /// Before TLS: too many connect at once.
    #[error(
        "the relay at {host} is busy with other connections; it asks to come back in {} s",
        .retry_after.as_secs()
    )]
    Busy {
        /// The host that was dialled.
        host: String,
        /// How long to wait before the next attempt.
        retry_after: Duration,
    },
    /// As a rule an unknown intermediary terminates TLS; also a relay that was set up again.
    #[error(
        "the certificate shown for {host} is not of the authority that this side is enrolled with: something in between may end TLS (a proxy that inspects it? a load balancer?); if it is one of yours, give its CA with --ca-file, or --system-ca if its certificate is a public one"
    )]
    UnknownIssuer {
        /// The host that was dialled.
        host: String,
    },
    /// The relay's certificate has expired, or a clock is wrong.
    #[error(
        "the certificate of {host} has expired or is not valid yet; renew it, or check this machine's clock"
    )]
    ServerCertificateExpired {
        /// The host that was dialled.
        host: String,
    },
    /// The way out, before any relay.
    #[error("the proxy {proxy} {fault}")]
    Proxy {
        /// HOST:PORT, without user and password.
        proxy: String,
        /// What is wrong.
        #[source]
        fault: ProxyFault,
    },
    /// The certificate is for another name.
    #[error("the certificate presented is not for {host}; check the relay URL")]
    WrongHost {
        /// The host that was dialled.
        host: String,
    },
    /// An answer that is not a relay's, or a relay's without a variant here.
    #[error("the relay answered {status}{}{}", Detail(.message), RetryIn(.retry_after))]
    Http {
        /// The HTTP status.
        status: u16,
        /// The code.
        code: String,
        /// The text of the answer.
        message: String,
        /// How long to wait before the next attempt.
        retry_after: Option<Duration>,
    },
    /// The answer is not a relay's.
    #[error(
        "{host} answered, but not as a Throwline relay ({why}); check the relay URL, and that what stands in front of it passes WebSocket upgrades"
    )]
    NotARelay {
        /// The host that was dialled.
        host: String,
        /// The reason.
        #[source]
        why: BoxError,
    },
    /// The relay does not accept the identity.
    #[error("the relay did not accept this identity; enrol again with a new token")]
    Unauthenticated,
    /// The identity was revoked.
    #[error("this identity was revoked; enrol again with a new token")]
    Revoked,
    /// The clocks differ too much; the relay's text contains its time.
    #[error("this machine's clock and the relay's differ: {message}; set the clock")]
    ClockSkew {
        /// The text of the answer.
        message: String,
    },
    /// The identity's certificate has expired.
    #[error("this identity's certificate has expired: {message}; enrol again")]
    CertificateExpired {
        /// The text of the answer.
        message: String,
    },
    /// No common protocol version.
    #[error(
        "this build speaks protocol version {ours}, the relay {theirs}; update the older of the two"
    )]
    Version {
        /// The versions of this end.
        ours: String,
        /// The peer's version.
        theirs: String,
    },
    /// The relay refused the carrier.
    #[error("the relay refused the connection: {0}")]
    Refused(Refusal),
    /// A step did not end within its limit.
    #[error("no answer within {after:?} while {phase}; check the network and the relay")]
    Timeout {
        /// The step that was not finished.
        phase: &'static str,
        /// The time limit.
        after: Duration,
    },
    /// Our own fault: keys or files.
    #[error("cannot prove this identity: {0}")]
    Prover(#[source] BoxError),
    /// The relay broke the protocol.
    #[error("the relay broke the protocol during the handshake: {0}")]
    Protocol(String),
    /// A message of the relay cannot be decoded.
    #[error("the relay broke the protocol during the handshake: {0}")]
    Malformed(#[source] io::Error),
    /// The connection failed during the handshake.
    #[error("the connection was lost during the handshake: {0}")]
    Lost(#[source] io::Error),
    /// By [`super::DialConfig::avoid`].
    #[error("the relay that answered, {0}, is one that we are connected to already")]
    Unwanted(String),
}

impl DialError {
    /// The wait that the relay requested.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Http { retry_after, .. } => *retry_after,
            Self::Busy { retry_after, .. } => Some(*retry_after),
            Self::Refused(refusal) if refusal.retry_after_ms > 0 => {
                Some(Duration::from_millis(refusal.retry_after_ms))
            }
            _ => None,
        }
    }

    /// Whether dialling again, with nothing changed, may help.
    pub fn is_transient(&self) -> bool {
        use crate::proto::messages::RefusalCode;
        match self {
            Self::BadUrl { .. }
            | Self::Unauthenticated
            | Self::Revoked
            | Self::CertificateExpired { .. }
            | Self::Version { .. } => false,
            Self::Proxy { fault, .. } => fault.is_transient(),
            Self::Refused(refusal) => !matches!(
                refusal.code(),
                RefusalCode::Version
                    | RefusalCode::Unauthenticated
                    | RefusalCode::NotAllowed
                    | RefusalCode::Revoked
            ),
            _ => true,
        }
    }
}

struct Detail<'a>(&'a str);

impl std::fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(f, ": {}", self.0)
    }
}

struct RetryIn<'a>(&'a Option<Duration>);

impl std::fmt::Display for RetryIn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(after) => write!(f, "; it asks to come back in {} s", after.as_secs()),
            None => Ok(()),
        }
    }
}

/// Why a dialer was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AcceptError {
    /// The handshake did not end within this time.
    #[error("the dialer did not prove itself within {0:?}")]
    Timeout(Duration),
    /// By the verifier, or for the version.
    #[error("the dialer was refused: {0}")]
    Refused(Refusal),
    /// A message that cannot be decoded.
    #[error("the dialer broke the protocol during the handshake: {0}")]
    Protocol(#[from] WireError),
    /// The connection failed.
    #[error("the connection was lost during the handshake: {0}")]
    Lost(#[source] io::Error),
    /// The dialer avoids this relay; see [`super::DialConfig::avoid`].
    #[error("the dialer declined this relay")]
    Declined,
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The peer refused the stream.
    #[error("{0}")]
    Refused(Refusal),
    /// The carrier has ended.
    #[error("{0}")]
    CarrierLost(CloseReason),
    /// Ours: nothing was sent.
    #[error("too many streams are open on this carrier")]
    Limit,
    /// The peer did not answer within this time.
    #[error("no answer to the opened stream within {0:?}")]
    Timeout(Duration),
    /// The peer ended the stream, or sent an invalid reply.
    #[error("the stream was not answered: {0}")]
    Unanswered(#[source] Arc<io::Error>),
}
