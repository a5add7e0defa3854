//! Path rules. The API server authorizes by the decoded path; so that nothing between can read it
//! differently, whatever decodes to other than itself in a path's structure is refused, and the
//! bytes forwarded are those that came.

use http::request::Parts;
use http::uri::PathAndQuery;
use http::{Uri, Version};
use throwline_kube_wire::Status;
use throwline_kube_wire::http1::target::{Target, workload_part};
use throwline_kube_wire::path::segments;

/// The target of a request: the one that was too long for its [`Uri`], else the [`Uri`]'s.
pub fn target_of(head: &Parts) -> &str {
    match head.extensions.get::<Target>() {
        Some(long) => long.as_str(),
        None => target_in(&head.uri),
    }
}

/// `path()` would call a missing path "/": HTTP/2 allows no target but a path here (RFC 9113, section
/// 8.3.1), and an API server would be sent "?a=b".
fn target_in(uri: &Uri) -> &str {
    uri.path_and_query().map_or("", PathAndQuery::as_str)
}

/// Checks the request target and gives back the bytes to forward.
pub(super) fn check(head: &Parts) -> Result<Target, Status> {
    let uri = &head.uri;
    // HTTP/2 carries scheme and authority apart; in HTTP/1.1 they mean a request to a forward proxy.
    let absolute = uri.scheme().is_some() || uri.authority().is_some();
    if absolute && head.version != Version::HTTP_2 {
        return Err(Status::bad_request("the request target must be a path"));
    }
    if uri.path_and_query().is_none() {
        return Err(Status::bad_request("the request has no path"));
    }
    let target = match head.extensions.get::<Target>() {
        Some(long) => long.clone(),
        None => Target::read(target_in(uri).as_bytes(), 0)
            .map_err(|error| Status::bad_request(error.to_string()))?,
    };
    let path = target.path();
    let end = workload_part(path).unwrap_or(path.len());
    segments(&path[..end], end < path.len())
        .map_err(|error| Status::bad_request(error.to_string()))?;
    Ok(target)
}
