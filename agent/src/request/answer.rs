//! The one place that turns errors into HTTP answers: Kubernetes `Status` objects, which kubectl
//! prints as `Error from server (REASON): MESSAGE`.

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderValue, Response, StatusCode};
use http_body_util::{Either, Full};
use throwline_kube_wire::Status;
use throwline_kube_wire::status::text_response;
use throwline_policy::rules::AUDIT_ID;

use super::download::Download;
use crate::audit::{self, Record};
use crate::message::from_agent;
use crate::quotas::QuotaExceeded;
use crate::upstream;

/// The body of an answer: the agent's own, or the API server's as it arrives.
pub(crate) type AnswerBody = Either<Full<Bytes>, Download>;

/// An answer of the API server.
pub(super) struct Reply {
    pub(super) response: Response<AnswerBody>,
    /// The message, where an explanation was added to a refusal.
    pub(super) explained: Option<String>,
}

/// An answer of the agent in place of the API server's.
pub(super) struct Failure {
    status: Status,
    audit_id: String,
}

impl Failure {
    /// Writes the answer into the request's record.
    pub(super) fn new(record: &mut Record, status: impl Into<Status>) -> Self {
        let status = status.into();
        record.refused(status.code, status.reason, &status.message);
        let audit_id = record.id().to_owned();
        Self { status, audit_id }
    }
}

impl From<Response<AnswerBody>> for Reply {
    fn from(response: Response<AnswerBody>) -> Self {
        Self {
            response,
            explained: None,
        }
    }
}

/// The answer in the form that the client will show. `is_text_only`: it keeps nothing but the text, and
/// that only under some codes; see [`keeps_text_only`](throwline_kube_wire::discovery::keeps_text_only).
pub(super) fn render(result: Result<Reply, Failure>, is_text_only: bool) -> Response<AnswerBody> {
    match result {
        Ok(Reply {
            explained: Some(message),
            ..
        }) if is_text_only => text(StatusCode::FORBIDDEN, message),
        Ok(reply) => reply.response,
        Err(failure) => failure.response(is_text_only),
    }
}

impl Failure {
    fn response(mut self, is_text_only: bool) -> Response<AnswerBody> {
        self.status.message = from_agent(&self.status.message);
        if is_text_only {
            match self.status.code {
                StatusCode::FORBIDDEN => return text(StatusCode::FORBIDDEN, self.status.message),
                code if code.is_server_error() => {
                    // The client shows it in quotes.
                    let message = self.status.message.replace(['"', '\\'], "'");
                    return text(StatusCode::BAD_GATEWAY, message);
                }
                // The other codes are clear without a text.
                _ => {}
            }
        }
        let mut response = self.status.response();
        // No Retry-After where the cause will not pass soon: client-go would try ten times in silence
        // before it shows the message. A limit on what is under way has the 1 s of Kubernetes' own
        // (API Priority and Fairness).
        if self.status.code == StatusCode::TOO_MANY_REQUESTS {
            let soon = HeaderValue::from_static("1");
            response.headers_mut().insert(RETRY_AFTER, soon);
        }
        // As the API server's answers have it.
        if let Ok(id) = HeaderValue::from_str(&self.audit_id) {
            response.headers_mut().insert(AUDIT_ID, id);
        }
        response.map(|body| Either::Left(Full::new(body)))
    }
}

fn text(code: StatusCode, message: String) -> Response<AnswerBody> {
    text_response(code, message).map(|body| Either::Left(Full::new(body)))
}

impl From<audit::Unavailable> for Status {
    fn from(unavailable: audit::Unavailable) -> Self {
        Self::unavailable(unavailable.to_string())
    }
}

impl From<QuotaExceeded> for Status {
    fn from(limit: QuotaExceeded) -> Self {
        Self::too_many_requests(limit.to_string())
    }
}

impl From<&upstream::Error> for Status {
    fn from(error: &upstream::Error) -> Self {
        use upstream::Error;
        let message = error.to_string();
        match error {
            Error::Connect(_) | Error::Busy | Error::Credentials(_) | Error::Exchange(_) => {
                Self::unavailable(message)
            }
            Error::Tls(_) | Error::Broken(_) => Self::bad_gateway(message),
            Error::Timeout | Error::Silent(_) => Self::gateway_timeout(message),
        }
    }
}
