//! Why a peer was not let in: all of it inwards, hardly any of it outwards.

use std::time::{Duration, SystemTime};

use http::{Response, StatusCode};
use throwline_certs::CheckError;
use throwline_certs::jws::JwsError;
use throwline_tunnel::proto::assertion::ClaimsError;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::replay::Replay;
use crate::response::{self, Body};

/// A refusal before the 101. Its text is for our log.
#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("not a websocket upgrade: {0} does not fit")]
    NotAnUpgrade(&'static str),
    #[error("the peer speaks no protocol of ours")]
    NoCommonProtocol(&'static str),
    /// Everything that would tell a stranger something.
    #[error("the assertion was not accepted: {0}")]
    Unauthenticated(String),
    /// Chain and signature were good; only the time is wrong, and its owner can mend that.
    #[error("the peer's clock differs: {0}")]
    ClockSkew(String, SystemTime),
    #[error("the peer's certificate expired")]
    CertificateExpired(SystemTime),
    #[error("too many assertions are remembered")]
    Busy,
}

impl Denied {
    pub(super) fn from_jws(error: JwsError, now: SystemTime) -> Self {
        match error {
            JwsError::Certificate(CheckError::Expired { .. }) => Self::CertificateExpired(now),
            JwsError::Certificate(error @ CheckError::NotYetValid { .. }) => {
                Self::ClockSkew(error.to_string(), now)
            }
            error => Self::Unauthenticated(error.to_string()),
        }
    }

    pub(super) fn from_claims(error: ClaimsError, now: SystemTime) -> Self {
        match error {
            ClaimsError::ClockSkew { .. } => Self::ClockSkew(error.to_string(), now),
            error => Self::Unauthenticated(error.to_string()),
        }
    }

    pub(super) fn from_replay(replay: Replay) -> Self {
        match replay {
            Replay::Used => Self::Unauthenticated("it was used before".into()),
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
            Self::Busy => "busy",
        }
    }

    /// The answer: constant for all that a stranger may not tell apart.
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

fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    at.replace_nanosecond(0)
        .unwrap_or(at)
        .format(&Rfc3339)
        .unwrap_or_else(|_| at.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt;
    use std::time::UNIX_EPOCH;

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
            Denied::from_jws(JwsError::Malformed("x".into()), UNIX_EPOCH),
            Denied::from_replay(Replay::Used),
        ] {
            answers.push(outward(&denied).await);
        }
        answers.dedup();
        assert_eq!(
            answers,
            [(
                StatusCode::UNAUTHORIZED,
                r#"{"code":"unauthenticated","message":"the assertion was not accepted"}"#
                    .to_owned()
            )]
        );
    }

    #[tokio::test]
    async fn a_wrong_clock_is_told_the_right_time() {
        let denied = Denied::ClockSkew("off".into(), UNIX_EPOCH);
        let (status, body) = outward(&denied).await;
        assert_eq!(status, StatusCode::UNAUTHORIZED);
        assert!(body.contains("clock-skew"), "{body}");
        assert!(body.contains("1970-01-01T00:00:00Z"), "{body}");
    }
}
