//! Our own errors as kubectl shows them: the one file that makes HTTP responses out of errors.
//!
//! A Kubernetes `Status` object is printed by client-go like one of its errors. There is one exception:
//! discovery keeps the text only, quoted with `%q`. So discovery gets that, and messages hold no `"`.

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use throwline_kube_wire::Status;
use throwline_kube_wire::discovery::keeps_text_only;
use throwline_kube_wire::http1::head::HeadError;
use throwline_kube_wire::status::text_response;
use throwline_tunnel::line::LineError;
use throwline_tunnel::proto::messages::RefusalCode;
use throwline_tunnel::proto::origin;

use crate::failure::Failure;
use crate::request::body::{self, Body};
use crate::request::route::RouteError;
use crate::text::one_line;

/// `reason` is one of Kubernetes' `StatusReason`s: client-go decides by it, not by the code. A relay's own
/// text names its origin already.
fn new(code: StatusCode, reason: &'static str, message: &str) -> Status {
    let message = one_line(message);
    let message = match message.starts_with(origin::RELAY) {
        true => message,
        false => format!("throwline proxy: {message}"),
    };
    Status::new(code, reason, message)
}

fn unavailable(message: &str) -> Status {
    new(
        StatusCode::SERVICE_UNAVAILABLE,
        "ServiceUnavailable",
        message,
    )
}

fn bad_request(message: &str) -> Status {
    new(StatusCode::BAD_REQUEST, "BadRequest", message)
}

/// The response, in the form that `audience` will show.
pub(crate) fn response(status: &Status, audience: Audience) -> Response<Body> {
    let mut response = match audience {
        Audience::Raw => text_response(StatusCode::BAD_GATEWAY, status.message.clone()),
        Audience::Decoding => status.response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(
        header::X_CONTENT_TYPE_OPTIONS,
        HeaderValue::from_static("nosniff"),
    );
    response.map(body::full)
}

/// How the client will read an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Audience {
    /// Decodes a `Status`.
    Decoding,
    /// Keeps the text only.
    Raw,
}

impl Audience {
    /// `path` is the one inside the cluster.
    pub(crate) fn of(path: &str, headers: &HeaderMap) -> Self {
        if keeps_text_only(path, headers) {
            Self::Raw
        } else {
            Self::Decoding
        }
    }
}

impl From<&Failure> for Status {
    fn from(failure: &Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Refused { refusal, .. } => match refusal.code() {
                RefusalCode::NotAllowed | RefusalCode::Revoked => {
                    new(StatusCode::FORBIDDEN, "Forbidden", &message)
                }
                RefusalCode::UnknownCluster => new(StatusCode::NOT_FOUND, "NotFound", &message),
                RefusalCode::Limit => {
                    new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", &message)
                }
                RefusalCode::Timeout => new(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message),
                RefusalCode::BadRequest => bad_request(&message),
                RefusalCode::Unauthenticated => {
                    new(StatusCode::UNAUTHORIZED, "Unauthorized", &message)
                }
                _ => unavailable(&message),
            },
            Failure::ClusterRevoked { .. } => new(StatusCode::FORBIDDEN, "Forbidden", &message),
            Failure::Revoked
            | Failure::CertificateExpired { .. }
            | Failure::RelayRefusesUs { .. }
            | Failure::AgentRefusesUs { .. } => {
                new(StatusCode::UNAUTHORIZED, "Unauthorized", &message)
            }
            Failure::Timeout { .. }
            | Failure::LineEnded {
                source: LineError::Expired { .. },
                ..
            } => new(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message),
            // Its agent, or the way there, has failed, and may be back in a moment.
            Failure::Lost { .. } => unavailable(&message),
            Failure::Ended { .. }
            | Failure::LineEnded { .. }
            | Failure::StreamEnded { .. }
            | Failure::Internal(_) => new(StatusCode::BAD_GATEWAY, "InternalError", &message),
            Failure::RelayUnreachable { .. }
            | Failure::RelayNotTrusted { .. }
            | Failure::SessionNotTrusted { .. }
            | Failure::Stopping => unavailable(&message),
        }
    }
}

/// The answer to a head that cannot be read.
pub(crate) fn malformed(error: &HeadError) -> Status {
    new(error.status(), error.reason(), &error.to_string())
}

impl From<&RouteError> for Status {
    fn from(error: &RouteError) -> Self {
        let message = error.to_string();
        match error {
            RouteError::NoCluster | RouteError::NotServed(_) => {
                new(StatusCode::NOT_FOUND, "NotFound", &message)
            }
            RouteError::ForeignHost(_) => {
                new(StatusCode::MISDIRECTED_REQUEST, "Forbidden", &message)
            }
            RouteError::Http10 => new(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "BadRequest",
                &message,
            ),
            RouteError::BadName(_)
            | RouteError::Form
            | RouteError::Bytes(_)
            | RouteError::Method
            | RouteError::HostsDiffer
            | RouteError::ConnectionNames(_) => bad_request(&message),
        }
    }
}

#[cfg(test)]
mod tests {
    use throwline_tunnel::proto::messages::Refusal;

    use super::*;

    fn refused(code: RefusalCode, message: &str, since_unix_ms: u64) -> Failure {
        Failure::Refused {
            cluster: "prod-eu".to_owned(),
            refusal: Refusal {
                code: code.into(),
                message: message.to_owned(),
                retry_after_ms: 0,
                since_unix_ms,
            },
        }
    }

    #[test]
    fn a_status_is_what_client_go_decodes() {
        let status = Status::from(&refused(RefusalCode::NotAllowed, "", 0));
        let json: serde_json::Value = serde_json::to_value(&status).unwrap();
        assert_eq!(
            json,
            serde_json::json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": "throwline proxy: you may not reach cluster prod-eu; ask an administrator for access",
                "reason": "Forbidden", "code": 403,
            })
        );
    }

    #[test]
    fn a_text_has_one_origin() {
        let message = "throwline relay: you have 3 lines open";
        let status = Status::from(&refused(RefusalCode::Limit, message, 0));
        assert_eq!(status.message, message);
        let status = Status::from(&refused(RefusalCode::Version, message, 0));
        assert!(
            status.message.starts_with("throwline proxy: ")
                && status.message.ends_with("(you have 3 lines open)"),
            "{}",
            status.message
        );
    }

    #[test]
    fn each_cause_has_a_message_of_its_own() {
        let codes = [
            RefusalCode::UnknownCluster,
            RefusalCode::NeverConnected,
            RefusalCode::Offline,
            RefusalCode::NotAllowed,
            RefusalCode::Limit,
            RefusalCode::Draining,
            RefusalCode::Version,
            RefusalCode::Timeout,
            RefusalCode::Unauthenticated,
            RefusalCode::BadRequest,
            RefusalCode::Internal,
        ];
        let messages: std::collections::HashSet<String> = codes
            .iter()
            .map(|code| Status::from(&refused(*code, "", 0)).message)
            .collect();
        assert_eq!(messages.len(), codes.len());
    }

    #[test]
    fn a_peers_words_cannot_break_the_line_or_the_quotes() {
        let status = Status::from(&refused(
            RefusalCode::Limit,
            "a\"b\n\u{1b}[31mc\\\u{2028}d",
            0,
        ));
        assert!(
            status.message.ends_with("(a'b  [31mc/ d)"),
            "{}",
            status.message
        );
        let long = Status::from(&refused(RefusalCode::Limit, &"x".repeat(100_000), 0));
        assert!(long.message.len() < 4096);
    }

    #[test]
    fn discovery_gets_text_under_a_code_whose_text_kubectl_shows() {
        let none = HeaderMap::new();
        assert_eq!(Audience::of("/api?timeout=32s", &none), Audience::Raw);
        assert_eq!(
            Audience::of("/openapi/v3/apis/apps/v1", &none),
            Audience::Raw
        );
        assert_eq!(
            Audience::of("/api/v1/namespaces/d/pods", &none),
            Audience::Decoding
        );
        assert_eq!(
            Audience::of("/apis/apps/v1/deployments", &none),
            Audience::Decoding
        );
        let mut headers = HeaderMap::new();
        headers.insert(
            header::ACCEPT,
            HeaderValue::from_static("application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"),
        );
        assert_eq!(Audience::of("/anything", &headers), Audience::Raw);

        let status = Status::from(&refused(RefusalCode::UnknownCluster, "", 0));
        let raw = response(&status, Audience::Raw);
        assert_eq!(raw.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(
            raw.headers()[header::CONTENT_TYPE],
            "text/plain; charset=utf-8"
        );
        let response = super::response(&status, Audience::Decoding);
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    }
}
