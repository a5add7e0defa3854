//! A request to the API server: verb, resource, name. The strict reading, for decisions.
//!
//! Both readings follow `RequestInfoFactory.NewRequestInfo` of k8s.io/apiserver and share its rules
//! (`read`). [`RequestInfo::parse`] is the one to decide by: what it cannot read as the API server will,
//! it rejects. [`AuditAttributes`](crate::audit::AuditAttributes) never fails, because rejected requests
//! are audited too, and so must decide nothing.

use std::collections::BTreeSet;

use http::Method;
use serde::Serialize;

use crate::http1::target::workload_part;
use crate::path::{self, PathError};
use crate::percent;

/// The resource of a request, as `objectRef` of `audit.k8s.io/v1` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRef {
    /// In the plural, as in the path: `pods`.
    pub resource: String,
    /// Empty for resources of the whole cluster and for lists over all namespaces.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Empty for a collection, unless a field selector names the one object.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// Empty for the core group.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub api_group: String,
    /// `v1`, for instance.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub api_version: String,
    /// `exec`, `log`, `scale`, and so on.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subresource: String,
}

/// A request that has one reading, the API server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestInfo {
    /// Of Kubernetes: `get`, `list`, `watch`, `create`, `deletecollection`, and so on. For requests that
    /// are not about a resource, the method in lower case.
    pub verb: &'static str,
    /// The path, decoded, as rules for paths (`nonResourceURLs`) are compared with; without what a workload
    /// behind a `proxy` subresource reads.
    pub path: String,
    /// `None` for requests that are not about a resource, such as `/version`.
    pub object: Option<ObjectRef>,
    /// What follows the subresource. Kubernetes gives it no meaning, but a server behind an `APIService`
    /// may; empty for a workload's part of the path.
    pub rest: Vec<String>,
}

/// Why a request has no reading to decide by. The client is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestInfoError {
    /// It is none that the API server maps to a verb.
    #[error("the method is none of those that Kubernetes has")]
    Method,
    /// It does not begin with `/`.
    #[error("the request target must be a path")]
    Form,
    /// Its structure can be read in two ways.
    #[error(transparent)]
    Path(#[from] PathError),
    /// `/api/v1/watch` and `/api/v1/proxy`.
    #[error("the path names no resource")]
    NoResource,
    /// A part of it has bytes that no name of that kind has.
    #[error("the path's {0} is no name of Kubernetes")]
    Name(&'static str),
    /// It decides the verb or the name, and is malformed or there twice.
    #[error("the query's {0} cannot be read, or is there twice")]
    Query(&'static str),
}

impl RequestInfo {
    /// Reads a request as the API server will.
    ///
    /// ```
    /// use http::Method;
    /// use throwline_kube_wire::RequestInfo;
    ///
    /// let path = "/api/v1/namespaces/shop/pods/web-0/exec";
    /// let info = RequestInfo::parse(&Method::POST, path, Some("command=date")).unwrap();
    /// assert_eq!(info.verb, "create");
    /// let object = info.object.unwrap();
    /// assert_eq!((object.resource.as_str(), object.subresource.as_str()), ("pods", "exec"));
    ///
    /// // Two readings are none.
    /// assert!(RequestInfo::parse(&Method::GET, "/api/v1/pods/%2e%2e/secrets", None).is_err());
    /// ```
    ///
    /// # Errors
    /// [`RequestInfoError`], for whatever could be read in another way.
    pub fn parse(
        method: &Method,
        path: &str,
        query: Option<&str>,
    ) -> Result<Self, RequestInfoError> {
        let plain_verb = plain_verb(method).ok_or(RequestInfoError::Method)?;
        if !path.starts_with('/') {
            return Err(RequestInfoError::Form);
        }
        let end = workload_part(path).unwrap_or(path.len());
        let segments = path::segments(&path[..end], end < path.len())?
            .into_iter()
            .map(|segment| String::from_utf8(segment).map_err(|_| RequestInfoError::Name("text")))
            .collect::<Result<Vec<_>, _>>()?;
        let decoded = segments.iter().fold(String::new(), |mut path, segment| {
            path.push('/');
            path.push_str(segment);
            path
        });
        // The API server trims slashes; within the path there is no empty segment any more.
        let segments: Vec<&str> = segments
            .iter()
            .map(String::as_str)
            .filter(|segment| !segment.is_empty())
            .collect();
        let Some((group, version, parts)) = resource_path(&segments) else {
            return Ok(Self {
                verb: plain_verb,
                path: decoded,
                object: None,
                rest: Vec::new(),
            });
        };
        if matches!(parts, ["watch" | "proxy"]) {
            return Err(RequestInfoError::NoResource);
        }
        if resource_verb(method).is_empty() {
            return Err(RequestInfoError::Method);
        }
        let (verb, object, rest) = read(method, group, version, parts, || {
            Selection::parse(query.unwrap_or_default())
        })?;
        check_names(&object)?;
        Ok(Self {
            verb,
            path: decoded,
            object: Some(object),
            rest: rest.iter().map(|&segment| segment.to_owned()).collect(),
        })
    }

    /// The verb to decide by: a WebSocket exec is a GET, but it does what `create` does.
    #[must_use]
    pub fn effective_verb(&self) -> &str {
        effective_verb(self.verb, self.object.as_ref())
    }
}

/// See [`RequestInfo::effective_verb`].
pub(crate) fn effective_verb<'a>(verb: &'a str, object: Option<&ObjectRef>) -> &'a str {
    match object {
        Some(object) if is_connect(&object.subresource) && verb == "get" => "create",
        _ => verb,
    }
}

/// Subresources whose requests become a connection to a workload.
pub(crate) fn is_connect(subresource: &str) -> bool {
    matches!(subresource, "exec" | "attach" | "portforward" | "proxy")
}

/// Group, version and what follows them, of a path to a resource.
pub(crate) fn resource_path<'a>(
    segments: &'a [&'a str],
) -> Option<(&'a str, &'a str, &'a [&'a str])> {
    match segments {
        ["api", version, rest @ ..] if !rest.is_empty() => Some(("", version, rest)),
        ["apis", group, version, rest @ ..] if !rest.is_empty() => Some((group, version, rest)),
        _ => None,
    }
}

/// Verb and object of a path to a resource, as `NewRequestInfo` has them, and what follows the subresource.
/// `selection` is asked where the query counts: for a GET without a name.
pub(crate) fn read<'a, E>(
    method: &Method,
    group: &str,
    version: &str,
    parts: &'a [&'a str],
    selection: impl FnOnce() -> Result<Selection, E>,
) -> Result<(&'static str, ObjectRef, &'a [&'a str]), E> {
    // The old forms with the verb in the path, `/api/v1/watch/pods`.
    let (verb, parts) = match parts {
        ["watch", more @ ..] if !more.is_empty() => ("watch", more),
        ["proxy", more @ ..] if !more.is_empty() => ("proxy", more),
        _ => (resource_verb(method), parts),
    };
    let mut object = ObjectRef {
        api_group: group.to_owned(),
        api_version: version.to_owned(),
        ..ObjectRef::default()
    };
    // `namespaces/NS/resource…` is namespaced, but `namespaces/NS` and its own subresources are not.
    let parts = match parts {
        ["namespaces", namespace, more @ ..] => {
            (*namespace).clone_into(&mut object.namespace);
            let own = more.is_empty() || matches!(more[0], "status" | "finalize");
            if own { parts } else { more }
        }
        _ => parts,
    };
    let part = |at: usize| parts.get(at).copied().unwrap_or_default().to_owned();
    (object.resource, object.name) = (part(0), part(1));
    let known = if verb == "proxy" { 2 } else { 3 };
    if known > 2 {
        object.subresource = part(2);
    }
    let rest = parts.get(known..).unwrap_or_default();
    let mut verb = verb;
    if object.name.is_empty() && verb == "get" {
        let selection = selection()?;
        verb = if selection.watch { "watch" } else { "list" };
        object.name = selection.name;
    } else if object.name.is_empty() && verb == "delete" {
        verb = "deletecollection";
    }
    Ok((verb, object, rest))
}

/// What a query adds to a GET without a name.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    pub(crate) watch: bool,
    /// From `fieldSelector=metadata.name=NAME`, which `get -w NAME` sends.
    pub(crate) name: String,
}

impl Selection {
    /// Strictly: the API server takes the first of several values, skips pairs that it cannot decode, and
    /// forgets the selector's name when another option is no number. All of that is an error here.
    fn parse(query: &str) -> Result<Self, RequestInfoError> {
        let mut read = Self::default();
        let mut seen = BTreeSet::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            // Go drops a pair with a raw semicolon.
            if pair.contains(';') {
                return Err(RequestInfoError::Query("semicolon"));
            }
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let (key, value) = (form(key)?, form(value)?);
            let what = match key.as_str() {
                "watch" => "watch",
                "fieldSelector" => "fieldSelector",
                "limit" => "limit",
                "timeoutSeconds" => "timeoutSeconds",
                _ => continue,
            };
            let bad = RequestInfoError::Query(what);
            if !seen.insert(what) {
                return Err(bad);
            }
            match what {
                "watch" => read.watch = flag(&value).ok_or(bad)?,
                "fieldSelector" => read.name = name_in(&value).ok_or(bad)?,
                _ => {
                    value.parse::<i64>().map_err(|_| bad)?;
                }
            }
        }
        Ok(read)
    }
}

/// A name or a value of a query.
fn form(text: &str) -> Result<String, RequestInfoError> {
    percent::decode(&text.replace('+', " "))
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or(RequestInfoError::Query("encoding"))
}

/// Kubernetes takes whatever is neither `0` nor `false` for true, the empty value too; only what means the
/// same to people passes.
fn flag(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "" | "1" | "true" => Some(true),
        "0" | "false" => Some(false),
        _ => None,
    }
}

/// The name that a field selector selects; empty if it selects none. `None`: it is malformed, has an
/// escape, or selects two.
fn name_in(selector: &str) -> Option<String> {
    if selector.contains('\\') {
        return None;
    }
    let mut name = None;
    for term in selector.split(',').filter(|term| !term.is_empty()) {
        let at = term.find('=')?;
        let (left, right) = term.split_at(at);
        let right = right.strip_prefix("==").or(right.strip_prefix('='))?;
        if right.contains('=') {
            return None;
        }
        // `a!=b`: the operator's first character stands before the sign.
        if left.ends_with('!') || left != "metadata.name" {
            continue;
        }
        let is_name = !matches!(right, "." | "..")
            && !right.contains(['/', '%'])
            && !right.contains(char::is_control);
        if !is_name || name.replace(right).is_some() {
            return None;
        }
    }
    Some(name.unwrap_or_default().to_owned())
}

/// Names that cannot be what they seem: none of Kubernetes' groups, versions and namespaces has other
/// characters, and where a rule names a resource, no other spelling of it may pass.
fn check_names(object: &ObjectRef) -> Result<(), RequestInfoError> {
    let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let label = |text: &str| text.bytes().all(|byte| lower(byte) || byte == b'-');
    let dotted = |text: &str| {
        text.bytes()
            .all(|byte| lower(byte) || matches!(byte, b'-' | b'.'))
    };
    // Metrics APIs have the metric's name as a resource or subresource.
    let graphic = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
    let plain = |text: &str| !text.contains(char::is_control);
    for (what, sound) in [
        ("group", dotted(&object.api_group)),
        ("version", label(&object.api_version)),
        ("namespace", label(&object.namespace)),
        ("resource", graphic(&object.resource)),
        ("subresource", graphic(&object.subresource)),
        ("name", plain(&object.name)),
    ] {
        if !sound {
            return Err(RequestInfoError::Name(what));
        }
    }
    Ok(())
}

/// The verb of a request that is not about a resource.
fn plain_verb(method: &Method) -> Option<&'static str> {
    Some(match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => return None,
    })
}

/// The verb of a request for a resource; empty for methods that have none.
fn resource_verb(method: &Method) -> &'static str {
    match *method {
        Method::POST => "create",
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    }
}

#[cfg(test)]
mod tests;
