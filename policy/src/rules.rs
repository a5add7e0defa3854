//! What of a user's request may reach the API server: a pure function from a request's head to
//! either the head to forward or a refusal. No I/O, no clock, no state.
//!
//! The order is that of the dangers: framing first (two parsers must not see two requests), then
//! the connection's own headers, then the path, then who the request claims to be; the identity of
//! the verified certificate is set last, onto headers which no longer say anything about identity.

use http::header::{CONNECTION, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Version};
use throwline_kube_wire::Status;
use throwline_kube_wire::headers::Upgrade;
use throwline_kube_wire::http1::target::Target;

mod headers;
mod identity;
mod path;
mod reader;
#[cfg(test)]
mod tests;

pub use headers::AUDIT_ID;
pub use identity::{CREDENTIAL_EXTRA, User};
pub use path::target_of;

use reader::Reader;

/// A head which may be forwarded: hop-by-hop headers gone, identity set, the target's bytes as they
/// came, but for those that a workload may be sent and that have no place in a target.
#[derive(Debug)]
pub struct Forward {
    /// How the request is carried.
    pub kind: Kind,
    /// As it came.
    pub method: Method,
    /// The path and the query.
    pub target: Target,
    /// The headers that may reach the API server, and those of the impersonation.
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

/// Applies the rules to one request.
///
/// ```
/// use http::Request;
/// use throwline_policy::rules::{self, User};
///
/// let user = User { name: "dana".to_owned(), ..User::default() };
/// let request = Request::get("/api/v1/namespaces/shop/pods").header("Connection", "close");
/// let (head, ()) = request.body(()).unwrap().into_parts();
/// let forward = rules::apply(&head, &user).unwrap();
/// assert_eq!(forward.headers["impersonate-user"], "dana");
/// assert!(!forward.headers.contains_key("connection"));
///
/// // A client does not choose the user.
/// let request = Request::get("/version").header("Impersonate-User", "admin");
/// let (head, ()) = request.body(()).unwrap().into_parts();
/// assert_eq!(rules::apply(&head, &user).unwrap_err().code, 403);
/// ```
///
/// # Errors
/// 400 for what two HTTP parsers could read differently, 403 for what this user may not say,
/// 405 for methods that are about connections rather than resources.
pub fn apply(head: &Parts, user: &User) -> Result<Forward, Status> {
    if matches!(head.method, Method::CONNECT | Method::TRACE) {
        return Err(Status::method_not_allowed(format!(
            "the method {} does not pass through throwline",
            head.method
        )));
    }
    headers::check_framing(&head.headers, head.version)?;
    let named = headers::named_by_connection(&head.headers)?;
    let target = path::check(head)?;
    let reader = match target.is_workload() {
        true => Reader::Workload,
        false => Reader::ApiServer,
    };
    headers::check_names(&head.headers, reader)?;
    identity::refuse_impersonation(&head.headers, user)?;

    let kind = upgrade_of(head)?;
    let mut headers = headers::forwardable(&head.headers, &named, reader);
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

/// An upgrade is one only on HTTP/1.1, to one of the two protocols that Kubernetes speaks; anything else
/// is a plain request without those headers.
fn upgrade_of(head: &Parts) -> Result<Kind, Status> {
    let protocol = head.headers.get(UPGRADE);
    let (Version::HTTP_11, Some(_), Some(protocol)) =
        (head.version, Upgrade::of(&head.headers), protocol)
    else {
        return Ok(Kind::Plain);
    };
    // A body before the switch would leave its end to be found by two parsers.
    if headers::announces_body(&head.headers) {
        return Err(Status::bad_request(
            "a request that upgrades its connection must not have a body",
        ));
    }
    Ok(Kind::Upgrade(protocol.clone()))
}
