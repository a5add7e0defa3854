//! What a request is in the words of Kubernetes, for the audit and for metrics only: the API server decides
//! on its own reading, and policy on [`RequestInfo`](crate::request_info::RequestInfo).

use std::convert::Infallible;
use std::time::Duration;

use http::Method;
use url::form_urlencoded;

use crate::percent;
use crate::request_info::{self, ObjectRef, Selection, effective_verb, is_connect, resource_path};

/// Verb and object of one request, read tolerantly: rejected requests are audited too. Nothing may be
/// decided by it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditAttributes {
    /// Of Kubernetes; see [`RequestInfo::verb`](crate::request_info::RequestInfo::verb).
    pub verb: String,
    /// `None` for requests that are not about a resource, such as `/version`.
    pub object: Option<ObjectRef>,
    /// The API server sets no time limit for these: watches, logs, exec and the like, and what is
    /// behind the `proxy` subresource.
    pub long_running: bool,
    /// For how long the API server is to work on it, of `timeout` or `timeoutSeconds`; zero where
    /// the client sets no limit.
    pub asked: Duration,
}

impl AuditAttributes {
    /// Reads method and target; never fails.
    #[must_use]
    pub fn of(method: &Method, target: &str) -> Self {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = Query::of(query);
        let asked = query.asked;
        let segments: Vec<String> = path
            .split('/')
            .filter(|segment| !segment.is_empty())
            .map(percent::decode_for_people)
            .collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let Some((group, version, parts)) = resource_path(&segments) else {
            return Self {
                verb: method.as_str().to_ascii_lowercase(),
                object: None,
                // The client sets the length of a profile.
                long_running: matches!(segments.as_slice(), ["debug", "pprof", ..]),
                asked,
            };
        };
        let selection = || Ok::<_, Infallible>(query.selection);
        let Ok((verb, object, _)) = request_info::read(method, group, version, parts, selection);
        // As `BasicLongRunningRequestCheck` of kube-apiserver has it: logs that are not followed, too.
        let long_running = matches!(verb, "watch" | "proxy")
            || is_connect(&object.subresource)
            || object.subresource == "log";
        Self {
            verb: verb.to_owned(),
            object: Some(object),
            long_running,
            asked,
        }
    }

    /// The verb by its effect: a WebSocket exec is a GET, but it does what `create` does.
    #[must_use]
    pub fn effective_verb(&self) -> &str {
        effective_verb(&self.verb, self.object.as_ref())
    }
}

#[derive(Default)]
struct Query {
    selection: Selection,
    asked: Duration,
}

impl Query {
    fn of(query: &str) -> Self {
        let mut read = Self::default();
        let (mut watch, mut name) = (None, None);
        for (key, value) in form_urlencoded::parse(query.as_bytes()) {
            match key.as_ref() {
                // Of several the API server takes the first. A bare `?watch` is true.
                "watch" if watch.is_none() => {
                    watch = Some(!matches!(
                        value.to_ascii_lowercase().as_str(),
                        "0" | "false"
                    ));
                }
                "timeout" => read.asked = read.asked.max(go_duration(&value)),
                "timeoutSeconds" => {
                    let seconds = value.parse().unwrap_or_default();
                    read.asked = read.asked.max(Duration::from_secs(seconds));
                }
                "fieldSelector" if name.is_none() => {
                    let named = value
                        .split(',')
                        .find_map(|term| term.strip_prefix("metadata.name="));
                    name = Some(named.unwrap_or_default().trim_start_matches('=').to_owned());
                }
                _ => {}
            }
        }
        read.selection = Selection {
            watch: watch.unwrap_or_default(),
            name: name.unwrap_or_default(),
        };
        read
    }
}

/// A duration as Go prints it, of whole numbers: `32s`, `1m30s`, `500ms`. Zero if it is none.
fn go_duration(text: &str) -> Duration {
    let mut total = Duration::ZERO;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, behind) = rest.split_at(digits);
        let letters = behind.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, behind) = behind.split_at(letters);
        let Ok(number) = number.parse::<u64>() else {
            return Duration::ZERO;
        };
        let part = match unit {
            "ms" => Duration::from_millis(number),
            "s" => Duration::from_secs(number),
            "m" => Duration::from_secs(number.saturating_mul(60)),
            "h" => Duration::from_secs(number.saturating_mul(3600)),
            _ => return Duration::ZERO,
        };
        total = total.saturating_add(part);
        rest = behind;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(method: &str, uri: &str) -> AuditAttributes {
        AuditAttributes::of(&method.parse().unwrap(), uri)
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
                "get /v1 a pods/b/log long",
            ),
            (
                "GET",
                "/api/v1/namespaces/a/pods/b/log?follow=false&tailLines=1",
                "get /v1 a pods/b/log long",
            ),
            (
                "POST",
                "/api/v1/namespaces/a/services/b/proxy/x/log",
                "create /v1 a services/b/proxy long",
            ),
            ("GET", "/debug/pprof/profile?seconds=300", "get /  // long"),
            ("GET", "/debug/flags", "get /  //"),
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
    fn the_time_that_a_client_asks_for_is_read() {
        for (query, seconds) in [
            ("", 0),
            ("?timeout=32s", 32),
            ("?timeout=1m30s", 90),
            ("?timeoutSeconds=600&limit=1", 600),
            ("?timeout=2h", 7200),
            ("?timeout=-3s", 0),
            ("?timeout=x", 0),
            ("?timeout=3", 0),
            ("?timeoutSeconds=99999999999999999999999", 0),
        ] {
            let read = of("GET", &format!("/api/v1/pods{query}"));
            assert_eq!(read.asked, Duration::from_secs(seconds), "{query}");
        }
        let _ = of(
            "GET",
            "/api/v1/pods?timeout=18446744073709551615h18446744073709551615h",
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
