//! What of a user's request may reach the API server: a pure function from a request's head to
//! either the head to forward or a refusal. No I/O, no clock, no state.
//!
//! The order is that of the dangers: framing first (two parsers must not see two requests), then
//! the connection's own headers, then the path, then who the request claims to be; the identity of
//! the verified certificate is set last, onto headers which no longer say anything about identity.

use http::header::{CONNECTION, UPGRADE};
use http::request::Parts;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, StatusCode, Version};

mod headers;
mod identity;
mod path;
#[cfg(test)]
mod tests;

pub(crate) use identity::CREDENTIAL_EXTRA;
pub use identity::User;
pub(crate) use path::decoded_segment;

/// A head which may be forwarded: hop-by-hop headers gone, identity set, the target's bytes as they came.
#[derive(Debug)]
pub struct Forward {
    pub kind: Kind,
    pub method: Method,
    pub target: PathAndQuery,
    pub headers: HeaderMap,
}

/// How the request is carried to the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// On a pooled connection.
    Plain,
    /// On a fresh HTTP/1.1 connection which is never used again.
    Upgrade(HeaderValue),
}

/// A refusal in the words of Kubernetes, so that kubectl prints its message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    pub reason: &'static str,
    pub message: String,
}

impl Refusal {
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            reason: "BadRequest",
            message: message.into(),
        }
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::FORBIDDEN,
            reason: "Forbidden",
            message: message.into(),
        }
    }

    fn method_not_allowed(method: &Method) -> Self {
        Self {
            status: StatusCode::METHOD_NOT_ALLOWED,
            reason: "MethodNotAllowed",
            message: format!(
                "the method {} does not pass through throwline",
                method.as_str()
            ),
        }
    }
}

/// Decides one request.
///
/// # Errors
/// 400 for what two HTTP parsers could read differently, 403 for what this user may not say,
/// 405 for methods that are about connections rather than resources.
pub fn decide(head: &Parts, user: &User) -> Result<Forward, Refusal> {
    if matches!(head.method, Method::CONNECT | Method::TRACE) {
        return Err(Refusal::method_not_allowed(&head.method));
    }
    headers::check_framing(&head.headers, head.version)?;
    let named = headers::named_by_connection(&head.headers)?;
    headers::check_names(&head.headers)?;
    let target = path::check(&head.uri, head.version)?;
    identity::refuse_impersonation(&head.headers, user)?;

    let kind = upgrade_of(head)?;
    let mut headers = headers::forwardable(&head.headers, &named);
    if let Kind::Upgrade(protocol) = &kind {
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, protocol.clone());
    }
    identity::set(&mut headers, user)?;
    Ok(Forward {
        kind,
        method: head.method.clone(),
        target,
        headers,
    })
}

/// An upgrade is one only on HTTP/1.1, when `Connection` says so, to one of the two protocols that
/// Kubernetes speaks; anything else is a plain request without those headers.
fn upgrade_of(head: &Parts) -> Result<Kind, Refusal> {
    let asked = head.version == Version::HTTP_11
        && headers::tokens(&head.headers, &CONNECTION)
            .any(|token| token.eq_ignore_ascii_case("upgrade"));
    let mut protocols = head.headers.get_all(UPGRADE).iter();
    let (true, Some(protocol), None) = (asked, protocols.next(), protocols.next()) else {
        return Ok(Kind::Plain);
    };
    let known = [&b"websocket"[..], b"spdy/3.1"]
        .iter()
        .any(|name| protocol.as_bytes().eq_ignore_ascii_case(name));
    if !known {
        return Ok(Kind::Plain);
    }
    // A body before the switch would leave its end to be found by two parsers.
    if headers::announces_body(&head.headers) {
        return Err(Refusal::bad_request(
            "a request that upgrades its connection must not have a body",
        ));
    }
    Ok(Kind::Upgrade(protocol.clone()))
}
