//! The one place that turns errors into HTTP answers: Kubernetes `Status` objects, which kubectl
//! prints as `Error from server (REASON): MESSAGE`.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde_json::json;

use crate::audit;
use crate::rules::Refusal;
use crate::upstream;

/// An answer of the agent's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) status: StatusCode,
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn bad_gateway(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_GATEWAY,
            reason: "InternalError",
            message: message.into(),
        }
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::SERVICE_UNAVAILABLE,
            reason: "ServiceUnavailable",
            message: message.into(),
        }
    }

    /// For a client that keeps nothing but the text, and that only under this status; see
    /// [`keeps_text_only`](throwline_tunnel::http1::discovery::keeps_text_only).
    pub(crate) fn text(&self) -> Response<Full<Bytes>> {
        let message = format!("throwline: {}", self.message.replace(['"', '\\'], "'"));
        let mut response = Response::new(Full::new(Bytes::from(message)));
        *response.status_mut() = StatusCode::BAD_GATEWAY;
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=utf-8"),
        );
        response
    }

    pub(crate) fn response(&self) -> Response<Full<Bytes>> {
        let body = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.status.as_u16(),
        });
        let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
        *response.status_mut() = self.status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        // No Retry-After: client-go would try ten times in silence before it shows the message.
        response
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Self {
        Self {
            status: refusal.status,
            reason: refusal.reason,
            message: refusal.message,
        }
    }
}

impl From<audit::Unavailable> for Failure {
    fn from(unavailable: audit::Unavailable) -> Self {
        Self::unavailable(unavailable.to_string())
    }
}

impl From<&upstream::Error> for Failure {
    fn from(error: &upstream::Error) -> Self {
        use upstream::Error;
        match error {
            Error::Connect(_) | Error::Busy | Error::Credentials(_) => {
                Self::unavailable(error.to_string())
            }
            Error::Tls(_) | Error::Exchange(_) | Error::Broken(_) => {
                Self::bad_gateway(error.to_string())
            }
            Error::Timeout => Self {
                status: StatusCode::GATEWAY_TIMEOUT,
                reason: "Timeout",
                message: error.to_string(),
            },
        }
    }
}
