//! Our own errors as kubectl shows them: the one file that makes HTTP responses out of errors.
//!
//! A Kubernetes `Status` object is what client-go prints as its own words. There is one exception:
//! discovery keeps the text only, quoted with `%q`. So discovery gets that, and messages hold no `"`.

use crate::{
    body::{self, Body},
    error::{Failure, rfc3339},
    route::RouteError,
};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use serde::Serialize;
use std::time::{Duration, SystemTime};
use throwline_tunnel::http1::discovery::keeps_text_only;
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};

/// The part of `meta/v1.Status` that an error needs.
#[derive(Debug, Serialize)]
pub struct Status {
    kind: &'static str,
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    metadata: Empty,
    status: &'static str,
    pub message: String,
    pub reason: &'static str,
    pub code: u16,
}

#[derive(Debug, Serialize)]
struct Empty {}

impl Status {
    /// `reason` is one of Kubernetes' `StatusReason`s: client-go decides by it, not by the code.
    fn new(code: StatusCode, reason: &'static str, message: &str) -> Self {
        Self {
            kind: "Status",
            api_version: "v1",
            metadata: Empty {},
            status: "Failure",
            message: format!("throwline: {}", plain(message)),
            reason,
            code: code.as_u16(),
        }
    }

    fn unavailable(message: &str) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "ServiceUnavailable",
            message,
        )
    }

    pub(crate) fn bad_request(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "BadRequest", message)
    }

    pub(crate) fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The response, in the form that `audience` will show.
    pub(crate) fn response(&self, audience: Audience) -> Response<Body> {
        let (code, content_type, bytes) = match audience {
            Audience::Raw => (
                StatusCode::BAD_GATEWAY,
                "text/plain; charset=utf-8",
                self.message.clone().into_bytes(),
            ),
            Audience::Decoding => (
                StatusCode::from_u16(self.code).unwrap_or(StatusCode::SERVICE_UNAVAILABLE),
                "application/json",
                self.json(),
            ),
        };
        let mut response = Response::new(body::full(bytes));
        *response.status_mut() = code;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        response
    }
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
                RefusalCode::NotAllowed => Self::new(StatusCode::FORBIDDEN, "Forbidden", &message),
                RefusalCode::UnknownCluster => {
                    Self::new(StatusCode::NOT_FOUND, "NotFound", &message)
                }
                RefusalCode::Limit => {
                    Self::new(StatusCode::TOO_MANY_REQUESTS, "TooManyRequests", &message)
                }
                RefusalCode::Timeout => Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message),
                RefusalCode::BadRequest => Self::bad_request(&message),
                RefusalCode::Unauthenticated => {
                    Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", &message)
                }
                _ => Self::unavailable(&message),
            },
            Failure::CertificateExpired { .. }
            | Failure::RelayRefusesUs { .. }
            | Failure::AgentRefusesUs { .. } => {
                Self::new(StatusCode::UNAUTHORIZED, "Unauthorized", &message)
            }
            Failure::Timeout { .. } | Failure::Expired { .. } => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "Timeout", &message)
            }
            Failure::Lost { .. } | Failure::Ended { .. } | Failure::Internal(_) => {
                Self::new(StatusCode::BAD_GATEWAY, "InternalError", &message)
            }
            Failure::RelayUnreachable { .. }
            | Failure::RelayNotTrusted { .. }
            | Failure::SessionNotTrusted { .. }
            | Failure::Stopping => Self::unavailable(&message),
        }
    }
}

impl From<&RouteError> for Status {
    fn from(error: &RouteError) -> Self {
        let message = error.to_string();
        match error {
            RouteError::NoCluster | RouteError::NotServed(_) => {
                Self::new(StatusCode::NOT_FOUND, "NotFound", &message)
            }
            RouteError::ForeignHost(_) => {
                Self::new(StatusCode::MISDIRECTED_REQUEST, "Forbidden", &message)
            }
            RouteError::Http10 => Self::new(
                StatusCode::HTTP_VERSION_NOT_SUPPORTED,
                "BadRequest",
                &message,
            ),
            RouteError::BadName(_)
            | RouteError::Form
            | RouteError::Method
            | RouteError::HostsDiffer
            | RouteError::ConnectionNames(_) => Self::bad_request(&message),
        }
    }
}

/// A refusal in words that name the cluster, the state it is in and who can change it.
pub(crate) fn refusal_message(cluster: &str, refusal: &Refusal, now: SystemTime) -> String {
    let code = refusal.code();
    let text = match code {
        RefusalCode::UnknownCluster => format!(
            "there is no cluster {cluster} at this relay; 'throwline clusters' shows those you can reach"
        ),
        RefusalCode::NeverConnected => format!(
            "cluster {cluster} is known, but its agent has never connected; start 'throwline agent' in it"
        ),
        RefusalCode::Offline => match since(refusal, now) {
            Some(since) => {
                format!("cluster {cluster} is offline since {since}: its agent is not connected")
            }
            None => format!("cluster {cluster} is offline: its agent is not connected"),
        },
        RefusalCode::InstanceGone => format!(
            "the agent of cluster {cluster} was restarted or replaced, and what ran through the old one has ended; run the command again"
        ),
        RefusalCode::NotAllowed => {
            format!("you may not reach cluster {cluster}; ask an administrator for access")
        }
        RefusalCode::Limit => format!("a limit was reached on the way to cluster {cluster}"),
        RefusalCode::Draining => {
            format!("the relay is restarting; try cluster {cluster} again in a moment")
        }
        RefusalCode::Version | RefusalCode::Unsupported => {
            format!(
                "this throwline and the one at cluster {cluster} or its relay do not understand each other; update the older"
            )
        }
        RefusalCode::Timeout => format!("the agent of cluster {cluster} did not answer in time"),
        RefusalCode::Unauthenticated => {
            "the relay no longer accepts your identity; run 'throwline login' with a new token"
                .to_owned()
        }
        RefusalCode::BadRequest => format!("the request for cluster {cluster} was not understood"),
        RefusalCode::Internal | RefusalCode::Unspecified => {
            format!(
                "cluster {cluster} cannot be reached because of a fault at the relay or the agent"
            )
        }
    };
    // What the peer adds is only shown where it says more than the code does.
    let adds = matches!(
        code,
        RefusalCode::NotAllowed
            | RefusalCode::Limit
            | RefusalCode::Version
            | RefusalCode::Unsupported
            | RefusalCode::BadRequest
            | RefusalCode::Internal
            | RefusalCode::Unspecified
    );
    if adds && !refusal.message.is_empty() {
        format!("{text} ({})", plain(&refusal.message))
    } else {
        text
    }
}

fn since(refusal: &Refusal, now: SystemTime) -> Option<String> {
    let since = Duration::from_millis(refusal.since_unix_ms);
    if since.is_zero() {
        return None;
    }
    let at = SystemTime::UNIX_EPOCH.checked_add(since)?;
    // A clock of theirs that is ahead of ours makes no age.
    let age = now.duration_since(at).ok()?.as_secs();
    let age = match age {
        0..60 => format!("{age} s"),
        60..3600 => format!("{} min", age / 60),
        3600..172_800 => format!("{} h", age / 3600),
        _ => format!("{} days", age / 86_400),
    };
    Some(format!("{} ({age} ago)", rfc3339(at)))
}

/// One line without quotes: client-go puts some messages through `%q`, and a terminal shows them.
fn plain(message: &str) -> String {
    const MAX: usize = 1024;
    message
        .chars()
        .take(MAX)
        .map(|c| match c {
            '"' => '\'',
            '\\' => '/',
            '\u{2028}' | '\u{2029}' => ' ',
            c if c.is_control() => ' ',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
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
                "message": "throwline: you may not reach cluster prod-eu; ask an administrator for access",
                "reason": "Forbidden", "code": 403,
            })
        );
    }

    #[test]
    fn offline_says_since_when_and_for_how_long() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let refusal = Refusal {
            code: RefusalCode::Offline.into(),
            message: String::new(),
            retry_after_ms: 0,
            since_unix_ms: 1_799_992_800_000,
        };
        assert_eq!(
            refusal_message("prod-eu", &refusal, now),
            "cluster prod-eu is offline since 2027-01-15T06:00:00Z (2 h ago): its agent is not connected"
        );
        let unknown = Refusal {
            since_unix_ms: 0,
            ..refusal.clone()
        };
        assert_eq!(
            refusal_message("prod-eu", &unknown, now),
            "cluster prod-eu is offline: its agent is not connected"
        );
        let absurd = Refusal {
            since_unix_ms: u64::MAX,
            ..refusal
        };
        assert!(!refusal_message("prod-eu", &absurd, now).contains("since"));
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
        let response = status.response(Audience::Raw);
        assert_eq!(response.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(
            response.headers()[header::CONTENT_TYPE],
            "text/plain; charset=utf-8"
        );
        let response = status.response(Audience::Decoding);
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    }
}
