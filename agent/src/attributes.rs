//! What a request is in the words of Kubernetes: verb, resource, name. For audit and metrics only;
//! the API server decides on its own reading.
//!
//! Follows `RequestInfoFactory.NewRequestInfo` of k8s.io/apiserver, which the audit's readers know.

use http::{Method, Uri};
use serde::Serialize;
use url::form_urlencoded;

use crate::rules;

/// Verb and object of one request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub verb: String,
    /// `None` for requests that are not about a resource, such as `/version`.
    pub object: Option<ObjectRef>,
    /// Answers of this request last: watches, followed logs, exec and the like.
    pub long_running: bool,
}

/// `objectRef` of `audit.k8s.io/v1`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ObjectRef {
    pub resource: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub api_group: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub api_version: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub subresource: String,
}

impl Attributes {
    /// Reads method and target; never fails, because refused requests are audited too.
    pub(crate) fn of(method: &Method, uri: &Uri) -> Self {
        let query = Query::of(uri.query().unwrap_or_default());
        let segments: Vec<String> = uri
            .path()
            .split('/')
            .filter(|s| !s.is_empty())
            .map(text)
            .collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        match segments.as_slice() {
            ["api", version, rest @ ..] if !rest.is_empty() => {
                resource(method, "", version, rest, &query)
            }
            ["apis", group, version, rest @ ..] if !rest.is_empty() => {
                resource(method, group, version, rest, &query)
            }
            _ => Self {
                verb: method.as_str().to_ascii_lowercase(),
                object: None,
                long_running: false,
            },
        }
    }

    /// The verb that policy goes by: a WebSocket exec is a GET, but it does what `create` does.
    pub(crate) fn effective_verb(&self) -> &str {
        match &self.object {
            Some(object) if is_connect(&object.subresource) && self.verb == "get" => "create",
            _ => &self.verb,
        }
    }
}

fn resource(
    method: &Method,
    group: &str,
    version: &str,
    rest: &[&str],
    query: &Query,
) -> Attributes {
    let (mut special, mut rest) = (None, rest);
    // The old prefix form of a watch, `/api/v1/watch/pods`.
    if rest.len() > 1 && matches!(rest[0], "watch" | "proxy") {
        special = Some(rest[0]);
        rest = &rest[1..];
    }
    let mut object = ObjectRef {
        api_group: group.into(),
        api_version: version.into(),
        ..ObjectRef::default()
    };
    // `namespaces/NS/resource…` is namespaced, but `namespaces/NS` and its own subresources are not.
    let parts = match rest {
        ["namespaces", namespace, more @ ..] => {
            (*namespace).clone_into(&mut object.namespace);
            let own = more.is_empty() || matches!(more[0], "status" | "finalize");
            if own { rest } else { more }
        }
        _ => rest,
    };
    let part = |at: usize| parts.get(at).copied().unwrap_or_default().to_owned();
    (object.resource, object.name, object.subresource) = (part(0), part(1), part(2));

    let mut verb = match *method {
        Method::POST => "create",
        Method::GET | Method::HEAD => "get",
        Method::PUT => "update",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        _ => "",
    };
    if let Some(special) = special {
        verb = special;
    }
    if object.name.is_empty() {
        verb = match verb {
            "get" if query.watch => "watch",
            "get" => "list",
            "delete" => "deletecollection",
            other => other,
        };
    }
    if matches!(verb, "list" | "watch" | "deletecollection") && object.name.is_empty() {
        object.name.clone_from(&query.name);
    }
    let long_running = matches!(verb, "watch" | "proxy")
        || is_connect(&object.subresource)
        || (object.subresource == "log" && query.follow);
    Attributes {
        verb: verb.to_owned(),
        object: Some(object),
        long_running,
    }
}

fn is_connect(subresource: &str) -> bool {
    matches!(subresource, "exec" | "attach" | "portforward" | "proxy")
}

fn text(segment: &str) -> String {
    rules::decoded_segment(segment)
}

#[derive(Default)]
struct Query {
    watch: bool,
    follow: bool,
    /// From `fieldSelector=metadata.name=NAME`, which is how `get -w NAME` asks.
    name: String,
}

impl Query {
    fn of(query: &str) -> Self {
        let mut read = Self::default();
        let is_true =
            |value: &str| !matches!(value, "" | "0" | "false" | "False" | "FALSE" | "f" | "F");
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match key.as_ref() {
                // Kubernetes takes a bare `?watch` for true.
                "watch" => read.watch = value.is_empty() || is_true(&value),
                "follow" => read.follow = is_true(&value),
                "fieldSelector" => {
                    let name = value
                        .split(',')
                        .find_map(|term| term.strip_prefix("metadata.name="));
                    read.name = name.unwrap_or_default().trim_start_matches('=').to_owned();
                }
                _ => {}
            }
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, uri: &str) -> Attributes {
        Attributes::of(&method.parse().unwrap(), &uri.parse().unwrap())
    }

    fn brief(method: &str, uri: &str) -> String {
        let read = of(method, uri);
        let object = read.object.unwrap_or_default();
        format!(
            "{} {}/{} {} {}/{}/{}{}",
            read.verb,
            object.api_group,
            object.api_version,
            object.namespace,
            object.resource,
            object.name,
            object.subresource,
            if read.long_running { " long" } else { "" }
        )
    }

    #[test]
    fn verbs_and_objects_are_those_of_kubernetes() {
        for (method, uri, expected) in [
            ("GET", "/api/v1/namespaces/a/pods", "list /v1 a pods//"),
            ("GET", "/api/v1/namespaces/a/pods/b", "get /v1 a pods/b/"),
            ("HEAD", "/api/v1/namespaces/a/pods/b", "get /v1 a pods/b/"),
            ("GET", "/api/v1/pods?watch=true", "watch /v1  pods// long"),
            ("GET", "/api/v1/pods?watch=0", "list /v1  pods//"),
            ("GET", "/api/v1/pods?watch", "watch /v1  pods// long"),
            (
                "GET",
                "/api/v1/watch/namespaces/a/pods",
                "watch /v1 a pods// long",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods?watch=1&fieldSelector=metadata.name%3Db",
                "watch /v1 a pods/b/ long",
            ),
            (
                "POST",
                "/apis/apps/v1/namespaces/a/deployments",
                "create apps/v1 a deployments//",
            ),
            (
                "PUT",
                "/apis/apps/v1/namespaces/a/deployments/d/scale",
                "update apps/v1 a deployments/d/scale",
            ),
            (
                "PATCH",
                "/apis/apps/v1/namespaces/a/deployments/d",
                "patch apps/v1 a deployments/d/",
            ),
            (
                "DELETE",
                "/api/v1/namespaces/a/pods/b",
                "delete /v1 a pods/b/",
            ),
            (
                "DELETE",
                "/api/v1/namespaces/a/pods",
                "deletecollection /v1 a pods//",
            ),
            ("GET", "/api/v1/namespaces/a", "get /v1 a namespaces/a/"),
            (
                "PUT",
                "/api/v1/namespaces/a/finalize",
                "update /v1 a namespaces/a/finalize",
            ),
            ("GET", "/api/v1/namespaces", "list /v1  namespaces//"),
            (
                "GET",
                "/api/v1/namespaces/a/pods/b/exec?command=sh",
                "get /v1 a pods/b/exec long",
            ),
            (
                "POST",
                "/api/v1/namespaces/a/pods/b/portforward",
                "create /v1 a pods/b/portforward long",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/b/log?follow=true",
                "get /v1 a pods/b/log long",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/b/log",
                "get /v1 a pods/b/log",
            ),
            ("GET", "/api/v1/nodes/n%3A1", "get /v1  nodes/n:1/"),
            ("GET", "/version", "get /  //"),
            ("GET", "/apis/apps/v1", "get /  //"),
        ] {
            assert_eq!(brief(method, uri), expected, "{method} {uri}");
        }
    }

    #[test]
    fn a_websocket_exec_counts_as_create() {
        assert_eq!(
            of("GET", "/api/v1/namespaces/a/pods/b/exec").effective_verb(),
            "create"
        );
        assert_eq!(
            of("GET", "/api/v1/namespaces/a/pods/b").effective_verb(),
            "get"
        );
    }

    #[test]
    fn nonsense_is_read_without_a_panic() {
        for uri in [
            "/",
            "//",
            "/api",
            "/api/",
            "/api/v1/",
            "/apis///",
            "/%ff/%",
            "/api/v1/namespaces/%0a",
            "*",
        ] {
            let _ = of("GET", uri);
        }
    }
}
