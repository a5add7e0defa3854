//! Texts from outside that decide about a way or about trust. The first byte chooses the decoder:
//! `X-Forwarded-For`, a proxy's URL and `NO_PROXY`, the authority's CA certificates, a notice that
//! PostgreSQL passes on.
#![no_main]

#[path = "shared/authority.rs"]
mod authority;
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../relay/src/http/client_addr.rs"]
mod client_addr;
#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../../relay/src/registry/postgres/notice.rs"]
mod notice;

use std::net::{IpAddr, SocketAddr};

use client_addr::TrustedProxies;
use http::{HeaderMap, HeaderValue};
use libfuzzer_sys::fuzz_target;
use notice::{Heard, Notice};
use rustls_pki_types::CertificateDer;
use throwline_certs::Roots;
use throwline_tunnel::carrier::Proxies;
use url::Url;

fuzz_target!(|data: &[u8]| {
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 4 {
        0 => forwarded_for(data),
        1 => proxies(data),
        2 => roots(data),
        _ => notices(data),
    }
});

/// One header line for each line of `data`, behind a trusted balancer.
fn forwarded_for(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n').take(64) {
        let Ok(value) = HeaderValue::from_bytes(line) else {
            return;
        };
        headers.append("x-forwarded-for", value);
    }
    let trusted = TrustedProxies::new(&["10.0.0.0/8", "2001:db8::/32"].map(|network| {
        let network: ipnet::IpNet = network.parse().expect("a network");
        network
    }));
    let balancer = SocketAddr::from(([10, 0, 0, 1], 1));
    let stranger = SocketAddr::from(([192, 0, 2, 1], 1));
    assert_eq!(trusted.client(stranger, &headers), stranger, "believed");
    let client = trusted.client(balancer, &headers);
    assert_eq!(client.ip(), client.ip().to_canonical());
    // The nearest word that is not a balancer's stands, whatever is to the left of it.
    let shown = client.ip().to_string();
    if client != balancer && matches!(client.ip(), IpAddr::V4(_)) {
        let text = String::from_utf8_lossy(data);
        let mapped = client.ip();
        let IpAddr::V4(four) = mapped else { return };
        let is_there = text.contains(&shown)
            || text.contains(':')
            || text.contains(&four.to_ipv6_mapped().to_string());
        assert!(is_there, "{shown} was made up");
    }
    headers.append("x-forwarded-for", HeaderValue::from_static("203.0.113.9"));
    let nearest = trusted.client(balancer, &headers);
    assert_eq!(nearest.ip(), IpAddr::from([203, 0, 113, 9]));
}

const PASSWORD: &str = "s3cr3t-0f-th3-pr0xy";

/// The first line is a proxy's URL or a part of one, the second `NO_PROXY`, the third a host.
fn proxies(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = text.splitn(3, '\n');
    let mut next = || lines.next().unwrap_or_default();
    let (url, exceptions, host) = (next(), next(), next());
    let with_password = [
        url.to_owned(),
        format!("http://ann:{PASSWORD}@{url}"),
        format!("https://ann:{PASSWORD}{url}@proxy.example"),
    ];
    for url in &with_password {
        for shown in match Proxies::always(url, "--proxy") {
            Ok(proxies) => [format!("{proxies:?}"), String::new()],
            Err(bad) => [format!("{bad:?}"), bad.to_string()],
        } {
            assert!(!shown.contains(PASSWORD), "a password is shown: {shown}");
        }
    }
    // Only a proxy that speaks TLS is asked for trust, so this tells whether one is on the way.
    let proxies = Proxies::from_environment(|name| match name {
        "HTTPS_PROXY" => Some("https://proxy.example:3129".into()),
        "NO_PROXY" => Some(exceptions.into()),
        _ => None,
    })
    .expect("a proxy's URL");
    let is_on_the_way = |relay: &Url| proxies.trusting(relay, || Err(())).is_err();
    for local in [
        "https://localhost:8443",
        "https://127.0.0.1",
        "https://[::1]",
    ] {
        let local = Url::parse(local).expect("a URL");
        assert!(!is_on_the_way(&local), "a proxy for {local}");
    }
    let Ok(relay) = Url::parse(&format!("https://{host}")) else {
        return;
    };
    let named = relay.host_str().unwrap_or_default();
    let listed = |entry: &str| exceptions.split(',').any(|each| each.trim() == entry);
    if listed("*") || (!named.is_empty() && !named.contains(':') && listed(named)) {
        assert!(!is_on_the_way(&relay), "{relay} in {exceptions:?}");
    }
    let _ = is_on_the_way(&relay);
}

fn roots(data: &[u8]) {
    let check = |roots: Roots| {
        assert_eq!(roots.pins().len(), roots.certificates().len());
        assert!((1..=8).contains(&roots.pins().len()));
        let again = Roots::from_pem(&roots.to_pem()).expect("our own PEM");
        assert_eq!(again, roots);
    };
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(roots) = Roots::from_pem(text)
    {
        check(roots);
    }
    if let Ok(roots) = Roots::new(vec![CertificateDer::from(data.to_vec())]) {
        check(roots);
    }
    // The real one with bytes changed: either no CA of ours, or one of another pin.
    let real = authority::FIXTURE.authority.roots();
    let mut der = real.certificates()[0].to_vec();
    for change in data.chunks_exact(3) {
        let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % der.len();
        der[at] = change[2];
    }
    let same = der == real.certificates()[0].as_ref();
    if let Ok(changed) = Roots::new(vec![CertificateDer::from(der)]) {
        assert_eq!(changed.pins() == real.pins(), same);
        check(changed);
    }
}

fn notices(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut heard = Heard::default();
    heard.add(text, "self");
    let Some(notice) = Notice::decode(text) else {
        assert_eq!(heard, Heard::default(), "what is no notice was heard");
        return;
    };
    assert_eq!(Notice::decode(&notice.encode()), Some(notice.clone()));
    let (relay, _) = notice.relay();
    assert!(notice::is_instance(relay));
    let named = heard.registered.iter().map(|(relay, _)| relay);
    let named = named.chain(heard.tunnels.iter().map(|(relay, ..)| relay));
    for each in named {
        assert_eq!(each, relay);
        assert_ne!(each, "self", "a relay listens to itself");
    }
}
