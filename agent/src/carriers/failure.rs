//! Why there is no connection.

use throwline_tunnel::carrier::DialError;

use crate::error::Error;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    /// A CA file that cannot be read, and the like.
    #[error(transparent)]
    Own(#[from] throwline_certs::Error),
    #[error(transparent)]
    State(#[from] Error),
}

impl Failure {
    /// For the log's memory and the metric's label.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Own(_) | Self::State(_) => "own-files",
            Self::Dial(error) => match error {
                DialError::BadUrl { .. } => "bad-url",
                DialError::Resolve { .. } => "resolve",
                DialError::Connect { .. } => "connect",
                DialError::Tls { .. } => "tls",
                DialError::Proxy { fault, .. } => fault.kind(),
                DialError::UnknownIssuer { .. } => "unknown-issuer",
                DialError::ServerCertificateExpired { .. } => "server-certificate-expired",
                DialError::WrongHost { .. } => "wrong-host",
                DialError::Http { .. } => "http",
                DialError::NotARelay { .. } => "not-a-relay",
                DialError::Unauthenticated => "unauthenticated",
                DialError::ClockSkew { .. } => "clock-skew",
                DialError::CertificateExpired { .. } => "certificate-expired",
                DialError::Version { .. } => "version",
                DialError::Refused(_) => "refused",
                DialError::Timeout { .. } => "timeout",
                DialError::Unwanted(_) => "same-relay",
                _ => "other",
            },
        }
    }

    pub(super) fn is_unwanted(&self) -> bool {
        matches!(self, Self::Dial(DialError::Unwanted(_)))
    }

    /// How long the relay asked to be left alone.
    pub(super) fn retry_after(&self) -> Option<std::time::Duration> {
        match self {
            Self::Dial(error) => error.retry_after(),
            Self::Own(_) | Self::State(_) => None,
        }
    }
}
