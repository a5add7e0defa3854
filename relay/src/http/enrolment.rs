//! `POST /v1/enroll`: a token's secret and a certificate request in, a certificate out.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use throwline_certs::Directory;
use throwline_certs::directory::RedeemError;
use throwline_certs::enrol::{EnrolRequest, code};
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::response::{self, Body};
use crate::limits::rate::RateLimit;
use crate::metrics::Metrics;

/// Why an attempt failed; the caller can correct all but the last.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("this address tried too often")]
    TooOften(Duration),
    #[error("the body did not arrive in time")]
    Slow,
    #[error("the body is too large or was cut off")]
    Body,
    #[error("the body is not an enrolment request")]
    Malformed,
    #[error("the token was refused: {0}")]
    Token(#[from] RedeemError),
}

/// Redeems tokens.
pub(crate) struct Enrolment {
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) rate: RateLimit,
    pub(crate) metrics: Metrics,
    /// The most bytes of a body, and the longest time it may take.
    pub(crate) body_bytes: usize,
    pub(crate) body_timeout: Duration,
}

impl Enrolment {
    pub(super) async fn serve(
        &self,
        address: IpAddr,
        request: Request<Incoming>,
    ) -> Response<Body> {
        match self.enrol(address, request).await {
            Ok(response) => {
                self.metrics.enrolment("issued");
                info!(client = %address, "enrolled an identity");
                response
            }
            Err(failure) => {
                self.metrics.enrolment(failure.label());
                if let Failure::Token(RedeemError::Unavailable(cause)) = &failure {
                    error!(client = %address, %cause, "an enrolment failed in the authority");
                } else {
                    warn!(client = %address, reason = %failure, "refused an enrolment");
                }
                failure.response()
            }
        }
    }

    async fn enrol(
        &self,
        address: IpAddr,
        request: Request<Incoming>,
    ) -> Result<Response<Body>, Failure> {
        self.rate
            .take(address, Instant::now())
            .map_err(Failure::TooOften)?;
        let body = Limited::new(request.into_body(), self.body_bytes).collect();
        let body = tokio::time::timeout(self.body_timeout, body)
            .await
            .map_err(|_| Failure::Slow)?
            .map_err(|_| Failure::Body)?
            .to_bytes();
        let request: EnrolRequest =
            serde_json::from_slice(&body).map_err(|_| Failure::Malformed)?;
        let issued = self.directory.redeem(&request).await?;
        Ok(response::json(StatusCode::OK, &issued.to_answer()))
    }
}

impl Failure {
    fn label(&self) -> &'static str {
        match self {
            Self::TooOften(_) => "limit",
            Self::Slow => "timeout",
            Self::Body
            | Self::Malformed
            | Self::Token(RedeemError::BadCsr(_) | RedeemError::NoClusterUid) => "bad-request",
            Self::Token(RedeemError::SystemName(_)) => "system-name",
            Self::Token(RedeemError::NotSigned) => "not-signed",
            Self::Token(RedeemError::WrongKind { .. }) => "wrong-kind",
            Self::Token(RedeemError::NameTaken { .. }) => "name-taken",
            Self::Token(RedeemError::Unknown) => "unknown",
            Self::Token(RedeemError::Expired { .. }) => "expired",
            Self::Token(RedeemError::AlreadyRedeemed { .. }) => "redeemed",
            Self::Token(RedeemError::Unavailable(_)) => "internal",
        }
    }

    fn response(&self) -> Response<Body> {
        match self {
            Self::TooOften(after) => response::retry_after(
                response::problem(
                    StatusCode::TOO_MANY_REQUESTS,
                    "limit",
                    "too many enrolments from this address; try again later",
                ),
                *after,
            ),
            Self::Slow => response::problem(
                StatusCode::REQUEST_TIMEOUT,
                "timeout",
                "the request did not arrive in time",
            ),
            Self::Body => response::problem(
                StatusCode::PAYLOAD_TOO_LARGE,
                code::BAD_REQUEST,
                "the request is too large or was cut off",
            ),
            Self::Malformed => response::problem(
                StatusCode::BAD_REQUEST,
                code::BAD_REQUEST,
                "the request is not JSON with a token, a kind, a csr and a signature",
            ),
            Self::Token(RedeemError::Unknown) => response::problem(
                StatusCode::FORBIDDEN,
                code::UNKNOWN,
                "this relay knows no such token",
            ),
            Self::Token(RedeemError::Expired { .. }) => response::problem(
                StatusCode::FORBIDDEN,
                code::EXPIRED,
                "the token has expired; ask for a new one",
            ),
            Self::Token(RedeemError::AlreadyRedeemed { .. }) => response::problem(
                StatusCode::CONFLICT,
                code::REDEEMED,
                "the token was redeemed before; ask for a new one",
            ),
            Self::Token(error @ RedeemError::WrongKind { .. }) => {
                response::problem(StatusCode::CONFLICT, code::WRONG_KIND, &error.to_string())
            }
            Self::Token(error @ RedeemError::NameTaken { .. }) => {
                response::problem(StatusCode::CONFLICT, code::NAME_TAKEN, &error.to_string())
            }
            Self::Token(error @ (RedeemError::NotSigned | RedeemError::NoClusterUid)) => {
                response::problem(
                    StatusCode::BAD_REQUEST,
                    code::BAD_REQUEST,
                    &error.to_string(),
                )
            }
            Self::Token(RedeemError::BadCsr(_)) => response::problem(
                StatusCode::BAD_REQUEST,
                code::BAD_REQUEST,
                "the certificate request cannot be used",
            ),
            Self::Token(RedeemError::SystemName(error)) => {
                response::problem(StatusCode::FORBIDDEN, "system-name", &error.to_string())
            }
            Self::Token(RedeemError::Unavailable(_)) => response::retry_after(
                response::problem(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "internal",
                    "the authority cannot answer now; try again later",
                ),
                Duration::from_secs(5),
            ),
        }
    }
}
