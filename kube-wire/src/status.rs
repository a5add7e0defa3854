//! `meta/v1.Status`, the form in which kubectl prints an error of the API's.

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderValue, Response, StatusCode};
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

/// An answer that is an error, which kubectl prints as `Error from server (REASON): MESSAGE`.
///
/// ```
/// use throwline_kube_wire::Status;
///
/// let response = Status::forbidden("dana may not do this").response();
/// assert_eq!(response.status(), 403);
/// assert_eq!(response.headers()["content-type"], "application/json");
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Of the answer that carries it.
    pub code: StatusCode,
    /// One of Kubernetes' `StatusReason`s: client-go decides by it, not by the code.
    pub reason: &'static str,
    /// The text for people.
    pub message: String,
    /// `meta/v1.StatusDetails`.
    pub details: Option<serde_json::Value>,
}

impl Status {
    /// Without details.
    pub fn new(code: StatusCode, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    /// 400: the request cannot be understood, or in two ways.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    /// 401: the client is not authenticated.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", message)
    }

    /// 403: this user may not do this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "Forbidden", message)
    }

    /// 404.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NotFound", message)
    }

    /// 405.
    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", message)
    }

    /// 408: the client was too slow.
    pub fn request_timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "Timeout", message)
    }

    /// 429: a limit on what one client may have at once.
    pub fn too_many_requests(message: impl Into<String>) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", message)
    }

    /// 502: what is behind us gave an answer that cannot be passed on.
    pub fn bad_gateway(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "InternalError", message)
    }

    /// 503: it may work in a moment.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            message,
        )
    }

    /// 504: what is behind us was too slow.
    pub fn gateway_timeout(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", message)
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> Vec<u8> {
        // Strings and numbers alone: there is nothing in it that JSON does not have.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The answer for a client that decodes it.
    #[must_use]
    pub fn response(&self) -> Response<Bytes> {
        answer(self.code, "application/json", self.json())
    }
}

/// The answer for a client that keeps an error's text only; see [`keeps_text_only`](crate::discovery::keeps_text_only).
#[must_use]
pub fn text_response(code: StatusCode, text: String) -> Response<Bytes> {
    answer(code, "text/plain; charset=utf-8", text.into_bytes())
}

fn answer(code: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Bytes> {
    let mut response = Response::new(Bytes::from(body));
    *response.status_mut() = code;
    let content_type = HeaderValue::from_static(content_type);
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

impl Serialize for Status {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Empty {}
        let mut fields = serializer.serialize_struct("Status", 8)?;
        fields.serialize_field("kind", "Status")?;
        fields.serialize_field("apiVersion", "v1")?;
        fields.serialize_field("metadata", &Empty {})?;
        fields.serialize_field("status", "Failure")?;
        fields.serialize_field("message", &self.message)?;
        fields.serialize_field("reason", self.reason)?;
        match &self.details {
            Some(details) => fields.serialize_field("details", details)?,
            None => fields.skip_field("details")?,
        }
        fields.serialize_field("code", &self.code.as_u16())?;
        fields.end()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn it_has_the_fields_that_client_go_reads() {
        let mut status = Status::forbidden("no \"quotes\" are lost");
        let mut expected = json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "no \"quotes\" are lost", "reason": "Forbidden", "code": 403,
        });
        let read = |status: &Status| serde_json::from_slice::<Value>(&status.json()).unwrap();
        assert_eq!(read(&status), expected);
        status.details = Some(json!({"name": "a", "kind": "pods"}));
        expected["details"] = json!({"name": "a", "kind": "pods"});
        assert_eq!(read(&status), expected);
    }

    #[test]
    fn an_answer_has_its_code_and_type() {
        let response = Status::unavailable("x").response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[CONTENT_TYPE], "application/json");
        let response = text_response(StatusCode::BAD_GATEWAY, "x".to_owned());
        assert_eq!(response.status(), 502);
        assert_eq!(
            response.headers()[CONTENT_TYPE],
            "text/plain; charset=utf-8"
        );
    }
}
