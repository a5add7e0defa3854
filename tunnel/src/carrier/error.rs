//! What can go wrong with a carrier. Each sentence says whose fault it is and what to do.

use std::io;
use std::time::Duration;

use crate::proto::close::CloseReason;
use crate::proto::messages::Refusal;
use crate::proto::wire::WireError;

use super::{BoxError, ProxyFault};

/// Why a relay could not be reached, or would not have us.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The configuration's fault.
    #[error("the relay URL {url} cannot be used: {why}")]
    BadUrl { url: String, why: &'static str },
    #[error(
        "cannot find the address of {host}: {source}; check the relay's name and this machine's DNS"
    )]
    Resolve { host: String, source: io::Error },
    /// Of all addresses tried, the last one's error.
    #[error(
        "cannot connect to {host}: {source}; check that the relay runs and that outbound connections to it are allowed"
    )]
    Connect { host: String, source: io::Error },
    #[error(
        "the TLS handshake with {host} failed: {source}; check that this is a relay and that nothing in between ends TLS"
    )]
    Tls { host: String, source: io::Error },
    /// What is on the way ends TLS and is not known, as a rule; also a relay set up anew.
    #[error(
        "the certificate shown for {host} is of an issuer that is unknown here: something in between may end TLS (a proxy that inspects it? a load balancer?); give the CA of that with --ca-file, if it is one of yours"
    )]
    UnknownIssuer { host: String },
    #[error(
        "the certificate of {host} has expired or is not valid yet; renew it, or check this machine's clock"
    )]
    ServerCertificateExpired { host: String },
    /// The way out, before any relay.
    #[error("the proxy {proxy} {fault}")]
    Proxy {
        /// HOST:PORT, without user and password.
        proxy: String,
        #[source]
        fault: ProxyFault,
    },
    #[error("the certificate presented is not for {host}; check the relay URL")]
    WrongHost { host: String },
    /// An answer that is not a relay's, or a relay's that has no variant of its own.
    #[error("the relay answered {status}{}{}", Detail(.message), RetryIn(.retry_after))]
    Http {
        status: u16,
        code: String,
        message: String,
        retry_after: Option<Duration>,
    },
    #[error(
        "{host} answered, but not as a Throwline relay ({why}); check the relay URL, and that what stands in front of it passes WebSocket upgrades"
    )]
    NotARelay { host: String, why: String },
    #[error("the relay did not accept this identity; enrol again, or ask whether it was revoked")]
    Unauthenticated,
    /// The relay's words, which name its time.
    #[error("this machine's clock and the relay's differ: {message}; set the clock")]
    ClockSkew { message: String },
    #[error("this identity's certificate has expired: {message}; enrol again")]
    CertificateExpired { message: String },
    #[error(
        "this build speaks protocol version {ours}, the relay {theirs}; update the older of the two"
    )]
    Version { ours: String, theirs: String },
    #[error("the relay refused the connection: {0}")]
    Refused(Refusal),
    #[error("no answer within {after:?} while {phase}; check the network and the relay")]
    Timeout {
        phase: &'static str,
        after: Duration,
    },
    /// Our own fault: keys or files.
    #[error("cannot prove this identity: {0}")]
    Prover(#[source] BoxError),
    #[error("the relay broke the protocol during the handshake: {0}")]
    Protocol(String),
    #[error("the connection was lost during the handshake: {0}")]
    Lost(#[source] io::Error),
    /// By [`super::DialConfig::avoid`].
    #[error("the relay that answered, {0}, is one that we are connected to already")]
    Unwanted(String),
}

impl DialError {
    /// How long the relay asked to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Http { retry_after, .. } => *retry_after,
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
            | Self::CertificateExpired { .. }
            | Self::Version { .. } => false,
            Self::Proxy { fault, .. } => fault.is_transient(),
            Self::Refused(refusal) => !matches!(
                refusal.code(),
                RefusalCode::Version | RefusalCode::Unauthenticated | RefusalCode::NotAllowed
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
    #[error("the dialer did not prove itself within {0:?}")]
    Timeout(Duration),
    /// By the verifier, or for the version.
    #[error("the dialer was refused: {0}")]
    Refused(Refusal),
    #[error("the dialer broke the protocol during the handshake: {0}")]
    Protocol(#[from] WireError),
    #[error("the connection was lost during the handshake: {0}")]
    Lost(#[source] io::Error),
    /// It has seen which relay this is and wants another; see [`super::DialConfig::avoid`].
    #[error("the dialer wants another relay")]
    Declined,
}

/// Why a stream could not be opened.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    #[error("{0}")]
    Refused(Refusal),
    #[error("{0}")]
    CarrierLost(CloseReason),
    /// Ours: nothing was sent.
    #[error("too many streams are open on this carrier")]
    Limit,
    #[error("no answer to the opened stream within {0:?}")]
    Timeout(Duration),
    /// The peer ended the stream, or answered nonsense, instead of replying.
    #[error("the stream was not answered: {0}")]
    Unanswered(String),
}
