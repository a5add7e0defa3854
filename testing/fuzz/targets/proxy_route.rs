//! The local proxy's path and Host: the cluster is the one that is written, the rest untouched.
#![no_main]

#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../local-proxy/src/cluster_name.rs"]
mod cluster_name;
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../local-proxy/src/request/route.rs"]
mod route;

use http::{HeaderMap, HeaderValue, Method, Uri, Version, header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let (Some(target), host, connection) = (parts.next(), parts.next(), parts.next()) else {
        return;
    };
    // As it was sent, which may be more than a URI holds.
    let Ok(written) = std::str::from_utf8(target) else {
        return;
    };
    let uri = Uri::try_from(target).unwrap_or_else(|_| Uri::from_static("/"));
    let mut headers = HeaderMap::new();
    for (name, value) in [(header::HOST, host), (header::CONNECTION, connection)] {
        let Some(value) = value else { continue };
        let Ok(value) = HeaderValue::from_bytes(value) else {
            return;
        };
        headers.insert(name, value);
    }
    for connection in [None, Some("by-connection")] {
        let routed = route::route(
            connection,
            Version::HTTP_11,
            &Method::GET,
            &uri,
            &headers,
            written,
        );
        let Ok(route) = routed else { continue };
        let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        assert!(!route.cluster.is_empty() && route.cluster.len() <= 63);
        assert!(
            route.cluster.chars().all(label),
            "{} is no cluster",
            route.cluster
        );
        assert!(route.path.as_str().starts_with('/'));
        let expected = if written.starts_with("/clusters/") {
            let name = format!("/clusters/{}", route.cluster);
            written.strip_prefix(&name).expect("the written name")
        } else {
            assert_eq!(Some(route.cluster.as_str()), connection);
            written
        };
        let (forwarded, expected) = (route.path.as_str(), expected.trim_start_matches('/'));
        if route.path.is_workload() {
            // Odd bytes are percent-encoded for a workload, and nothing else happens to any.
            let forwarded = decoded(forwarded.as_bytes());
            let forwarded =
                &forwarded[forwarded.iter().take_while(|byte| **byte == b'/').count()..];
            let expected = decoded(expected.as_bytes());
            let expected = &expected[expected.iter().take_while(|byte| **byte == b'/').count()..];
            assert_eq!(forwarded, expected);
        } else {
            assert_eq!(forwarded.trim_start_matches('/'), expected);
        }
        assert!(forwarded.bytes().all(|byte| byte.is_ascii_graphic()));
    }
});

fn decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let mut out = Vec::new();
    let mut rest = text;
    while let [byte, behind @ ..] = rest {
        rest = behind;
        let escape = match behind {
            [high, low, ..] if *byte == b'%' => digit(high).zip(digit(low)),
            _ => None,
        };
        match escape {
            Some((high, low)) => {
                out.push(u8::try_from(high * 16 + low).expect("two digits"));
                rest = &behind[2..];
            }
            None => out.push(*byte),
        }
    }
    out
}
