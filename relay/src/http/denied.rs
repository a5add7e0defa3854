//! Why a peer was refused: the whole reason for the log, as little as possible of it for the peer.

use std::time::{Duration, SystemTime};

use http::{Response, StatusCode};
use throwline_certs::CheckError;
use throwline_certs::jws::JwsError;
use throwline_ops::time::rfc3339;
use throwline_tunnel::proto::assertion::ClaimsError;

use super::response::{self, Body};
use crate::limits::replay::Replay;

/// A refusal before the 101. Its text is for our log.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("not a websocket upgrade: {0} does not fit")]
    NotAnUpgrade(&'static str),
    #[error("the peer speaks no protocol of ours")]
    NoCommonProtocol(&'static str),
    /// Each cause that would give an unauthenticated client a hint.
    #[error("the assertion was not accepted: {0}")]
    Unauthenticated(#[source] AssertionError),
    /// Chain and signature were good; only the time is wrong, and its owner can correct that. With the
    /// relay's time.
    #[error("the peer's clock differs: {0}")]
    ClockSkew(#[source] AssertionError, SystemTime),
    /// Likewise, the certificate has ended.
    #[error("the peer's certificate expired")]
    CertificateExpired(SystemTime),
    /// Chain and signature were good here too. With the serial number.
    #[error("the peer's certificate {0} was revoked")]
    Revoked(String),
    /// The cache of assertions is full.
    #[error("too many assertions are remembered")]
    Busy,
}

/// Why an assertion was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum AssertionError {
    /// There is none, or more than one.
    #[error("not exactly one assertion")]
    NotOne,
    /// The header has another scheme.
    #[error("the assertion is not a bearer token")]
    NotBearer,
    /// Its form, its signature or its certificate.
    #[error(transparent)]
    Jws(#[from] JwsError),
    /// Its claims.
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    /// Its purpose is newer than this relay, and may allow less than a carrier does.
    #[error("its purpose is unknown")]
    Purpose,
    /// It was used before.
    #[error("it was used before")]
    Replayed,
}

impl Denied {
    pub(super) fn from_jws(error: JwsError, now: SystemTime) -> Self {
        match error {
            JwsError::Certificate(CheckError::Expired { .. }) => Self::CertificateExpired(now),
            JwsError::Certificate(CheckError::Revoked { serial }) => Self::Revoked(serial),
            JwsError::Certificate(error @ CheckError::NotYetValid { .. }) => {
                Self::ClockSkew(JwsError::from(error).into(), now)
            }
            error => Self::Unauthenticated(error.into()),
        }
    }

    pub(super) fn from_claims(error: ClaimsError, now: SystemTime) -> Self {
        match error {
            ClaimsError::ClockSkew { .. } => Self::ClockSkew(error.into(), now),
            error => Self::Unauthenticated(error.into()),
        }
    }

    pub(super) fn from_replay(replay: Replay) -> Self {
        match replay {
            Replay::Used => Self::Unauthenticated(AssertionError::Replayed),
            Replay::Full => Self::Busy,
        }
    }

    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::NotAnUpgrade(_) => "not-an-upgrade",
            Self::NoCommonProtocol(_) => "version",
            Self::Unauthenticated(_) => "unauthenticated",
            Self::ClockSkew(..) => "clock-skew",
            Self::CertificateExpired(_) => "certificate-expired",
            Self::Revoked(_) => "revoked",
            Self::Busy => "busy",
        }
    }

    /// The answer: the same for all causes that an unauthenticated client must not distinguish.
    pub fn response(&self) -> Response<Body> {
        match self {
            Self::NotAnUpgrade(_) => response::problem(
                StatusCode::BAD_REQUEST,
                "bad-request",
                "this path is for websocket upgrades; does a proxy in between strip them?",
            ),
            Self::NoCommonProtocol(versions) => response::upgrade_required(versions),
            Self::Unauthenticated(_) => response::problem(
                StatusCode::UNAUTHORIZED,
                "unauthenticated",
                "the assertion was not accepted",
            ),
            Self::ClockSkew(_, now) => response::problem(
                StatusCode::UNAUTHORIZED,
                "clock-skew",
                &format!(
                    "the clocks differ by more than the relay allows; the relay's reads {}",
                    rfc3339(*now)
                ),
            ),
            Self::CertificateExpired(now) => response::problem(
                StatusCode::UNAUTHORIZED,
                "certificate-expired",
                &format!(
                    "the certificate has expired; the relay's clock reads {}",
                    rfc3339(*now)
                ),
            ),
            Self::Revoked(_) => response::problem(
                StatusCode::UNAUTHORIZED,
                "revoked",
                "this identity was revoked",
            ),
            Self::Busy => response::retry_after(
                response::problem(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "limit",
                    "the relay has no room for more handshakes now",
                ),
                Duration::from_secs(5),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use std::time::UNIX_EPOCH;
    use throwline_certs::jws::MalformedToken;

    async fn outward(denied: &Denied) -> (StatusCode, String) {
        let (parts, body) = denied.response().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (parts.status, String::from_utf8(body.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn a_stranger_cannot_tell_one_fault_from_another() {
        let mut answers = Vec::new();
        for denied in [
            Denied::from_jws(JwsError::BadSignature, UNIX_EPOCH),
            Denied::from_jws(CheckError::UnknownIssuer.into(), UNIX_EPOCH),
            Denied::from_jws(JwsError::Malformed(MalformedToken::Parts), UNIX_EPOCH),
            Denied::from_replay(Replay::Used),
        ] {
            answers.push(outward(&denied).await);
        }
        answers.dedup();
        assert_eq!(
            answers,
            [(
                StatusCode::UNAUTHORIZED,
                r#"{"code":"unauthenticated","message":"throwline relay: the assertion was not accepted"}"#
                    .to_owned()
            )]
        );
    }

    #[tokio::test]
    async fn a_wrong_clock_is_told_the_right_time() {
        let denied = Denied::ClockSkew(ClaimsError::ClockSkew { by: 90 }.into(), UNIX_EPOCH);
        let (status, body) = outward(&denied).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        assert!(body.contains("clock-skew"), "{body}");
        assert!(body.contains("1970-01-01T00:00:00Z"), "{body}");
    }
}
