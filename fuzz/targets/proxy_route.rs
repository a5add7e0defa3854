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
    let Ok(route) = route::route(Version::HTTP_11, &Method::GET, &uri, &headers) else {
        return;
    };
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    assert!(
        !route.cluster.is_empty() && route.cluster.len() <= 63 && route.cluster.chars().all(label)
    );
    let written = uri.path_and_query().expect("a path").as_str();
    let rest = written
        .strip_prefix(&format!("/clusters/{}", route.cluster))
        .expect("the written name");
    assert_eq!(
        route.path.as_str().trim_start_matches('/'),
        rest.trim_start_matches('/')
    );
});
