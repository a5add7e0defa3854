//! How carriers end: with their certificate, with the relay, with a renewal in time.

use std::time::{Duration, SystemTime};

use throwline_certs::authority::Lives;
use throwline_certs::{Identity, PendingIdentity};
use throwline_tunnel::carrier::Connection;
use throwline_tunnel::message;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    Certificate, Control, ControlKind, ControlMessage, RefusalCode, Renew, StreamKind,
};
use throwline_tunnel::proto::wire::{CERTIFICATE_CAP, CONTROL_CAP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{PATIENCE, Setup, World, eventually, line, open, refused};

#[tokio::test]
async fn a_carrier_ends_with_its_certificate() {
    let world = World::with(Setup {
        lives: Lives {
            agent: Duration::from_secs(2),
            ..Lives::default()
        },
        ..Setup::default()
    })
    .await;
    let identity = world.cluster("prod").await;
    let agent = world.agent(&identity).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let reason = tokio::time::timeout(PATIENCE, agent.carrier.closed())
        .await
        .expect("closed in time");
    assert_eq!(reason.code, CloseCode::Expired);
    assert!(identity.not_after() <= SystemTime::now());
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 0.0)
        .await;
    assert!(!proxy.carrier.is_closed());
    drop((agent, proxy));
    world.end().await;
}

async fn renew(connection: &Connection) -> (PendingIdentity, Certificate) {
    let pending = PendingIdentity::generate().unwrap();
    let header = StreamKind::Renew(Renew {
        csr: pending.csr_der().to_vec(),
    });
    let (mut stream, _) = connection.carrier.open(header.into()).await.unwrap();
    let renewed = message::read(&mut stream, CERTIFICATE_CAP).await.unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "then the end");
    (pending, renewed)
}

#[tokio::test]
async fn a_renewed_identity_is_the_same_with_another_key() {
    let world = World::new().await;
    for identity in [world.cluster("prod").await, world.user("anna").await] {
        let connection = world.dial(&identity).await.unwrap();
        let (pending, renewed) = renew(&connection).await;
        assert_eq!(
            renewed.ca,
            [world.authority.roots().certificates()[0].to_vec()]
        );
        let chain = renewed.chain.into_iter().map(Into::into).collect();
        let renewed: Identity = pending.complete(chain).unwrap();
        assert_eq!(renewed.id(), identity.id());
        assert_eq!(renewed.groups(), identity.groups());
        assert_ne!(renewed.serial(), identity.serial());
        let again = world.dial(&renewed).await.unwrap();
        drop((connection, again));
    }
    world.end().await;
}

#[tokio::test]
async fn a_renewal_without_a_usable_request_is_refused() {
    let world = World::plaintext().await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let header = StreamKind::Renew(Renew {
        csr: b"nonsense".to_vec(),
    });
    let refusal = refused(&proxy, header).await;
    assert_eq!(refusal.code(), RefusalCode::BadRequest);
    drop(proxy);
    world.end().await;
}

#[tokio::test]
async fn a_second_control_stream_is_refused() {
    let world = World::plaintext().await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let header = || StreamKind::Control(Control {});
    let first = proxy.carrier.open(header().into()).await.unwrap();
    let refusal = refused(&proxy, header()).await;
    assert_eq!(refusal.code(), RefusalCode::BadRequest);
    drop((first, proxy));
    world.end().await;
}

#[tokio::test]
async fn nonsense_on_the_control_stream_ends_that_carrier_alone() {
    let world = World::plaintext().await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let other = world.proxy(&world.user("ben").await).await;
    let header = StreamKind::Control(Control {}).into();
    let (mut control, _) = proxy.carrier.open(header).await.unwrap();
    control.write_all(b"\xff\xff\xff\xff").await.unwrap();
    control.flush().await.unwrap();
    let reason = tokio::time::timeout(PATIENCE, proxy.carrier.closed())
        .await
        .expect("closed");
    assert_eq!(reason.code, CloseCode::Protocol);
    assert!(!other.carrier.is_closed());
    drop((control, proxy, other));
    world.end().await;
}

#[tokio::test]
async fn shutdown_tells_peers_and_waits_for_lines() {
    let world = World::configured(|config| config.timing.drain_timeout = PATIENCE).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let header = StreamKind::Control(Control {}).into();
    let (mut control, _) = proxy.carrier.open(header).await.unwrap();
    let mut stream = line(&proxy, "prod").await;
    let (admin, address) = (world.admin, world.address);
    assert!(ready(admin).await);
    world.trigger.trigger();

    let told: ControlMessage = message::read(&mut control, CONTROL_CAP).await.unwrap();
    assert!(matches!(told.kind, Some(ControlKind::Drain(drain)) if drain.spread_ms > 0));
    assert!(!ready(admin).await);
    let refusal = refused(&proxy, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::Draining);
    assert!(refusal.retry_after_ms > 0);
    let closed = tokio::net::TcpStream::connect(address).await.is_err();
    assert!(closed, "nobody new is accepted");

    // The line is as alive as before.
    stream.write_all(b"still").await.unwrap();
    stream.flush().await.unwrap();
    let mut echoed = [0; 5];
    stream.read_exact(&mut echoed).await.unwrap();
    drop(stream);
    let reason = tokio::time::timeout(PATIENCE, proxy.carrier.closed())
        .await
        .expect("closed");
    assert_eq!(reason.code, CloseCode::GoingAway);
    let reason = agent.carrier.closed().await;
    assert_eq!(reason.code, CloseCode::GoingAway);
    drop((control, proxy, agent));
    world.ended().await;
}

async fn ready(admin: std::net::SocketAddr) -> bool {
    let request = b"GET /readyz HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n";
    crate::raw::send(admin, request).await.status == 200
}

#[tokio::test]
async fn lines_that_do_not_end_are_cut_after_the_drain_timeout() {
    let world = World::configured(|config| {
        config.timing.drain_timeout = Duration::from_millis(50);
    })
    .await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let stream = line(&proxy, "prod").await;
    world.trigger.trigger();
    let reason = tokio::time::timeout(PATIENCE, proxy.carrier.closed())
        .await
        .expect("closed");
    assert_eq!(reason.code, CloseCode::GoingAway);
    drop((stream, proxy, agent));
    world.ended().await;
}

#[tokio::test]
async fn a_lost_agent_ends_its_lines_and_its_route() {
    let world = World::configured(|config| {
        config.timing.agent_wait = Duration::from_millis(20);
    })
    .await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut stream = line(&proxy, "prod").await;
    drop(agent);
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    // Whether an end or a reset: the line's own frames tell a cut from an end.
    let _ = end.expect("the line ended");
    world
        .until_metric("throwline_relay_lines", |n| n == 0.0)
        .await;
    assert_eq!(
        refused(&proxy, open("prod")).await.code(),
        RefusalCode::Offline
    );
    eventually("the proxy's carrier lives", || !proxy.carrier.is_closed()).await;
    drop((stream, proxy));
    world.end().await;
}
