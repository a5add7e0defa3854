//! `POST /v1/enroll`: a token's secret and a certificate request in, a certificate out.

use std::net::IpAddr;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use throwline_certs::Secret;
use throwline_certs::authority::RedeemError;
use throwline_certs::enrol::{EnrolRequest, code};
use tokio::time::Instant;
use tracing::{error, info, warn};

use crate::relay::Shared;
use crate::response::{self, Body};

/// Why an attempt failed; all but the last are the caller's to mend.
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

pub(crate) async fn handle(
    shared: &Shared,
    address: IpAddr,
    request: Request<Incoming>,
) -> Response<Body> {
    match enrol(shared, address, request).await {
        Ok(response) => {
            shared.metrics.enrolment("issued");
            info!(client = %address, "enrolled an identity");
            response
        }
        Err(failure) => {
            shared.metrics.enrolment(failure.label());
            if let Failure::Token(RedeemError::Internal(cause)) = &failure {
                error!(client = %address, %cause, "an enrolment failed in the authority");
            } else {
                warn!(client = %address, reason = %failure, "refused an enrolment");
            }
            failure.response()
        }
    }
}

async fn enrol(
    shared: &Shared,
    address: IpAddr,
    request: Request<Incoming>,
) -> Result<Response<Body>, Failure> {
    shared
        .enrolments
        .take(address, Instant::now())
        .map_err(Failure::TooOften)?;
    let body = Limited::new(request.into_body(), shared.config.limits.body_bytes).collect();
    let body = tokio::time::timeout(shared.config.timing.request, body)
        .await
        .map_err(|_| Failure::Slow)?
        .map_err(|_| Failure::Body)?
        .to_bytes();
    let request: EnrolRequest = serde_json::from_slice(&body).map_err(|_| Failure::Malformed)?;
    // A secret of the wrong form is as unknown as a wrong one of the right form.
    let secret: Secret = request.secret.parse().map_err(|_| RedeemError::Unknown)?;
    let issued = shared.authority.redeem(&secret, &request.csr).await?;
    Ok(response::json(StatusCode::OK, &issued.to_answer()))
}

impl Failure {
    fn label(&self) -> &'static str {
        match self {
            Self::TooOften(_) => "limit",
            Self::Slow => "timeout",
            Self::Body | Self::Malformed | Self::Token(RedeemError::BadCsr(_)) => "bad-request",
            Self::Token(RedeemError::Unknown) => "unknown",
            Self::Token(RedeemError::Expired { .. }) => "expired",
            Self::Token(RedeemError::AlreadyRedeemed { .. }) => "redeemed",
            Self::Token(RedeemError::Internal(_)) => "internal",
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
                "the request is not JSON with a secret and a csr",
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
            Self::Token(RedeemError::BadCsr(_)) => response::problem(
                StatusCode::BAD_REQUEST,
                code::BAD_REQUEST,
                "the certificate request cannot be used",
            ),
            Self::Token(RedeemError::Internal(_)) => response::retry_after(
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
