//! Why an enrolment fails: the component at fault and the remedy.

use crate::{BoxError, CheckError, Error, time_text};
use rustls::{CertificateError, pki_types::InvalidDnsNameError};
use std::{
    io,
    time::{Duration, SystemTime},
};
use url::Url;

/// From the first look-up of the relay's name to its whole answer. Default and only value: a
/// person waits for this, and a relay that is alive answers within a second.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// Why enrolment failed, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The token's URL is not `https://`.
    #[error(
        "the token's relay {relay} is not https://, and a secret is not sent unprotected over a network"
    )]
    Insecure {
        /// The URL of the relay.
        relay: Url,
    },
    /// The relay's name does not resolve.
    #[error("the relay's name {host:?} cannot be resolved: {source}; check the network and DNS")]
    Resolve {
        /// The host that was dialled.
        host: String,
        /// The cause.
        source: io::Error,
    },
    /// No TCP connection to the relay.
    #[error("the relay {relay} cannot be reached: {source}; check the network and its firewalls")]
    Unreachable {
        /// The URL of the relay.
        relay: Url,
        /// The cause.
        source: io::Error,
    },
    /// A connector's own words, which name what could not be reached.
    #[error(transparent)]
    Connect(BoxError),
    /// The relay did not answer within the deadline.
    #[error("the relay {relay} did not answer within {} s; try again", DEADLINE.as_secs())]
    Timeout {
        /// The URL of the relay.
        relay: Url,
    },
    /// The other end has another CA than the maker of the token.
    #[error(
        "{relay} belongs to another authority than this token: the relay was set up again (then \
         ask for a new token), or another server answers in its place"
    )]
    WrongPin {
        /// The URL of the relay.
        relay: Url,
    },
    /// The other end's certificate was issued by no trusted CA.
    #[error(
        "the certificate shown for {relay} is not of the token's authority, so something in between \
         may end TLS (a proxy that inspects it? a load balancer?): if it is one of yours, give its CA \
         with --ca-file, or --system-ca if its certificate is a public one; the token was not sent"
    )]
    UnknownIssuer {
        /// The URL of the relay.
        relay: Url,
    },
    /// The TLS handshake failed for another reason.
    #[error("the TLS connection to {relay} failed: {source}")]
    Tls {
        /// The URL of the relay.
        relay: Url,
        /// The cause.
        source: Box<TlsFailure>,
    },
    /// The other clock may be the wrong one, but this one is easier to look at.
    #[error("{source}; compare this machine's clock ({}) with the true time", time_text::show(*now))]
    Clock {
        /// The certificate that is not valid now.
        source: Box<InvalidNow>,
        /// The time by this machine's clock.
        now: SystemTime,
    },
    /// The answer is not a relay's.
    #[error(
        "{relay} answered, but is not a relay of Throwline (status {status}); check the address"
    )]
    NotARelay {
        /// The URL of the relay.
        relay: Url,
        /// The HTTP status.
        status: u16,
    },
    /// The authority does not know the token.
    #[error("the relay does not know this enrolment token; ask for a new one")]
    Unknown,
    /// The token has expired; the authority's text.
    #[error("{0}")]
    Expired(String),
    /// The token was redeemed before; the authority's text.
    #[error("{0}")]
    AlreadyRedeemed(String),
    /// A user's token was given to an agent, or the other way round. It is as good as before.
    #[error("{0}")]
    WrongKind(String),
    /// Another cluster has the token's name. It is as good as before.
    #[error("{0}")]
    NameTaken(String),
    /// The relay accepts no more requests now.
    #[error("the relay is busy; try again in {} s", retry_after.as_secs())]
    Busy {
        /// How long to wait before the next attempt.
        retry_after: Duration,
    },
    /// Any other refusal.
    #[error("the relay refused the enrolment (status {status}, {code}): {message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The code.
        code: String,
        /// The text of the answer.
        message: String,
    },
    /// The answer cannot be decoded.
    #[error("the relay's answer cannot be used: {0}; it may be of another version")]
    BadAnswer(#[from] BadAnswer),
    /// A fault of this process, such as its state directory.
    #[error(transparent)]
    Own(#[from] Error),
}

/// Why a TLS connection failed.
#[derive(Debug, thiserror::Error)]
pub enum TlsFailure {
    /// The relay's name cannot be in a certificate.
    #[error(transparent)]
    Name(#[from] InvalidDnsNameError),
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The handshake failed.
    #[error(transparent)]
    Handshake(#[from] rustls::Error),
}

/// A certificate whose validity period does not include this machine's time.
#[derive(Debug, thiserror::Error)]
pub enum InvalidNow {
    /// The new identity's.
    #[error(transparent)]
    Issued(CheckError),
    /// The relay's, or that of a balancer.
    #[error("the certificate of {relay} is not valid now: {reason}")]
    Server {
        /// The URL of the relay.
        relay: Url,
        /// The check that failed.
        reason: CertificateError,
    },
}

/// Why a relay's answer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BadAnswer {
    /// It is of another shape.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    /// Its certificates cannot be read, or are for another key.
    #[error(transparent)]
    Certificates(Box<Error>),
    /// Its certificate breaks a rule.
    #[error(transparent)]
    Certificate(Box<CheckError>),
    /// The URL in the token gives no HTTP request.
    #[error(transparent)]
    Request(#[from] http::Error),
    /// Its body is too large, or was cut off.
    #[error(transparent)]
    Body(BoxError),
    /// The URL in the token has no host.
    #[error("{0} has no host")]
    NoHost(Url),
}
