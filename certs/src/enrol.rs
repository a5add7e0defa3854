//! Enrolment: a token becomes an identity. The key is made here and stays here; the relay's
//! answer is believed only if its CA is the one that the token pins.

mod client;
mod pin;

use crate::{
    CheckError, EnrolmentToken, Error, Identity, Kind, PendingIdentity, Roots, Usage, Validator,
    Want, files, roots, sha256,
};
use client::Answer;
use serde::{Deserialize, Serialize};
use std::{
    fmt, io,
    path::Path,
    time::{Duration, SystemTime},
};
use tokio::io::{AsyncRead, AsyncWrite};
use url::{Host, Url};

/// From the first look-up of the relay's name to its whole answer. Default and only value: a
/// person waits for this, and a relay that is alive answers within a second.
const DEADLINE: Duration = Duration::from_secs(30);

const WANT: Want = Want {
    kinds: &[Kind::Cluster, Kind::User],
    usage: Usage::Client,
};

/// Why a connection was not made, in the words of who tried.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Body of `POST /v1/enroll`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolRequest {
    /// [`crate::Secret::expose`].
    pub secret: String,
    /// In PEM.
    pub csr: String,
}

impl fmt::Debug for EnrolRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolRequest").finish_non_exhaustive()
    }
}

/// Its answer with status 200: PEM, leaf first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolAnswer {
    pub chain: String,
    pub ca: String,
}

/// Every other answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One of [`code`], or another word for programs.
    pub code: String,
    /// A sentence for people.
    pub message: String,
}

/// Values of [`ErrorBody::code`] on `/v1/enroll`.
pub mod code {
    pub const UNKNOWN: &str = "token-unknown";
    pub const EXPIRED: &str = "token-expired";
    pub const REDEEMED: &str = "token-already-redeemed";
    pub const BAD_REQUEST: &str = "bad-request";
}

/// What enrolment gives; the caller saves both.
#[derive(Debug)]
pub struct Enrolled {
    pub identity: Identity,
    pub roots: Roots,
}

/// Why enrolment failed, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error(
        "the token's relay {relay} is not https://, and a secret is not sent unprotected over a network"
    )]
    Insecure { relay: Url },
    #[error("the relay's name {host:?} cannot be resolved: {source}; check the network and DNS")]
    Resolve { host: String, source: io::Error },
    #[error("the relay {relay} cannot be reached: {source}; check the network and its firewalls")]
    Unreachable { relay: Url, source: io::Error },
    /// A connector's own words, which name what could not be reached.
    #[error(transparent)]
    Connect(BoxError),
    #[error("the relay {relay} did not answer within {} s; try again", DEADLINE.as_secs())]
    Timeout { relay: Url },
    /// Whoever answers has another CA than the maker of the token.
    #[error(
        "{relay} belongs to another authority than this token: the relay was set up anew (then \
         ask for a new token), or somebody stands between"
    )]
    WrongPin { relay: Url },
    /// Neither the token's authority nor a public one vouches for who answers.
    #[error(
        "the certificate shown for {relay} is of an issuer that is unknown here, so something in \
         between may end TLS (a proxy that inspects it? a load balancer?): give the CA of that \
         with --ca-file, if it is one of yours; the token was not sent"
    )]
    UnknownIssuer { relay: Url },
    #[error("the TLS connection to {relay} failed: {reason}")]
    Tls { relay: Url, reason: String },
    /// The other clock may be the wrong one, but this one is easier to look at.
    #[error("{reason}; compare this machine's clock ({}) with the true time", files::show(*now))]
    Clock { reason: String, now: SystemTime },
    #[error(
        "{relay} answered, but is not a relay of Throwline (status {status}); check the address"
    )]
    NotARelay { relay: Url, status: u16 },
    #[error("the relay does not know this enrolment token; ask for a new one")]
    Unknown,
    #[error("{0}")]
    Expired(String),
    #[error("{0}")]
    AlreadyRedeemed(String),
    #[error("the relay is busy; try again in {} s", retry_after.as_secs())]
    Busy { retry_after: Duration },
    #[error("the relay refused the enrolment (status {status}, {code}): {message}")]
    Refused {
        status: u16,
        code: String,
        message: String,
    },
    #[error("the relay's answer cannot be used: {0}; it may be of another version")]
    BadAnswer(String),
    #[error(transparent)]
    Own(#[from] Error),
}

/// Redeems `token` at its relay. `extra_ca` is a PEM file of CAs to trust for the connection, for
/// a balancer with a private CA; the authority's own CA is known by the token's pin.
///
/// A token can be redeemed once: if this future is dropped, or fails after the request was sent,
/// the token may be spent.
pub async fn redeem(
    token: &EnrolmentToken,
    extra_ca: Option<&Path>,
) -> Result<Enrolled, EnrolError> {
    redeem_within(DEADLINE, token, extra_ca, client::connect(&token.relay)).await
}

/// The same over a connection that `connecting` makes to the token's relay, TLS not begun: for
/// whoever needs a proxy on the way.
pub async fn redeem_over<T, E>(
    token: &EnrolmentToken,
    extra_ca: Option<&Path>,
    connecting: impl Future<Output = Result<T, E>>,
) -> Result<Enrolled, EnrolError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    E: Into<BoxError>,
{
    let connecting = async {
        let connected = connecting.await;
        connected.map_err(|error| EnrolError::Connect(error.into()))
    };
    redeem_within(DEADLINE, token, extra_ca, connecting).await
}

async fn redeem_within<T>(
    deadline: Duration,
    token: &EnrolmentToken,
    extra_ca: Option<&Path>,
    connecting: impl Future<Output = Result<T, EnrolError>>,
) -> Result<Enrolled, EnrolError>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let relay = &token.relay;
    if relay.scheme() != "https" && !is_loopback(relay) {
        return Err(EnrolError::Insecure {
            relay: relay.clone(),
        });
    }
    let pending = PendingIdentity::generate()?;
    let request = EnrolRequest {
        secret: token.secret.expose(),
        csr: pending.csr_pem(),
    };
    let body = serde_json::to_vec(&request).map_err(|error| Error::Invalid(error.to_string()))?;
    let posting = client::post(token, extra_ca, connecting, body);
    let answer = tokio::time::timeout(deadline, posting)
        .await
        .map_err(|_| EnrolError::Timeout {
            relay: relay.clone(),
        })??;
    if answer.status != 200 {
        return Err(refusal(relay, &answer));
    }
    let answer: EnrolAnswer = serde_json::from_slice(&answer.body)
        .map_err(|error| EnrolError::BadAnswer(error.to_string()))?;
    accept(token, pending, &answer, SystemTime::now())
}

/// Believes the answer, or not.
fn accept(
    token: &EnrolmentToken,
    pending: PendingIdentity,
    answer: &EnrolAnswer,
    now: SystemTime,
) -> Result<Enrolled, EnrolError> {
    let bad = |error: Error| EnrolError::BadAnswer(error.to_string());
    // Of the certificates offered, the pinned one alone is trusted.
    let pinned: Vec<_> = roots::certificates_from_pem(&answer.ca)
        .map_err(bad)?
        .into_iter()
        .filter(|der| sha256(der) == token.pin)
        .collect();
    if pinned.is_empty() {
        return Err(EnrolError::WrongPin {
            relay: token.relay.clone(),
        });
    }
    let roots = Roots::new(pinned).map_err(bad)?;
    let chain = roots::certificates_from_pem(&answer.chain).map_err(bad)?;
    let validator = Validator::new(roots.clone(), roots.trust_domain().clone());
    validator
        .check(&chain, WANT, now)
        .map_err(|error| match error {
            CheckError::NotYetValid { .. } | CheckError::Expired { .. } => EnrolError::Clock {
                reason: error.to_string(),
                now,
            },
            error => EnrolError::BadAnswer(error.to_string()),
        })?;
    let identity = pending.complete(chain).map_err(bad)?;
    Ok(Enrolled { identity, roots })
}

fn refusal(relay: &Url, answer: &Answer) -> EnrolError {
    let status = answer.status;
    if status == 429 || status == 503 {
        return EnrolError::Busy {
            retry_after: answer.retry_after.unwrap_or(Duration::from_secs(5)),
        };
    }
    let Ok(body) = serde_json::from_slice::<ErrorBody>(&answer.body) else {
        return EnrolError::NotARelay {
            relay: relay.clone(),
            status,
        };
    };
    let message = printable(&body.message);
    match body.code.as_str() {
        code::UNKNOWN => EnrolError::Unknown,
        code::EXPIRED => EnrolError::Expired(message),
        code::REDEEMED => EnrolError::AlreadyRedeemed(message),
        code => EnrolError::Refused {
            status,
            code: printable(code),
            message,
        },
    }
}

/// Text from outside, fit for a terminal: no control characters, not too long.
fn printable(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}'))
        .take(500)
        .collect()
}

fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

#[cfg(test)]
mod tests;
