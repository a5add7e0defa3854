//! Header rules: framing that has two readings, names that have two spellings, and what belongs to
//! a connection instead of a request.

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, COOKIE, EXPECT, HOST, SEC_WEBSOCKET_PROTOCOL,
    TRANSFER_ENCODING,
};
use http::{HeaderMap, HeaderName, HeaderValue, Version};

use super::Refusal;

/// Headers of a connection (RFC 9110, section 7.6.1), which a proxy does not pass on.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "http2-settings",
];

/// A bearer token in the guise of a WebSocket sub-protocol, as browsers send it to Kubernetes.
const BEARER_SUBPROTOCOL: &str = "base64url.bearer.authorization.k8s.io.";

/// Refuses framing which two parsers could read in two ways (request smuggling).
pub(super) fn check_framing(headers: &HeaderMap, version: Version) -> Result<(), Refusal> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = lengths.next();
    if lengths.next().is_some() {
        return Err(Refusal::bad_request(
            "the request has more than one content-length",
        ));
    }
    if length.is_some_and(|length| {
        length.is_empty() || !length.as_bytes().iter().all(u8::is_ascii_digit)
    }) {
        return Err(Refusal::bad_request("the content-length is not a number"));
    }
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        if length.is_some() {
            return Err(Refusal::bad_request(
                "the request has both a content-length and a transfer-encoding",
            ));
        }
        let chunked = encoding.as_bytes().eq_ignore_ascii_case(b"chunked");
        if version != Version::HTTP_11 || !chunked || encodings.next().is_some() {
            return Err(Refusal::bad_request(
                "the only transfer-encoding that passes is one \"chunked\" on HTTP/1.1",
            ));
        }
    }
    if headers.get_all(HOST).iter().count() > 1 {
        return Err(Refusal::bad_request("the request has more than one host"));
    }
    Ok(())
}

/// The header names that `Connection` declares to be hop-by-hop.
///
/// A client must not use it to have a header removed by which the request is understood
/// (CVE-2021-31999, CVE-2022-23652, CVE-2025-48865).
pub(super) fn named_by_connection(headers: &HeaderMap) -> Result<Vec<HeaderName>, Refusal> {
    if headers
        .get_all(CONNECTION)
        .iter()
        .any(|value| value.to_str().is_err())
    {
        return Err(Refusal::bad_request("the connection header is not ASCII"));
    }
    let mut named = Vec::new();
    for token in tokens(headers, &CONNECTION) {
        let Ok(name) = HeaderName::from_bytes(token.as_bytes()) else {
            return Err(Refusal::bad_request(
                "the connection header names something that is no header",
            ));
        };
        let plain = name.as_str().replace('_', "-");
        let protected = is_identity(&plain)
            || matches!(
                plain.as_str(),
                "authorization" | "host" | "content-length" | "transfer-encoding"
            );
        if protected {
            return Err(Refusal::bad_request(format!(
                "the connection header must not name {name}"
            )));
        }
        named.push(name);
    }
    Ok(named)
}

/// Refuses names with `_`, which CGI-like back ends read as `-`.
pub(super) fn check_names(headers: &HeaderMap) -> Result<(), Refusal> {
    match headers.keys().find(|name| name.as_str().contains('_')) {
        Some(name) => Err(Refusal::bad_request(format!(
            "header names with \"_\" do not pass: {name}"
        ))),
        None => Ok(()),
    }
}

/// A copy without what belongs to the connection, to a proxy or to an identity.
pub(super) fn forwardable(headers: &HeaderMap, named: &[HeaderName]) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len() + 8);
    for (name, value) in headers {
        if is_dropped(name) || named.contains(name) {
            continue;
        }
        if name == SEC_WEBSOCKET_PROTOCOL {
            if let Some(value) = without_bearer(value) {
                kept.append(name, value);
            }
            continue;
        }
        kept.append(name, value.clone());
    }
    kept
}

/// Whether the header says who is asking, to the API server or to a front proxy of it.
pub(super) fn is_identity(name: &str) -> bool {
    name.starts_with("impersonate-") || name.starts_with("x-remote-")
}

/// The comma-separated members of all headers of that name; those which are not text are skipped.
pub(super) fn tokens<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|token| !token.is_empty())
}

/// Whether the head announces a body.
pub(super) fn announces_body(headers: &HeaderMap) -> bool {
    let length = headers
        .get(CONTENT_LENGTH)
        .is_some_and(|length| length.as_bytes().iter().any(|digit| *digit != b'0'));
    length || headers.contains_key(TRANSFER_ENCODING)
}

fn is_dropped(name: &HeaderName) -> bool {
    let text = name.as_str();
    HOP_BY_HOP.contains(&text)
        || is_identity(text)
        // Ours alone: the agent's own authority and its own credentials are put in their place.
        || *name == AUTHORIZATION
        || *name == COOKIE
        || *name == HOST
        // hyper has answered it by the time that the body is read.
        || *name == EXPECT
        || text.starts_with("proxy-")
        || text.starts_with("x-forwarded-")
        || text == "forwarded"
        || text == "x-real-ip"
}

/// The header without bearer tokens: untouched when there are none, gone when nothing else is in it.
fn without_bearer(value: &HeaderValue) -> Option<HeaderValue> {
    let is_bearer = |token: &[u8]| {
        let start = token.trim_ascii_start();
        start.len() >= BEARER_SUBPROTOCOL.len()
            && start[..BEARER_SUBPROTOCOL.len()].eq_ignore_ascii_case(BEARER_SUBPROTOCOL.as_bytes())
    };
    let members = || value.as_bytes().split(|byte| *byte == b',');
    if !members().any(is_bearer) {
        return Some(value.clone());
    }
    let kept = members()
        .filter(|token| !is_bearer(token))
        .map(<[u8]>::trim_ascii)
        .collect::<Vec<_>>()
        .join(&b", "[..]);
    if kept.is_empty() {
        None
    } else {
        HeaderValue::from_bytes(&kept).ok()
    }
}
