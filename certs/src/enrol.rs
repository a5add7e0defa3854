//! Enrolment: a token becomes an identity. The key is made here and stays here; the relay's
//! answer is accepted only if its CA is the one that the token pins.

mod client;
mod error;
mod pin;
mod request;

use crate::{
    BoxError, CheckError, EnrolmentToken, Error, ExpectedPeer, Identity, InvalidInput, Kind,
    PendingIdentity, Roots, Usage, Validator, roots, sha256, tls::Trust,
};
use client::Answer;
use error::DEADLINE;
pub use error::{BadAnswer, EnrolError, InvalidNow, TlsFailure};
pub use request::{Asker, EnrolRequest};
use serde::{Deserialize, Serialize};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncRead, AsyncWrite};
use url::{Host, Url};

/// The beginning of a relay's texts on the wire.
const RELAY: &str = "throwline relay: ";

const WANT: ExpectedPeer = ExpectedPeer {
    kinds: &[Kind::Cluster, Kind::User],
    usage: Usage::Client,
};

/// Its answer with status 200: PEM, leaf first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolAnswer {
    /// The new certificate's chain.
    pub chain: String,
    /// The CA's certificates.
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
    /// The token is not known to this authority.
    pub const UNKNOWN: &str = "token-unknown";
    /// The token has expired.
    pub const EXPIRED: &str = "token-expired";
    /// The token was redeemed before.
    pub const REDEEMED: &str = "token-already-redeemed";
    /// The token is for another kind of identity.
    pub const WRONG_KIND: &str = "token-wrong-kind";
    /// Another cluster is enrolled under the name.
    pub const NAME_TAKEN: &str = "cluster-name-taken";
    /// The request is invalid.
    pub const BAD_REQUEST: &str = "bad-request";
}

/// What enrolment gives; the caller saves both.
#[derive(Debug)]
pub struct Enrolled {
    /// The new identity.
    pub identity: Identity,
    /// The authority's CA, verified against the token's pin.
    pub roots: Roots,
}

/// Redeems `token` at its relay. The authority's own CA is verified by the token's pin; `trust` are
/// the CAs that are accepted beside it for the relay, for a balancer that terminates TLS.
///
/// A token can be redeemed once: if this future is dropped, or fails after the request was sent,
/// the token may be spent.
///
/// # Errors
/// [`EnrolError`], which names the component at fault and the remedy.
pub async fn redeem(
    token: &EnrolmentToken,
    asker: &Asker,
    trust: Trust<'_>,
) -> Result<Enrolled, EnrolError> {
    redeem_within(DEADLINE, token, asker, trust, client::connect(&token.relay)).await
}

/// The same over a connection that `connecting` makes to the token's relay, TLS not begun: for
/// callers that dial through a proxy.
///
/// # Errors
/// As [`redeem`]; [`EnrolError::Connect`] where `connecting` fails.
pub async fn redeem_over<T, E>(
    token: &EnrolmentToken,
    asker: &Asker,
    trust: Trust<'_>,
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
    redeem_within(DEADLINE, token, asker, trust, connecting).await
}

async fn redeem_within<T>(
    deadline: Duration,
    token: &EnrolmentToken,
    asker: &Asker,
    trust: Trust<'_>,
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
    let request = token.request(asker, pending.csr_pem())?;
    let body =
        serde_json::to_vec(&request).map_err(|error| Error::from(InvalidInput::from(error)))?;
    let posting = client::post(token, trust, connecting, body);
    let answer = tokio::time::timeout(deadline, posting)
        .await
        .map_err(|_| EnrolError::Timeout {
            relay: relay.clone(),
        })??;
    if answer.status != 200 {
        return Err(refusal(relay, &answer));
    }
    let answer: EnrolAnswer = serde_json::from_slice(&answer.body).map_err(BadAnswer::from)?;
    accept(token, pending, &answer, SystemTime::now())
}

/// Believes the answer, or not.
fn accept(
    token: &EnrolmentToken,
    pending: PendingIdentity,
    answer: &EnrolAnswer,
    now: SystemTime,
) -> Result<Enrolled, EnrolError> {
    let bad = |error: Error| BadAnswer::Certificates(Box::new(error));
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
    // The relay that sent both is not trusted: the chain has to lead to the pinned root.
    validator
        .check(&chain, WANT, now)
        .map_err(|error| match error {
            CheckError::NotYetValid { .. } | CheckError::Expired { .. } => EnrolError::Clock {
                source: Box::new(InvalidNow::Issued(error)),
                now,
            },
            error => BadAnswer::Certificate(Box::new(error)).into(),
        })?;
    // Rejects a certificate for another key than the one that was made here.
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
    // A balancer or a captive portal answers with a page; its status alone has no meaning here.
    let Ok(body) = serde_json::from_slice::<ErrorBody>(&answer.body) else {
        return EnrolError::NotARelay {
            relay: relay.clone(),
            status,
        };
    };
    // The errors below name the relay themselves.
    let message = body.message.strip_prefix(RELAY).unwrap_or(&body.message);
    let message = printable(message);
    match body.code.as_str() {
        code::UNKNOWN => EnrolError::Unknown,
        code::EXPIRED => EnrolError::Expired(message),
        code::REDEEMED => EnrolError::AlreadyRedeemed(message),
        code::WRONG_KIND => EnrolError::WrongKind(message),
        code::NAME_TAKEN => EnrolError::NameTaken(message),
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
