//! The local proxy's path and Host: the cluster is the one that is written, the rest untouched.
#![no_main]

#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../local-proxy/src/headers.rs"]
mod headers;
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../local-proxy/src/route.rs"]
mod route;

use http::{HeaderMap, HeaderValue, Method, Uri, Version, header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let (Some(target), host, connection) = (parts.next(), parts.next(), parts.next()) else {
        return;
    };
    let Ok(uri) = Uri::try_from(target) else {
        return;
    };
    let mut headers = HeaderMap::new();
    for (name, value) in [(header::HOST, host), (header::CONNECTION, connection)] {
        let Some(value) = value else { continue };
        let Ok(value) = HeaderValue::from_bytes(value) else {
            return;
        };
        headers.insert(name, value);
    }
    let written = uri
        .path_and_query()
        .map_or("", http::uri::PathAndQuery::as_str)
        .to_owned();
    for connection in [None, Some("by-connection")] {
        let routed = route::route(connection, Version::HTTP_11, &Method::GET, &uri, &headers);
        let Ok(route) = routed else { continue };
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(!route.cluster.is_empty() && route.cluster.len() <= 63);
        assert!(
            route.cluster.chars().all(label),
            "{} is no cluster",
            route.cluster
        );
        assert!(route.path.as_str().starts_with('/'));
        if written.starts_with("/clusters/") {
            let name = format!("/clusters/{}", route.cluster);
            let rest = written.strip_prefix(&name).expect("the written name");
            let forwarded = route.path.as_str();
            assert_eq!(
                forwarded.trim_start_matches('/'),
                rest.trim_start_matches('/')
            );
        } else {
            assert_eq!(Some(route.cluster.as_str()), connection);
            assert_eq!(route.path.as_str(), written);
        }
    }
});
