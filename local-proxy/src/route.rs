//! Which cluster a request is for, and what it asks of it: decided from the raw bytes of its path.
//!
//! Nothing is decoded, normalised or re-encoded: what follows the cluster's name is forwarded byte
//! for byte, and the agent judges it, once. The name itself must be a plain DNS label, so no
//! escape, dot segment or second slash can make it mean another cluster than it says.

use http::{
    HeaderMap, HeaderName, Method, Uri, Version, header, uri::Authority, uri::PathAndQuery,
};
use std::{net::IpAddr, str::FromStr};

const PREFIX: &str = "/clusters/";

/// The TLS server names that our kubeconfig entries ask for are `NAME` with this behind it. Some
/// requests of kubectl (`get --raw`) leave out the path of the kubeconfig's server, but every
/// connection says its server name. `.internal` is reserved for private use.
pub(crate) const SERVER_NAMES: &str = ".throwline.internal";

/// The cluster that a TLS server name stands for.
pub(crate) fn cluster_of(server_name: &str) -> Option<&str> {
    server_name
        .strip_suffix(SERVER_NAMES)
        .filter(|name| is_cluster_name(name))
}

/// Where a request goes.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) cluster: String,
    /// Begins with `/`.
    pub(crate) path: PathAndQuery,
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
    split(
        connection,
        uri.path_and_query().map_or("", PathAndQuery::as_str),
    )
}

fn split(connection: Option<&str>, target: &str) -> Result<Route, RouteError> {
    let Some(rest) = target.strip_prefix(PREFIX) else {
        let cluster = connection.ok_or(RouteError::NoCluster)?.to_owned();
        // "*", or in HTTP/2 a query alone.
        if !target.starts_with('/') {
            return Err(RouteError::Form);
        }
        let path = PathAndQuery::from_str(target).map_err(|_| RouteError::Form)?;
        return Ok(Route { cluster, path });
    };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (name, rest) = rest.split_at(end);
    if !is_cluster_name(name) {
        return Err(RouteError::BadName(name.chars().take(80).collect()));
    }
    let path = match rest.as_bytes().first() {
        Some(b'/') => PathAndQuery::from_str(rest),
        _ => PathAndQuery::from_str(&format!("/{rest}")),
    };
    Ok(Route {
        cluster: name.to_owned(),
        path: path.map_err(|_| RouteError::Form)?,
    })
}

/// An RFC 1123 label.
pub(crate) fn is_cluster_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// A page in the user's browser can make a name of its own point at 127.0.0.1 (DNS rebinding); the
/// browser then sends that name. The client certificate stands before this; it is the second lock.
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
    for token in crate::headers::connection_tokens(headers) {
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
    use super::*;
    use http::HeaderValue;

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
    fn only_our_server_names_stand_for_a_cluster() {
        assert_eq!(cluster_of("prod-eu.throwline.internal"), Some("prod-eu"));
        for name in [
            "localhost",
            ".throwline.internal",
            "a.b.throwline.internal",
            "A.throwline.internal",
        ] {
            assert_eq!(cluster_of(name), None, "{name}");
        }
    }

    fn ask(version: Version, uri: &str, host: &[&str]) -> Result<Route, RouteError> {
        let mut headers = HeaderMap::new();
        for host in host {
            headers.append(header::HOST, HeaderValue::from_str(host).unwrap());
        }
        route(None, version, &Method::GET, &uri.parse().unwrap(), &headers)
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
            );
            assert_eq!(
                matches!(result, Err(RouteError::ConnectionNames(_))),
                refused,
                "{value}"
            );
        }
    }
}
