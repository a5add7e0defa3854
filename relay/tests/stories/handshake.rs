//! Which peers are accepted, which are not, and the answers that they get.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustls::NamedGroup;
use throwline_authority::{Authority, Validity};
use throwline_tunnel::carrier::{DialError, dial};
use throwline_tunnel::proto::messages::{HandshakeReply, Proof, RefusalCode, Role, Verdict};

use crate::harness::{PATIENCE, Setup, World, eventually, lying_prover, prover};
use crate::raw::{self, Socket};

const ACCEPTED: &str = r#"throwline_relay_handshakes_total{outcome="accepted"}"#;

#[tokio::test]
async fn agents_and_users_are_let_in_over_tls_of_the_authority() {
    let world = World::new().await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    assert_eq!(world.metric(ACCEPTED), 2.0);
    assert_ne!(agent.carrier.id(), proxy.carrier.id());
    world
        .until_metric(r#"throwline_relay_carriers{role="local-proxy"}"#, |n| {
            n == 1.0
        })
        .await;
    drop((agent, proxy));
    world.end().await;
}

/// A client that can do nothing else gets in: the relay has X25519MLKEM768, and chooses it of what
/// our own client offers.
#[tokio::test]
async fn the_key_exchange_is_post_quantum() {
    let world = World::new().await;
    let ours = throwline_certs::tls::carrier_client(
        world.authority.roots(),
        throwline_certs::tls::Trust::default(),
    )
    .unwrap();
    let mut alone = Arc::unwrap_or_clone(throwline_certs::tls::provider());
    alone
        .kx_groups
        .retain(|group| group.name() == NamedGroup::X25519MLKEM768);
    let mut roots = rustls::RootCertStore::empty();
    for ca in world.authority.roots().certificates() {
        roots.add(ca.clone()).unwrap();
    }
    let mut only = rustls::ClientConfig::builder_with_provider(Arc::new(alone))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    only.alpn_protocols = vec![b"http/1.1".to_vec()];
    for client in [ours, Arc::new(only)] {
        let tcp = tokio::net::TcpStream::connect(world.address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let stream = tokio_rustls::TlsConnector::from(client)
            .connect(name, tcp)
            .await
            .unwrap();
        let tls = stream.get_ref().1;
        let group = tls.negotiated_key_exchange_group().unwrap();
        assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
        assert_eq!(tls.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
    world.end().await;
}

#[tokio::test]
async fn a_relay_that_nobody_dialled_ends_at_once() {
    World::new().await.end().await;
}

#[tokio::test]
async fn the_ping_tells_what_this_is() {
    let world = World::plaintext().await;
    let answer = raw::get(world.address, "/v1/ping").await;
    assert_eq!(answer.status, 200);
    assert!(answer.body.contains(r#""product":"throwline""#));
    assert_eq!(raw::get(world.address, "/").await.status, 404);
    assert_eq!(raw::post(world.address, "/v1/ping", "").await.status, 405);
    world.end().await;
}

#[tokio::test]
async fn a_websocket_without_our_protocol_is_told_which_we_speak() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    let assertion = raw::assertion(&user, &world.url);
    let request = raw::upgrade("relay", "/v1/carrier", &assertion, "throwline.v9, chat");
    let answer = raw::send(world.address, request.as_bytes()).await;
    assert_eq!(answer.status, 426);
    assert_eq!(answer.headers["sec-websocket-protocol"], "throwline.v1");
    assert_eq!(answer.code(), "version");
    // The assertion was not used up by that.
    assert_eq!(raw::carrier(world.address, &assertion).await.status, 101);
    world.end().await;
}

#[tokio::test]
async fn a_plain_request_is_told_that_this_is_for_upgrades() {
    let world = World::plaintext().await;
    let answer = raw::get(world.address, "/v1/carrier").await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (400, "bad-request")
    );
    world.end().await;
}

#[tokio::test]
async fn every_bad_assertion_gets_the_same_answer() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    let good = raw::assertion(&user, &world.url);

    let elsewhere = tempfile::tempdir().unwrap();
    let foreign = Authority::open_or_create(elsewhere.path(), &world.url)
        .await
        .unwrap();
    let stranger = crate::harness::enrolled(&foreign, &world.url, "anna").await;

    let mut forged = raw::claims(&user, &world.url);
    forged.sub = forged.sub.replace("anna", "root");
    forged.iss = forged.sub.clone();
    let mut other_issuer = raw::claims(&user, &world.url);
    other_issuer.iss = other_issuer.iss.replace("anna", "root");
    let mut other_audience = raw::claims(&user, &world.url);
    other_audience.aud = "https://other.example".into();
    let mut long_lived = raw::claims(&user, &world.url);
    long_lived.exp += 3600;
    let mut unnamed = raw::claims(&user, &world.url);
    unnamed.jti.clear();
    let sign = |claims| throwline_certs::jws::sign(&user, &claims).unwrap();

    let mut broken_signature = good.clone();
    let last = broken_signature.pop().unwrap();
    let before_last = broken_signature.pop().unwrap();
    broken_signature.push(if before_last == 'A' { 'B' } else { 'A' });
    broken_signature.push(last);

    for (what, assertion) in [
        ("empty", String::new()),
        ("nonsense", "a.b.c".into()),
        ("too long", "A".repeat(9000)),
        (
            "of another authority",
            raw::assertion(&stranger, &world.url),
        ),
        ("for another subject", sign(forged)),
        ("of another issuer", sign(other_issuer)),
        ("for another relay", sign(other_audience)),
        ("for an hour", sign(long_lived)),
        ("without a name", sign(unnamed)),
        ("with a broken signature", broken_signature),
    ] {
        let answer = raw::carrier(world.address, &assertion).await;
        assert_eq!(answer.status, 401, "{what}");
        assert_eq!(
            answer.body,
            r#"{"code":"unauthenticated","message":"throwline relay: the assertion was not accepted"}"#,
            "{what}"
        );
    }
    assert_eq!(raw::carrier(world.address, &good).await.status, 101);
    world.end().await;
}

#[tokio::test]
async fn a_head_beyond_its_limit_is_refused() {
    let world = World::plaintext().await;
    let answer = raw::carrier(world.address, &"A".repeat(40_000)).await;
    assert_eq!(answer.status, 431);
    world.end().await;
}

/// Case 14: what was seen on the wire is of no use, here or elsewhere.
#[tokio::test]
async fn a_captured_assertion_is_refused() {
    let world = World::plaintext().await;
    let twin = World::plaintext().await;
    let user = world.user("anna").await;
    let captured: Arc<Mutex<String>> = Arc::default();
    let mut config = world.dial_config(&user);
    let honest = prover(&user);
    let mut tapped = prover(&user);
    let tap = Arc::clone(&captured);
    tapped.assertion = Box::new(move |claims| {
        let assertion = (honest.assertion)(claims)?;
        *tap.lock().unwrap() = assertion.clone();
        Ok(assertion)
    });
    config.prover = Arc::new(tapped);
    let carrier = dial(&config).await.unwrap();
    let captured = captured.lock().unwrap().clone();

    let again = raw::carrier(world.address, &captured).await;
    assert_eq!(
        (again.status, again.code().as_str()),
        (401, "unauthenticated")
    );
    let elsewhere = raw::carrier(twin.address, &captured).await;
    assert_eq!(
        (elsewhere.status, elsewhere.code().as_str()),
        (401, "unauthenticated")
    );
    drop(carrier);
    // The later one first: each counts the tasks that it found.
    twin.end().await;
    world.end().await;
}

/// The same where the other relay has the same authority behind it.
/// Relays behind one address have one audience, and no memory in common: an assertion is good once at
/// each of them. What is behind it needs the key each time.
#[tokio::test]
async fn an_assertion_is_accepted_once_at_each_relay_of_a_set() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    let assertion = raw::assertion(&user, &world.url);
    let request = raw::upgrade("relay", "/v1/carrier", &assertion, "throwline.v1");
    let mut headers = http::HeaderMap::new();
    for line in request.lines().skip(1).filter(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ").unwrap();
        let name: http::HeaderName = name.parse().unwrap();
        headers.insert(name, value.parse().unwrap());
    }
    let tolerance = Duration::from_secs(60);
    let relay = || {
        let accept = throwline_tunnel::carrier::AcceptConfig::new("of-a-set");
        let validator = world.authority.validator().clone();
        throwline_relay::Authenticator::new(validator, &world.url, tolerance, 100, accept)
    };
    let now = std::time::SystemTime::now();
    for relay in [relay(), relay()] {
        assert!(relay.check(&headers, now).is_ok());
        assert!(relay.check(&headers, now).is_err(), "accepted twice");
    }
    // At the real one, too; without the key there is nothing after the 101.
    let admitted = raw::carrier(world.address, &assertion).await;
    assert_eq!(admitted.status, 101);
    drop(admitted);
    assert_eq!(world.metric(ACCEPTED), 0.0);
    world.end().await;
}

#[tokio::test]
async fn an_assertion_for_one_relay_is_refused_by_its_sibling() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    let mut sibling = world.url.clone();
    sibling.set_port(Some(1)).unwrap();
    let answer = raw::carrier(world.address, &raw::assertion(&user, &sibling)).await;
    assert_eq!(
        (answer.status, answer.code().as_str()),
        (401, "unauthenticated")
    );
    world.end().await;
}

/// Stolen before it was used, it gets a 101, and nothing behind it without the key.
#[tokio::test]
async fn a_stolen_assertion_without_its_key_does_not_pass_the_challenge() {
    let world = World::plaintext().await;
    let (anna, thief) = (world.user("anna").await, world.user("thief").await);
    let mut config = world.dial_config(&anna);
    let mut stolen = prover(&anna);
    stolen.sign = prover(&thief).sign;
    config.prover = Arc::new(stolen);
    assert_refused(dial(&config).await, RefusalCode::Unauthenticated);
    world
        .until_metric(
            r#"throwline_relay_handshakes_total{outcome="proof-failed"}"#,
            |n| n == 1.0,
        )
        .await;
    assert_eq!(world.metric(ACCEPTED), 0.0);
    world.end().await;
}

#[tokio::test]
async fn a_user_cannot_come_as_an_agent_nor_an_agent_as_a_user() {
    let world = World::plaintext().await;
    for (identity, role) in [
        (world.user("anna").await, Role::Agent),
        (world.cluster("prod").await, Role::LocalProxy),
        (world.user("anna").await, Role::Relay),
        (world.user("anna").await, Role::Unspecified),
    ] {
        let mut config = world.dial_config(&identity);
        config.role = role;
        assert_refused(dial(&config).await, RefusalCode::Unauthenticated);
    }
    world.end().await;
}

#[track_caller]
fn assert_refused<T>(dialled: Result<T, DialError>, code: RefusalCode) {
    match dialled {
        Err(DialError::Refused(refusal)) => assert_eq!(refusal.code(), code),
        Err(DialError::Unauthenticated) => assert_eq!(code, RefusalCode::Unauthenticated),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("let in"),
    }
}

#[tokio::test]
async fn an_older_and_a_newer_peer_are_told_the_version() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    for version in [0, 2, u32::MAX] {
        let reply = prove_raw(&world, &user, |proof| proof.version = version).await;
        match reply.and_then(|reply| reply.verdict) {
            Some(Verdict::Refused(refusal)) => assert_eq!(refusal.code(), RefusalCode::Version),
            other => panic!("version {version}: {other:?}"),
        }
    }
    let honest = prove_raw(&world, &user, |_| {}).await.unwrap();
    assert!(matches!(honest.verdict, Some(Verdict::Welcome(_))));
    world.end().await;
}

#[tokio::test]
async fn a_proof_with_another_nonce_or_none_is_refused() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    let bends: [fn(&mut Proof); 4] = [
        |proof| proof.nonce[0] ^= 1,
        |proof| proof.nonce.clear(),
        |proof| proof.signature.clear(),
        |proof| proof.signature = vec![0; 2000],
    ];
    for bend in bends {
        let reply = prove_raw(&world, &user, bend).await;
        let verdict = reply.and_then(|reply| reply.verdict);
        assert!(!matches!(verdict, Some(Verdict::Welcome(_))), "{verdict:?}");
    }
    assert_eq!(world.metric(ACCEPTED), 0.0);
    world.end().await;
}

async fn prove_raw(
    world: &World,
    user: &throwline_certs::Identity,
    bend: impl FnOnce(&mut Proof),
) -> Option<HandshakeReply> {
    let assertion = raw::assertion(user, &world.url);
    let mut socket = Socket::after(raw::carrier(world.address, &assertion).await);
    socket.prove(user, &assertion, &world.url, bend).await
}

#[tokio::test]
async fn a_peer_that_does_not_answer_the_challenge_is_dropped_in_time() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        configure: Box::new(|config| {
            config.timing.carrier.handshake = Duration::from_millis(50);
        }),
        ..Setup::default()
    })
    .await;
    let user = world.user("anna").await;
    let answer = raw::carrier(world.address, &raw::assertion(&user, &world.url)).await;
    let mut socket = Socket::after(answer);
    let challenge: Option<throwline_tunnel::proto::messages::Challenge> = socket.read().await;
    assert!(challenge.is_some());
    let welcome: Option<HandshakeReply> = socket.read().await;
    let welcomed = welcome.is_some_and(|it| matches!(it.verdict, Some(Verdict::Welcome(_))));
    assert!(!welcomed);
    world.end().await;
}

#[tokio::test]
async fn a_wrong_clock_is_named_and_a_minute_is_forgiven() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    for off in [-600_i64, 600] {
        let mut config = world.dial_config(&user);
        config.prover = Arc::new(lying_prover(&user, move |claims| {
            claims.iat = claims.iat.saturating_add_signed(off);
            claims.exp = claims.exp.saturating_add_signed(off);
        }));
        match dial(&config).await {
            Err(DialError::ClockSkew { message }) => assert!(message.contains('T'), "{message}"),
            other => panic!("{off} s off: {other:?}"),
        }
    }
    for off in [-55_i64, 55] {
        let mut config = world.dial_config(&user);
        config.prover = Arc::new(lying_prover(&user, move |claims| {
            claims.iat = claims.iat.saturating_add_signed(off);
            claims.exp = claims.exp.saturating_add_signed(off);
        }));
        drop(dial(&config).await.unwrap());
    }
    world.end().await;
}

#[tokio::test]
async fn an_expired_certificate_is_named() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        lives: Validity {
            user: Duration::from_secs(1),
            ..Validity::default()
        },
        ..Setup::default()
    })
    .await;
    let user = world.user("anna").await;
    let expired = || user.not_after() < std::time::SystemTime::now();
    eventually("the certificate has expired", expired).await;
    let config = world.dial_config(&user);
    match dial(&config).await {
        Err(DialError::CertificateExpired { .. }) => {}
        other => panic!("{other:?}"),
    }
    world.end().await;
}

#[tokio::test]
async fn a_request_that_never_ends_is_cut_off() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        configure: Box::new(|config| config.timing.request_head = Duration::from_millis(50)),
        ..Setup::default()
    })
    .await;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(world.address).await.unwrap();
    socket.write_all(b"GET /v1/ping HTT").await.unwrap();
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await;
    // A reset is as good an end as a close.
    let _ = end.expect("the relay gave up");
    assert!(!rest.starts_with(b"HTTP/1.1 2"));
    world.end().await;
}

#[tokio::test]
async fn a_tls_handshake_that_never_ends_is_cut_off() {
    let world =
        World::configured(|config| config.timing.tls_handshake = Duration::from_millis(50)).await;
    use tokio::io::AsyncReadExt;
    let mut socket = tokio::net::TcpStream::connect(world.address).await.unwrap();
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await;
    let _ = end.expect("the relay gave up");
    world
        .until_metric(
            r#"throwline_relay_handshakes_total{outcome="tls-timeout"}"#,
            |n| n == 1.0,
        )
        .await;
    world.end().await;
}

#[tokio::test]
async fn a_prefixed_public_url_serves_below_its_prefix() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        configure: Box::new(|config| config.public_url.set_path("/line/")),
        ..Setup::default()
    })
    .await;
    assert_eq!(raw::get(world.address, "/line/v1/ping").await.status, 200);
    // Where the balancer takes it off.
    assert_eq!(raw::get(world.address, "/v1/ping").await.status, 200);
    assert_eq!(raw::get(world.address, "/lines/v1/ping").await.status, 404);
    let user = world.user("anna").await;
    let mut config = world.dial_config(&user);
    config.relay.set_path("/line");
    drop(dial(&config).await.unwrap());
    world.end().await;
}
