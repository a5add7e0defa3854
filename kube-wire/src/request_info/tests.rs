use proptest::prelude::*;

use super::*;
use crate::audit::AuditAttributes;

fn parse(method: &str, target: &str) -> Result<RequestInfo, RequestInfoError> {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    RequestInfo::parse(&method.parse().unwrap(), path, query)
}

fn brief(method: &str, target: &str) -> String {
    let read = parse(method, target).unwrap_or_else(|error| panic!("{method} {target}: {error}"));
    let tolerant = AuditAttributes::of(&method.parse().unwrap(), target);
    assert_eq!(tolerant.verb, read.verb, "{method} {target}");
    assert_eq!(tolerant.object, read.object, "{method} {target}");
    assert_eq!(tolerant.effective_verb(), read.effective_verb());
    let rest = match read.rest.as_slice() {
        [] => String::new(),
        rest => format!(" +{}", rest.join("+")),
    };
    match read.object {
        Some(object) => format!(
            "{} {}/{} {} {}/{}/{}{rest}",
            read.verb,
            object.api_group,
            object.api_version,
            object.namespace,
            object.resource,
            object.name,
            object.subresource,
        ),
        None => format!("{} {}", read.verb, read.path),
    }
}

/// The first part is `TestGetAPIRequestInfo` of k8s.io/apiserver.
#[test]
fn requests_are_read_as_the_api_server_reads_them() {
    for (method, target, expected) in [
        ("GET", "/api/v1/namespaces", "list /v1  namespaces//"),
        (
            "GET",
            "/api/v1/namespaces/other",
            "get /v1 other namespaces/other/",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods",
            "list /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods/foo",
            "get /v1 other pods/foo/",
        ),
        (
            "HEAD",
            "/api/v1/namespaces/other/pods/foo",
            "get /v1 other pods/foo/",
        ),
        ("GET", "/api/v1/pods", "list /v1  pods//"),
        ("HEAD", "/api/v1/pods", "list /v1  pods//"),
        (
            "GET",
            "/api/v1/proxy/namespaces/other/pods/foo",
            "proxy /v1 other pods/foo/",
        ),
        (
            "GET",
            "/api/v1/proxy/namespaces/other/pods/foo/subpath/not/a/subresource",
            "proxy /v1 other pods/foo/",
        ),
        ("GET", "/api/v1/watch/pods", "watch /v1  pods//"),
        (
            "GET",
            "/api/v1/watch/namespaces/other/pods",
            "watch /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods?watch=1",
            "watch /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods?watch=0",
            "list /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods?watch",
            "watch /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods?watch=False",
            "list /v1 other pods//",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods/foo?watch=1",
            "get /v1 other pods/foo/",
        ),
        (
            "GET",
            "/api/v1/namespaces/other/pods/foo/status",
            "get /v1 other pods/foo/status",
        ),
        (
            "PUT",
            "/api/v1/namespaces/other/finalize",
            "update /v1 other namespaces/other/finalize",
        ),
        (
            "PUT",
            "/api/v1/namespaces/other/status",
            "update /v1 other namespaces/other/status",
        ),
        (
            "PATCH",
            "/api/v1/namespaces/other/pods/foo",
            "patch /v1 other pods/foo/",
        ),
        (
            "DELETE",
            "/api/v1/namespaces/other/pods/foo",
            "delete /v1 other pods/foo/",
        ),
        ("DELETE", "/api/v1/nodes", "deletecollection /v1  nodes//"),
        (
            "DELETE",
            "/api/v1/namespaces",
            "deletecollection /v1  namespaces//",
        ),
        (
            "DELETE",
            "/api/v1/namespaces/other/pods?fieldSelector=metadata.name%3Dfoo",
            "deletecollection /v1 other pods//",
        ),
        (
            "POST",
            "/api/v1/namespaces/other/pods",
            "create /v1 other pods//",
        ),
        (
            "POST",
            "/apis/extensions/v1beta3/namespaces/other/pods",
            "create extensions/v1beta3 other pods//",
        ),
        (
            "GET",
            "/apis/apps/v1/namespaces/other/deployments/d/scale",
            "get apps/v1 other deployments/d/scale",
        ),
        // Field selectors name an object where nothing else does.
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name%3Dfoo",
            "list /v1  pods/foo/",
        ),
        (
            "GET",
            "/api/v1/pods?watch=true&fieldSelector=spec.nodeName=a,metadata.name==foo&limit=5",
            "watch /v1  pods/foo/",
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name!=foo",
            "list /v1  pods//",
        ),
        (
            "GET",
            "/api/v1/pods?labelSelector=a%3Db%2Cc+in+(d)",
            "list /v1  pods//",
        ),
        (
            "GET",
            "/api/v1/watch/pods?fieldSelector=metadata.name%3Dfoo",
            "watch /v1  pods//",
        ),
        // Connections to workloads.
        (
            "GET",
            "/api/v1/namespaces/a/pods/b/exec?command=a;b&command=%ff",
            "get /v1 a pods/b/exec",
        ),
        (
            "POST",
            "/api/v1/namespaces/a/pods/b/portforward",
            "create /v1 a pods/b/portforward",
        ),
        (
            "GET",
            "/api/v1/namespaces/a/services/https:b:1/proxy/x//../%2e%zz?;",
            "get /v1 a services/https:b:1/proxy",
        ),
        (
            "GET",
            "/api/v1/nodes/n%3A1/proxy/metrics",
            "get /v1  nodes/n:1/proxy",
        ),
        // Servers behind an APIService.
        (
            "GET",
            "/apis/subresources.kubevirt.io/v1/namespaces/a/virtualmachineinstances/b/portforward/22/tcp",
            "get subresources.kubevirt.io/v1 a virtualmachineinstances/b/portforward +22+tcp",
        ),
        (
            "GET",
            "/apis/custom.metrics.k8s.io/v1beta1/namespaces/a/pods/*/http_requests",
            "get custom.metrics.k8s.io/v1beta1 a pods/*/http_requests",
        ),
        // Names as people give them.
        (
            "GET",
            "/apis/rbac.authorization.k8s.io/v1/clusterroles/system:node%20x",
            "get rbac.authorization.k8s.io/v1  clusterroles/system:node x/",
        ),
        ("GET", "/api/v1/pods/", "list /v1  pods//"),
        // No resources.
        ("GET", "/", "get /"),
        ("GET", "/version", "get /version"),
        ("GET", "/api", "get /api"),
        ("GET", "/api/v1/", "get /api/v1/"),
        ("GET", "/apis/apps/v1", "get /apis/apps/v1"),
        ("HEAD", "/healthz/%65tcd", "head /healthz/etcd"),
        ("POST", "/debug/flags/v", "post /debug/flags/v"),
        ("OPTIONS", "/apis", "options /apis"),
        (
            "GET",
            "/openapi/v3/apis/apps/v1?hash=A;B",
            "get /openapi/v3/apis/apps/v1",
        ),
        ("GET", "/API/v1/pods", "get /API/v1/pods"),
    ] {
        assert_eq!(brief(method, target), expected, "{method} {target}");
    }
}

#[test]
fn what_has_no_reading_or_two_is_rejected() {
    use RequestInfoError as E;
    for (method, target, error) in [
        ("get", "/api", E::Method),
        ("CONNECT", "/api", E::Method),
        ("TRACE", "/api", E::Method),
        ("PURGE", "/api/v1/pods", E::Method),
        ("OPTIONS", "/api/v1/pods", E::Method),
        ("GET", "", E::Form),
        ("GET", "*", E::Form),
        ("GET", "api/v1/pods", E::Form),
        ("GET", "//api/v1/pods", E::Path(PathError::EmptySegment)),
        ("GET", "/api//v1/pods", E::Path(PathError::EmptySegment)),
        ("GET", "/api/v1/pods//", E::Path(PathError::EmptySegment)),
        ("GET", "/api/v1/pods/%", E::Path(PathError::Encoding)),
        ("GET", "/api/v1/../v1/pods", E::Path(PathError::Dots)),
        ("GET", "/api/v1/%2e/pods", E::Path(PathError::Dots)),
        ("GET", "/api/v1/pods%2fa", E::Path(PathError::Hidden)),
        ("GET", "/api/v1/pods/a%00", E::Path(PathError::Hidden)),
        ("GET", "/api/v1/pods/a%250", E::Path(PathError::Hidden)),
        ("GET", "/api/v1/pods/%ff", E::Name("text")),
        ("GET", "/api/v1/pods/%c2%85", E::Name("name")),
        ("GET", "/api/v1/p%c3%a9ds", E::Name("resource")),
        ("GET", "/api/v1/po%20ds", E::Name("resource")),
        ("GET", "/api/v1/pods/a/ex%20ec", E::Name("subresource")),
        ("GET", "/api/v1/namespaces/A/pods", E::Name("namespace")),
        ("GET", "/api/v1/namespaces/a%20/pods", E::Name("namespace")),
        ("GET", "/apis/Apps/v1/deployments", E::Name("group")),
        ("GET", "/apis/apps/V1/deployments", E::Name("version")),
        ("GET", "/api/v1/watch", E::NoResource),
        ("GET", "/api/v1/proxy/", E::NoResource),
        ("GET", "/api/v1/pods?watch=0&watch=1", E::Query("watch")),
        ("GET", "/api/v1/pods?watch=0&w%61tch=1", E::Query("watch")),
        ("GET", "/api/v1/pods?watch=f", E::Query("watch")),
        ("GET", "/api/v1/pods?watch=no", E::Query("watch")),
        ("GET", "/api/v1/pods?watch=1;", E::Query("semicolon")),
        ("GET", "/api/v1/pods?x=%zz", E::Query("encoding")),
        ("GET", "/api/v1/pods?x=%ff", E::Query("encoding")),
        ("GET", "/api/v1/pods?limit=x", E::Query("limit")),
        (
            "GET",
            "/api/v1/pods?timeoutSeconds=1s",
            E::Query("timeoutSeconds"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name=a&fieldSelector=metadata.name=b",
            E::Query("fieldSelector"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name=a,metadata.name=b",
            E::Query("fieldSelector"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name=a%5C,b",
            E::Query("fieldSelector"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name=a%252fb",
            E::Query("fieldSelector"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name===a",
            E::Query("fieldSelector"),
        ),
        (
            "GET",
            "/api/v1/pods?fieldSelector=metadata.name",
            E::Query("fieldSelector"),
        ),
    ] {
        assert_eq!(parse(method, target), Err(error), "{method} {target}");
    }
}

#[test]
fn a_websocket_exec_is_decided_on_as_create() {
    let verb = |method: &str, end: &str| {
        let target = format!("/api/v1/namespaces/a/pods/b{end}");
        let read = parse(method, &target).unwrap();
        read.effective_verb().to_owned()
    };
    for end in ["/exec", "/attach", "/portforward", "/proxy/x"] {
        assert_eq!(verb("GET", end), "create", "{end}");
        assert_eq!(verb("POST", end), "create", "{end}");
    }
    assert_eq!(verb("GET", ""), "get");
    assert_eq!(verb("GET", "/log"), "get");
    assert_eq!(verb("DELETE", "/proxy/x"), "delete");
}

/// Parts of targets that matter to either reading, and some that only break one.
const PARTS: [&str; 40] = [
    "/",
    "/",
    "/",
    "/api",
    "/apis",
    "/v1",
    "/apps",
    "/namespaces",
    "/a",
    "/pods",
    "/services",
    "/nodes",
    "/watch",
    "/proxy",
    "/status",
    "/finalize",
    "/exec",
    "/log",
    "/debug/pprof",
    "%2f",
    "%61",
    "%",
    "..",
    "%ff",
    "é",
    "?",
    "&",
    ";",
    "=",
    "watch",
    "=1",
    "=0",
    "=f",
    "fieldSelector",
    "metadata.name",
    "!=",
    ",",
    "limit=3",
    "timeoutSeconds=",
    "+",
];

proptest! {
    #[test]
    fn what_the_strict_reading_accepts_the_tolerant_one_reads_alike(
        method in prop::sample::select(vec!["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "X"]),
        parts in prop::collection::vec(prop::sample::select(PARTS.to_vec()), 0..16),
    ) {
        let target = parts.concat();
        let tolerant = AuditAttributes::of(&method.parse().unwrap(), &target);
        if let Ok(strict) = parse(method, &target) {
            prop_assert_eq!(tolerant.verb.as_str(), strict.verb, "{}", target);
            prop_assert_eq!(tolerant.effective_verb(), strict.effective_verb());
            prop_assert_eq!(tolerant.object, strict.object, "{}", target);
        }
    }
}
