//! The one place where this crate turns its errors into HTTP.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER, SEC_WEBSOCKET_PROTOCOL};
use http::{HeaderValue, Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;
use throwline_tunnel::proto::origin;

pub type Body = Full<Bytes>;

/// The body of every error.
#[derive(Debug, Serialize)]
struct Problem<'a> {
    code: &'a str,
    message: &'a str,
}

/// An answer in JSON.
pub(crate) fn json<T: Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    // Our own structs of strings and numbers always serialise.
    let body = serde_json::to_vec(value).unwrap_or_default();
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// An error; `message` begins with its origin on the wire.
pub(crate) fn problem(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let message = &origin::mark(origin::RELAY, message);
    json(status, &Problem { code, message })
}

/// The time after which to try again, for 429 and 503: whole seconds, at least one.
pub(crate) fn retry_after(mut response: Response<Body>, after: Duration) -> Response<Body> {
    let seconds = after.as_millis().div_ceil(1000).max(1);
    if let Ok(value) = HeaderValue::from_str(&seconds.to_string()) {
        response.headers_mut().insert(RETRY_AFTER, value);
    }
    response
}

pub(crate) fn upgrade_required(versions: &'static str) -> Response<Body> {
    let mut response = problem(
        StatusCode::UPGRADE_REQUIRED,
        "version",
        "this relay speaks none of the offered protocols; those in Sec-WebSocket-Protocol it does",
    );
    let headers = response.headers_mut();
    headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(versions));
    headers.insert(http::header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(
        http::header::CONNECTION,
        HeaderValue::from_static("upgrade"),
    );
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_rounded_up_to_whole_seconds() {
        let busy = || problem(StatusCode::SERVICE_UNAVAILABLE, "limit", "busy");
        let header = |after| retry_after(busy(), after).headers()[RETRY_AFTER].clone();
        assert_eq!(header(Duration::ZERO), "1");
        assert_eq!(header(Duration::from_millis(1001)), "2");
    }
}
