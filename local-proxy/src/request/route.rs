//! Which cluster a request is for, and what it asks of it: decided from the raw bytes of its path.
//!
//! Nothing is decoded, normalised or re-encoded, but for bytes that have no place in a target and that a
//! workload may be sent nevertheless ([`Target::read`]): what follows the cluster's name is forwarded byte
//! for byte, and the agent checks it, once. The name itself must be a plain DNS label, so no
//! escape, dot segment or second slash can make it mean another cluster.

use std::net::IpAddr;
use std::str::FromStr;

use http::uri::Authority;
use http::{HeaderMap, HeaderName, Method, Uri, Version, header};
use throwline_kube_wire::http1::target::{Target, TargetError};

use crate::cluster_name::is_cluster_name;

const PREFIX: &str = "/clusters/";

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) cluster: String,
    pub(crate) path: Target,
    /// The client's requests say the cluster in their path, and nothing else does: its redirects must, too.
    pub(crate) by_path: bool,
}

/// Why a request goes nowhere. Always the client's fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    #[error(
        "the path must begin with /clusters/NAME; use the kubeconfig entry that throwline wrote"
    )]
    NoCluster,
    #[error("'{0}' is not a cluster name: lower-case letters, digits and '-', at most 63")]
    BadName(String),
    #[error("this local proxy does not serve cluster {0}: it was started for others only")]
    NotServed(String),
    #[error("the request target must be a path")]
    Form,
    #[error("{0}, unless it is for a workload behind a proxy subresource")]
    Bytes(TargetError),
    #[error("CONNECT and TRACE are not forwarded")]
    Method,
    #[error("the host '{0}' is not this machine's loopback")]
    ForeignHost(String),
    #[error("the request names more than one host")]
    HostsDiffer,
    #[error("the Connection header must not name '{0}'")]
    ConnectionNames(String),
    /// HTTP/1.0 has no chunks: its answers end when the connection does, so a cut would look whole.
    #[error("HTTP/1.0 is not spoken here, HTTP/1.1 and HTTP/2 are")]
    Http10,
}

/// Checks what must hold for every request and finds its cluster: by its path, else by the server
/// name of its connection.
pub(crate) fn route(
    connection: Option<&str>,
    version: Version,
    method: &Method,
    uri: &Uri,
    headers: &HeaderMap,
    target: &str,
) -> Result<Route, RouteError> {
    if version < Version::HTTP_11 {
        return Err(RouteError::Http10);
    }
    if method == Method::CONNECT || method == Method::TRACE {
        return Err(RouteError::Method);
    }
    // HTTP/2 always has the scheme and authority; in HTTP/1.1 that is the form for forward proxies.
    if version == Version::HTTP_11 && uri.authority().is_some() {
        return Err(RouteError::Form);
    }
    check_host(uri, headers)?;
    check_connection(headers)?;
    split(connection, target)
}

/// How many bytes of a request's target name its cluster.
pub(crate) fn prefix_of(target: &[u8]) -> usize {
    let Some(rest) = target.strip_prefix(PREFIX.as_bytes()) else {
        return 0;
    };
    let name = rest.iter().take_while(|byte| !matches!(byte, b'/' | b'?'));
    PREFIX.len() + name.count()
}

/// Where a redirect of cluster `cluster` leads a client whose paths say the cluster; `None`: as it is.
pub(crate) fn redirect(location: &str, cluster: &str) -> Option<String> {
    let is_path = location.starts_with('/') && !location.starts_with("//");
    is_path.then(|| format!("{PREFIX}{cluster}{location}"))
}

fn split(connection: Option<&str>, target: &str) -> Result<Route, RouteError> {
    let Some(rest) = target.strip_prefix(PREFIX) else {
        let cluster = connection.ok_or(RouteError::NoCluster)?.to_owned();
        // "*", or in HTTP/2 a query alone.
        if !target.starts_with('/') {
            return Err(RouteError::Form);
        }
        let path = read(target)?;
        let by_path = false;
        return Ok(Route {
            cluster,
            path,
            by_path,
        });
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (name, rest) = rest.split_at(end);
    if !is_cluster_name(name) {
        return Err(RouteError::BadName(name.chars().take(80).collect()));
    }
    let path = match rest.as_bytes().first() {
        Some(b'/') => read(rest),
        _ => read(&format!("/{rest}")),
    };
    Ok(Route {
        cluster: name.to_owned(),
        path: path?,
        by_path: connection != Some(name),
    })
}

fn read(target: &str) -> Result<Target, RouteError> {
    Target::read(target.as_bytes(), 0).map_err(|error| match error {
        TargetError::Form => RouteError::Form,
        TargetError::Bytes => RouteError::Bytes(error),
    })
}

/// A page in the user's browser can have its host name resolve to 127.0.0.1 (DNS rebinding); the
/// browser then sends that name. The client certificate already prevents this; the check is a second barrier.
fn check_host(uri: &Uri, headers: &HeaderMap) -> Result<(), RouteError> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts
        .next()
        .map(|host| {
            host.to_str()
                .ok()
                .and_then(|host| Authority::from_str(host).ok())
                .ok_or_else(|| {
                    RouteError::ForeignHost(String::from_utf8_lossy(host.as_bytes()).into())
                })
        })
        .transpose()?;
    if hosts.next().is_some() {
        return Err(RouteError::HostsDiffer);
    }
    let authority = match (uri.authority(), &host) {
        (Some(authority), Some(host)) if authority != host => return Err(RouteError::HostsDiffer),
        (Some(authority), _) => authority,
        (None, Some(host)) => host,
        (None, None) => return Err(RouteError::ForeignHost(String::new())),
    };
    if is_loopback(authority) {
        Ok(())
    } else {
        Err(RouteError::ForeignHost(authority.to_string()))
    }
}

fn is_loopback(authority: &Authority) -> bool {
    if authority.as_str().contains('@') {
        return false;
    }
    let host = authority.host();
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    host.eq_ignore_ascii_case("localhost")
        || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// `Connection` may name hop-by-hop headers, and we remove what it names, here, because this is
/// the hop it speaks of. Naming one that carries identity or framing is an attack on what the
/// next hop reads (CVE-2021-31999), so it is refused where it would be obeyed.
fn check_connection(headers: &HeaderMap) -> Result<(), RouteError> {
    for token in throwline_kube_wire::headers::connection_tokens(headers) {
        let token = token.to_ascii_lowercase();
        if token.starts_with("impersonate-")
            || token.starts_with("x-remote-")
            || [header::AUTHORIZATION, header::HOST, header::CONTENT_LENGTH]
                .iter()
                .any(|name: &HeaderName| name.as_str() == token)
        {
            return Err(RouteError::ConnectionNames(token));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn target(target: &str) -> Result<(String, String), RouteError> {
        split(None, target).map(|route| (route.cluster, route.path.as_str().to_owned()))
    }

    #[test]
    fn the_rest_of_the_path_is_kept_byte_for_byte() {
        for (path, rest) in [
            ("/clusters/prod-eu", "/"),
            ("/clusters/prod-eu/", "/"),
            ("/clusters/prod-eu?x=1", "/?x=1"),
            (
                "/clusters/prod-eu/api/v1/pods?watch=true",
                "/api/v1/pods?watch=true",
            ),
            (
                "/clusters/prod-eu/a%2Fb%2fc//d/./e?q=%20+&&",
                "/a%2Fb%2fc//d/./e?q=%20+&&",
            ),
            ("/clusters/prod-eu//api", "//api"),
            ("/clusters/prod-eu/../other/api", "/../other/api"),
            (
                "/clusters/prod-eu/clusters/other/api",
                "/clusters/other/api",
            ),
        ] {
            assert_eq!(
                target(path),
                Ok(("prod-eu".to_owned(), rest.to_owned())),
                "{path}"
            );
        }
    }

    #[test]
    fn crafted_names_are_refused() {
        for path in [
            "/clusters/",
            "/clusters//api",
            "/clusters/../api",
            "/clusters/./api",
            "/clusters/%70rod/api",
            "/clusters/a%2f..%2fb/api",
            "/clusters/Prod/api",
            "/clusters/-a/api",
            "/clusters/a-/api",
            "/clusters/a.b/api",
            "/clusters/a_b/api",
            "/clusters/a;b/api",
            "/clusters/a@b/api",
            "/clusters/a:1/api",
            "/clusters/?x",
            &format!("/clusters/{}/api", "a".repeat(64)),
        ] {
            assert!(
                matches!(target(path), Err(RouteError::BadName(_))),
                "{path}"
            );
        }
        for path in [
            "",
            "/",
            "*",
            "/clusters",
            "/api",
            "//clusters/a/api",
            "/Clusters/a",
            "/x/../clusters/a",
        ] {
            assert_eq!(target(path), Err(RouteError::NoCluster), "{path}");
        }
        assert!(target(&format!("/clusters/{}/api", "a".repeat(63))).is_ok());
    }

    #[test]
    fn a_path_without_a_cluster_is_for_the_one_of_the_connection() {
        let route = split(Some("prod-eu"), "/version?timeout=3s").unwrap();
        assert_eq!(
            (route.cluster.as_str(), route.path.as_str()),
            ("prod-eu", "/version?timeout=3s")
        );
        let named = split(Some("prod-eu"), "/clusters/other/version").unwrap();
        assert_eq!(named.cluster, "other");
        for target in ["", "*", "?watch=1"] {
            assert_eq!(split(Some("prod-eu"), target), Err(RouteError::Form));
        }
    }

    #[test]
    fn odd_bytes_pass_to_workloads_only() {
        let proxy = "/clusters/a/api/v1/namespaces/n/services/s/proxy";
        let route = split(None, &format!("{proxy}/é?<")).unwrap();
        assert!(route.path.as_str().ends_with("/proxy/%C3%A9?%3C"));
        let refused = split(None, "/clusters/a/api/v1/pods?é");
        assert!(matches!(refused, Err(RouteError::Bytes(_))));
        assert_eq!(prefix_of(proxy.as_bytes()), "/clusters/a".len());
        assert_eq!(prefix_of(b"/clusters/a?x"), "/clusters/a".len());
        assert_eq!(prefix_of(b"/api/v1"), 0);
    }

    #[test]
    fn redirects_keep_the_cluster_where_the_path_alone_says_it() {
        assert_eq!(
            redirect("/api/v1/x/?y", "a").as_deref(),
            Some("/clusters/a/api/v1/x/?y")
        );
        for location in ["login", "https://sso.example/", "//elsewhere/", "?x", ""] {
            assert_eq!(redirect(location, "a"), None, "{location}");
        }
        assert!(split(None, "/clusters/a/api").unwrap().by_path);
        assert!(split(Some("b"), "/clusters/a/api").unwrap().by_path);
        assert!(!split(Some("a"), "/clusters/a/api").unwrap().by_path);
        assert!(!split(Some("a"), "/api").unwrap().by_path);
    }

    fn ask(version: Version, uri: &str, host: &[&str]) -> Result<Route, RouteError> {
        let mut headers = HeaderMap::new();
        for host in host {
            headers.append(header::HOST, HeaderValue::from_str(host).unwrap());
        }
        let uri: Uri = uri.parse().unwrap();
        let target = uri.path_and_query().map_or("", |target| target.as_str());
        route(None, version, &Method::GET, &uri, &headers, target)
    }

    #[test]
    fn only_loopback_hosts_are_served() {
        let path = "/clusters/a/api";
        for host in [
            "127.0.0.1:47611",
            "127.0.0.1",
            "localhost:1",
            "LOCALHOST",
            "[::1]:47611",
            "[::1]",
        ] {
            assert!(ask(Version::HTTP_11, path, &[host]).is_ok(), "{host}");
        }
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:47611",
            "10.0.0.1",
            "a@127.0.0.1",
            "0.0.0.0",
            "",
        ] {
            assert!(
                matches!(
                    ask(Version::HTTP_11, path, &[host]),
                    Err(RouteError::ForeignHost(_))
                ),
                "{host}"
            );
        }
        assert!(matches!(
            ask(Version::HTTP_11, path, &[]),
            Err(RouteError::ForeignHost(_))
        ));
        assert_eq!(
            ask(Version::HTTP_11, path, &["127.0.0.1", "evil.example"]),
            Err(RouteError::HostsDiffer)
        );
        assert_eq!(
            ask(
                Version::HTTP_2,
                "https://127.0.0.1/clusters/a",
                &["evil.example"]
            ),
            Err(RouteError::HostsDiffer)
        );
        assert!(ask(Version::HTTP_2, "https://127.0.0.1:1/clusters/a", &[]).is_ok());
        assert!(ask(Version::HTTP_2, "https://evil.example/clusters/a", &[]).is_err());
    }

    #[test]
    fn other_forms_of_target_are_refused() {
        assert_eq!(
            ask(
                Version::HTTP_11,
                "https://127.0.0.1/clusters/a",
                &["127.0.0.1"]
            ),
            Err(RouteError::Form)
        );
        assert_eq!(
            ask(Version::HTTP_10, "/clusters/a", &["127.0.0.1"]),
            Err(RouteError::Http10)
        );
        let connect = route(
            None,
            Version::HTTP_11,
            &Method::CONNECT,
            &"127.0.0.1:443".parse().unwrap(),
            &HeaderMap::new(),
            "",
        );
        assert_eq!(connect, Err(RouteError::Method));
    }

    #[test]
    fn connection_cannot_have_identity_removed() {
        for (value, refused) in [
            ("close, Impersonate-User", true),
            ("AUTHORIZATION", true),
            ("keep-alive,content-length", true),
            ("host", true),
            ("keep-alive, Upgrade", false),
            ("x-mine", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static("127.0.0.1"));
            headers.insert(header::CONNECTION, HeaderValue::from_static(value));
            let result = route(
                None,
                Version::HTTP_11,
                &Method::GET,
                &"/clusters/a".parse().unwrap(),
                &headers,
                "/clusters/a",
            );
            assert_eq!(
                matches!(result, Err(RouteError::ConnectionNames(_))),
                refused,
                "{value}"
            );
        }
    }
}
