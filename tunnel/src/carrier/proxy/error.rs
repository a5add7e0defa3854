//! What can go wrong with a proxy, and what to do. No text here holds a proxy's whole URL.

use std::io;
use std::time::Duration;

/// A proxy's URL, or the variable that holds it, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the proxy in {origin} cannot be used: {why}")]
pub struct BadProxy {
    /// The flag or the variable.
    pub origin: &'static str,
    /// What is wrong with the URL.
    pub why: &'static str,
}

impl BadProxy {
    pub(super) fn new(origin: &'static str, why: &'static str) -> Self {
        Self { origin, why }
    }
}

/// Why a proxy does not lead to the relay. Each is the end of a sentence that began with "the
/// proxy HOST:PORT".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyFault {
    /// The proxy's name does not resolve.
    #[error(
        "cannot be found: {0}; check its name in --proxy or HTTPS_PROXY, and this machine's DNS"
    )]
    Resolve(#[source] io::Error),
    /// No TCP connection to the proxy.
    #[error(
        "cannot be connected to: {0}; check that it runs, and its address in --proxy or HTTPS_PROXY"
    )]
    Connect(#[source] io::Error),
    /// Our own fault: no trusted CA is configured.
    #[error("speaks TLS, and there is nothing to check its certificate against")]
    NoTrust,
    /// The proxy's certificate is of no trusted CA.
    #[error("shows a certificate of an issuer that is unknown here; give its CA with --ca-file")]
    UnknownIssuer,
    /// The proxy's certificate is for another name.
    #[error("shows a certificate for another name; write the name that its certificate has")]
    WrongHost,
    /// Expired, for example.
    #[error(
        "shows a certificate that cannot be accepted: {0}; tell its administrator, or set this machine's clock"
    )]
    BadCertificate(#[source] io::Error),
    /// The TLS handshake failed for another reason.
    #[error(
        "did not complete the TLS handshake: {0}; if it does not speak TLS, its URL begins with http://"
    )]
    Tls(#[source] io::Error),
    /// The proxy requires credentials.
    #[error(
        "requires a user and a password (407); give them in its URL, http://USER:PASSWORD@HOST:PORT, \
         special characters percent-encoded"
    )]
    CredentialsMissing,
    /// The proxy rejects the credentials.
    #[error(
        "does not accept the user and password in its URL (407); check them, and that special \
         characters in them are percent-encoded"
    )]
    CredentialsRefused,
    /// NTLM, Negotiate and the like.
    #[error(
        "requires an authentication that is not supported ({offered}, 407); ask its administrator to \
         offer Basic, or to let this machine through to {to} without"
    )]
    UnknownAuthentication {
        /// What the proxy offers.
        offered: String,
        /// The destination of the tunnel.
        to: String,
    },
    /// The proxy forbids this destination.
    #[error(
        "does not allow CONNECT to {to} (status {status}); ask its administrator to allow it, the port included"
    )]
    Denied {
        /// The destination of the tunnel.
        to: String,
        /// The HTTP status.
        status: u16,
    },
    /// The proxy cannot reach the destination.
    #[error(
        "has no connection to {to} (status {status}); check the relay's URL, and that the proxy can resolve and reach it"
    )]
    NoWay {
        /// The destination of the tunnel.
        to: String,
        /// The HTTP status.
        status: u16,
    },
    /// The answer is not a proxy's.
    #[error(
        "answered, but not as an HTTP proxy ({0}); check its address, and whether it begins with https://"
    )]
    NotAProxy(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The proxy closed the connection.
    #[error(
        "ended the connection without an answer: {0}; check that it is an HTTP proxy, and whether its URL begins with https://"
    )]
    Lost(#[source] hyper::Error),
    /// A step did not end within its limit.
    #[error("did not answer within {after:?} while {phase}; check that it runs")]
    Timeout {
        /// The step that was not finished.
        phase: &'static str,
        /// The time limit.
        after: Duration,
    },
}

impl ProxyFault {
    /// Whether dialling again, with nothing changed, may help.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Resolve(_)
                | Self::Connect(_)
                | Self::Tls(_)
                | Self::NoWay { .. }
                | Self::Lost(_)
                | Self::Timeout { .. }
        )
    }

    /// One word, for a metric's label.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "proxy-resolve",
            Self::Connect(_) => "proxy-connect",
            Self::NoTrust
            | Self::UnknownIssuer
            | Self::WrongHost
            | Self::BadCertificate(_)
            | Self::Tls(_) => "proxy-tls",
            Self::CredentialsMissing
            | Self::CredentialsRefused
            | Self::UnknownAuthentication { .. } => "proxy-authentication",
            Self::Denied { .. } => "proxy-denied",
            Self::NoWay { .. } => "proxy-no-way",
            Self::NotAProxy(_) | Self::Lost(_) => "not-a-proxy",
            Self::Timeout { .. } => "proxy-timeout",
        }
    }

    pub(super) fn from_tls(error: io::Error) -> Self {
        use rustls::CertificateError as Bad;
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        match inner {
            Some(rustls::Error::InvalidCertificate(Bad::UnknownIssuer | Bad::BadSignature)) => {
                Self::UnknownIssuer
            }
            Some(rustls::Error::InvalidCertificate(
                Bad::NotValidForName | Bad::NotValidForNameContext { .. },
            )) => Self::WrongHost,
            Some(rustls::Error::InvalidCertificate(_)) => Self::BadCertificate(error),
            _ => Self::Tls(error),
        }
    }
}
