//! Path rules. The API server authorizes by the decoded path; so that nothing between can read it
//! differently, whatever decodes to other than itself in a path's structure is refused, and the
//! bytes forwarded are those that came.

use http::uri::PathAndQuery;
use http::{Uri, Version};

use super::Refusal;

/// Checks the request target and gives back the very bytes to forward.
pub(super) fn check(uri: &Uri, version: Version) -> Result<PathAndQuery, Refusal> {
    // HTTP/2 carries scheme and authority apart; in HTTP/1.1 they mean a request to a forward proxy.
    let absolute = uri.scheme().is_some() || uri.authority().is_some();
    if absolute && version != Version::HTTP_2 {
        return Err(Refusal::bad_request("the request target must be a path"));
    }
    let Some(target) = uri.path_and_query() else {
        return Err(Refusal::bad_request("the request has no path"));
    };
    // The bytes that are forwarded, not `path()`, which calls a missing path "/": HTTP/2 allows no
    // target but a path here (RFC 9113 section 8.3.1), and an API server would be sent "?a=b".
    if !target.as_str().starts_with('/') {
        return Err(Refusal::bad_request("the request target must be a path"));
    }
    let path = target.path();
    let end = structured_part(path);
    check_structure(&path[..end], end < path.len())?;
    if !target.as_str().bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Refusal::bad_request(
            "the request target holds bytes that must be percent-encoded",
        ));
    }
    Ok(target.clone())
}

/// Where the API server's own part of the path ends: at the `proxy` subresource of a pod, a service
/// or a node, behind which the path belongs to the workload.
fn structured_part(path: &str) -> usize {
    let segments: Vec<&str> = path.split('/').skip(1).take(7).collect();
    let before = match segments.as_slice() {
        [
            "api",
            "v1",
            "namespaces",
            _,
            "pods" | "services",
            _,
            "proxy",
            ..,
        ] => 7,
        ["api", "v1", "nodes", _, "proxy", ..] => 5,
        _ => return path.len(),
    };
    segments[..before]
        .iter()
        .map(|segment| segment.len() + 1)
        .sum()
}

fn check_structure(path: &str, has_suffix: bool) -> Result<(), Refusal> {
    let mut segments = path.split('/').skip(1).peekable();
    while let Some(segment) = segments.next() {
        let is_last = segments.peek().is_none() && !has_suffix;
        if segment.is_empty() && !is_last {
            return Err(Refusal::bad_request("the path has an empty segment"));
        }
        let Some(decoded) = decode(segment) else {
            return Err(Refusal::bad_request(
                "the path has a broken percent-encoding",
            ));
        };
        if decoded == b"." || decoded == b".." {
            return Err(Refusal::bad_request(
                "the path has a \".\" or \"..\" segment",
            ));
        }
        let separator = |byte: &u8| matches!(byte, b'/' | b'\\' | b'%') || byte.is_ascii_control();
        if decoded.iter().any(separator) {
            return Err(Refusal::bad_request(
                "the path hides a separator, a percent sign or a control character",
            ));
        }
    }
    Ok(())
}

/// Percent-decoding, once; `None` for a `%` without two hexadecimal digits behind it.
fn decode(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            out.push(byte);
            continue;
        }
        let high = char::from(bytes.next()?).to_digit(16)?;
        let low = char::from(bytes.next()?).to_digit(16)?;
        out.push(u8::try_from(high * 16 + low).ok()?);
    }
    Some(out)
}

/// A segment as a person reads it; what cannot be decoded stays as it came.
pub(crate) fn decoded_segment(segment: &str) -> String {
    match decode(segment) {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => segment.to_owned(),
    }
}
