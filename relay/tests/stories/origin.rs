//! Whose word about the client's address counts. Enrolments are limited by that address, so they
//! tell whom the relay takes a connection for.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use rustls::pki_types::ServerName;
use throwline_certs::tls;
use throwline_relay::{Config, Tls};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::harness::{PATIENCE, Setup, World};
use crate::raw;

const REFUSED: &str = r#"throwline_relay_handshakes_total{outcome="proxy-header"}"#;
const TLS_FAILED: &str = r#"throwline_relay_handshakes_total{outcome="tls-failed"}"#;
const HALF_OPEN: &str = "throwline_relay_half_open";
const SHED: &str = "throwline_relay_half_open_shed_total";

/// All tests' own connections come from here.
const US: &str = "127.0.0.1";
/// On the same machine, and nobody's source address.
const SOMEBODY_ELSE: &str = "127.0.0.2";

fn network(text: &str) -> IpNet {
    format!("{text}/32").parse().unwrap()
}

/// One enrolment at once for each client.
fn trusting(address: &'static str) -> impl FnOnce(&mut Config) + Send + 'static {
    move |config| {
        config.trusted_proxies = vec![network(address), network("10.0.0.5")];
        config.limits.enrolment_burst = 1;
        config.limits.enrolments_per_minute = 1;
    }
}

async fn plaintext(configure: impl FnOnce(&mut Config) + Send + 'static) -> World {
    World::with(Setup {
        tls: Some(Tls::Plaintext),
        configure: Box::new(configure),
        ..Setup::default()
    })
    .await
}

async fn behind_a_proxy_protocol(address: &'static str) -> World {
    plaintext(move |config| {
        trusting(address)(config);
        config.proxy_protocol = true;
    })
    .await
}

fn v1(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 198.51.100.1 4711 443\r\n").into_bytes()
}

fn v2(client: [u8; 4]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend(client);
    header.extend([198, 51, 100, 1, 0x12, 0x67, 0x01, 0xbb]);
    header
}

/// What a balancer's health check sends.
const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// The status of an enrolment behind these bytes, with these header lines.
async fn enroll(world: &World, before: &[u8], forwarded: &[&str]) -> u16 {
    let forwarded: String = forwarded
        .iter()
        .map(|line| format!("X-Forwarded-For: {line}\r\n"))
        .collect();
    let request =
        format!("POST /v1/enroll HTTP/1.1\r\nHost: r\r\n{forwarded}Content-Length: 2\r\n\r\n{{}}");
    let bytes = [before, request.as_bytes()].concat();
    raw::send(world.address, &bytes).await.status
}

/// Sends these bytes; whether the relay then closes without an answer.
async fn is_closed(address: SocketAddr, bytes: &[u8]) -> bool {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, stream.read(&mut [0; 1])).await;
    // With bytes left unread, the end is a reset.
    !matches!(end.expect("an end"), Ok(1..))
}

#[tokio::test]
async fn behind_a_balancer_each_client_has_its_own_rate() {
    let world = plaintext(trusting(US)).await;
    for (forwarded, expected) in [
        (&["192.0.2.1"][..], 400),
        (&["192.0.2.1"], 429),
        (&["192.0.2.2"], 400),
        // What a client claims changes nothing.
        (&["192.0.2.9, 192.0.2.1"], 429),
        (&["192.0.2.9", "192.0.2.1, 10.0.0.5"], 429),
        (&["192.0.2.3, 10.0.0.5"], 400),
        // No client is named: it is the balancer itself.
        (&[], 400),
        (&["192.0.2.4, unknown"], 429),
    ] {
        let status = enroll(&world, b"", forwarded).await;
        assert_eq!(status, expected, "{forwarded:?}");
    }
    world.end().await;
}

#[tokio::test]
async fn a_header_from_elsewhere_is_nobodys_word() {
    let world = behind_a_proxy_protocol(SOMEBODY_ELSE).await;
    assert_eq!(enroll(&world, b"", &["192.0.2.1"]).await, 400);
    assert_eq!(enroll(&world, b"", &["192.0.2.2"]).await, 429);
    // No such header is looked for, so that it is a request that is none.
    assert_eq!(raw::send(world.address, &v1("192.0.2.3")).await.status, 400);
    assert_eq!(world.metric(REFUSED), 0.0);
    assert_eq!(enroll(&world, b"", &[]).await, 429);
    world.end().await;
}

#[tokio::test]
async fn a_proxy_header_names_the_client() {
    let world = behind_a_proxy_protocol(US).await;
    for (before, expected) in [
        (v1("192.0.2.1"), 400),
        (v2([192, 0, 2, 1]), 429),
        (v2([192, 0, 2, 2]), 400),
        (LOCAL.to_vec(), 400),
        (b"PROXY UNKNOWN\r\n".to_vec(), 429),
    ] {
        let status = enroll(&world, &before, &[]).await;
        assert_eq!(status, expected, "{before:?}");
    }
    world.end().await;
}

#[tokio::test]
async fn a_balancer_behind_another_is_believed_as_far_as_it_is_trusted() {
    let world = behind_a_proxy_protocol(US).await;
    let inner = v2([10, 0, 0, 5]);
    assert_eq!(enroll(&world, &inner, &["192.0.2.1"]).await, 400);
    assert_eq!(enroll(&world, &v1("192.0.2.1"), &[]).await, 429);
    // This client writes the other header itself.
    let claims = ["192.0.2.8, 10.0.0.5"];
    assert_eq!(enroll(&world, &v1("192.0.2.1"), &claims).await, 429);
    world.end().await;
}

#[tokio::test]
async fn a_balancer_that_sends_no_header_is_closed_and_counted() {
    let world = behind_a_proxy_protocol(US).await;
    let request = b"GET /v1/ping HTTP/1.1\r\nHost: relay\r\n\r\n";
    assert!(is_closed(world.address, request).await);
    assert!(is_closed(world.address, b"PROXY TCP4 nonsense\r\n").await);
    world.until_metric(REFUSED, |n| n == 2.0).await;
    // A connection without a byte, as of a port scan, does no harm.
    drop(TcpStream::connect(world.address).await.unwrap());
    let ping = [LOCAL, request].concat();
    assert_eq!(raw::send(world.address, &ping).await.status, 200);
    world.at_rest().await;
    assert_eq!(world.metric(REFUSED), 2.0);
    world.end().await;
}

#[tokio::test]
async fn a_header_must_come_in_time() {
    let world = plaintext(|config| {
        trusting(US)(config);
        config.proxy_protocol = true;
        config.timing.tls_handshake = Duration::from_millis(100);
    })
    .await;
    assert!(is_closed(world.address, &LOCAL[..13]).await);
    world.until_metric(REFUSED, |n| n == 1.0).await;
    world.end().await;
}

/// `GET /v1/ping` over TLS, behind these bytes, which come one by one.
async fn ping_over_tls(world: &World, before: &[u8]) -> std::io::Result<String> {
    let mut tcp = TcpStream::connect(world.address).await?;
    tcp.set_nodelay(true)?;
    for byte in before {
        tcp.write_all(&[*byte]).await?;
    }
    let config = tls::carrier_client(world.authority.roots(), tls::Trust::default()).unwrap();
    let connector = TlsConnector::from(Arc::clone(&config));
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, tcp).await?;
    stream
        .write_all(b"GET /v1/ping HTTP/1.1\r\nHost: relay\r\n\r\n")
        .await?;
    stream.flush().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[tokio::test]
async fn tls_begins_right_behind_the_header() {
    let world = World::configured(|config| {
        config.trusted_proxies = vec![network(US)];
        config.proxy_protocol = true;
    })
    .await;
    for header in [v1("192.0.2.1"), v2([192, 0, 2, 1]), LOCAL.to_vec()] {
        let answer = ping_over_tls(&world, &header).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    assert!(ping_over_tls(&world, b"").await.is_err());
    world.until_metric(REFUSED, |n| n == 1.0).await;
    world.end().await;
}

#[tokio::test]
async fn a_forged_header_before_tls_only_breaks_tls() {
    let world = World::configured(|config| {
        config.trusted_proxies = vec![network(SOMEBODY_ELSE)];
        config.proxy_protocol = true;
    })
    .await;
    assert!(ping_over_tls(&world, &v2([192, 0, 2, 1])).await.is_err());
    world.until_metric(TLS_FAILED, |n| n == 1.0).await;
    assert!(ping_over_tls(&world, b"").await.is_ok());
    world.end().await;
}

#[tokio::test]
async fn half_open_connections_are_counted_for_the_client_and_not_for_its_balancer() {
    let world = World::configured(|config| {
        config.trusted_proxies = vec![network(US)];
        config.proxy_protocol = true;
        config.limits.half_open_per_address = 2;
    })
    .await;
    let mut held = Vec::new();
    for client in 1..=5 {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(&v2([192, 0, 2, client])).await.unwrap();
        held.push(stream);
    }
    world.until_metric(HALF_OPEN, |n| n == 5.0).await;
    assert_eq!(world.metric(SHED), 0.0);
    for _ in 0..4 {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(&v2([192, 0, 2, 9])).await.unwrap();
        held.push(stream);
    }
    world.until_metric(SHED, |n| n == 2.0).await;
    // The others keep their places.
    world.until_metric(HALF_OPEN, |n| n == 7.0).await;
    drop(held);
    world.end().await;
}

#[tokio::test]
async fn without_a_trusted_balancer_the_proxy_protocol_is_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    let url = "https://relay.example.com".parse().unwrap();
    let authority = throwline_authority::Authority::open_or_create(dir.path(), &url)
        .await
        .unwrap();
    let mut config = Config::new(url, Tls::Own);
    config.proxy_protocol = true;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (_trigger, shutdown) = throwline_ops::Shutdown::new();
    let error = throwline_relay::run(
        listener,
        None,
        std::sync::Arc::new(authority),
        config,
        shutdown,
    )
    .await
    .unwrap_err();
    assert!(error.to_string().contains("--trust-proxy"), "{error}");
}
