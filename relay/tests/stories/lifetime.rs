//! How carriers end: with their certificate, with the relay.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use throwline_authority::Validity;
use throwline_relay::registry::{Membership, Memory, Presence, Registry, Tunnel};
use throwline_tunnel::message;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    Control, ControlKind, ControlMessage, Open, RefusalCode, StreamKind,
};
use throwline_tunnel::proto::wire::CONTROL_CAP;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;

use crate::harness::{PATIENCE, Setup, World, eventually, line, open, refused};

#[tokio::test]
async fn a_carrier_ends_with_its_certificate() {
    let world = World::with(Setup {
        lives: Validity {
            agent: Duration::from_secs(2),
            ..Validity::default()
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
    let world = World::with(Setup {
        configure: Box::new(|config| config.timing.drain_timeout = PATIENCE),
        registry: Some(Arc::new(Several::default())),
        ..Setup::default()
    })
    .await;
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

/// A registry of one of two relays.
struct Several {
    own: Memory,
    relays: watch::Sender<u32>,
}

impl Default for Several {
    fn default() -> Self {
        Self {
            own: Memory::default(),
            relays: watch::Sender::new(2),
        }
    }
}

#[async_trait]
impl Registry for Several {
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership {
        self.own.join(tunnel).await
    }

    async fn find(&self, cluster: &str) -> Presence {
        self.own.find(cluster).await
    }

    async fn connected(&self, cluster: &str) {
        self.own.connected(cluster).await;
    }

    async fn drain(&self) {
        self.relays.send_replace(0);
    }

    fn relays(&self) -> watch::Receiver<u32> {
        self.relays.subscribe()
    }
}

#[tokio::test]
async fn a_relay_that_is_alone_waits_only_for_what_ends_with_it() {
    let world = World::configured(|config| config.timing.drain_timeout = PATIENCE).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut ends_with_it = line(&proxy, "prod").await;
    let resumable = Open {
        detached_ms: 60_000,
        ..open("prod")
    };
    let (goes_on, _) = proxy.carrier.open(resumable.into()).await.unwrap();
    let admin = world.admin;
    world.trigger.trigger();
    eventually_not_ready(admin).await;

    // New peers and lines are served as before.
    drop(line(&proxy, "prod").await);
    let another = world.proxy(&world.user("bert").await).await;
    ends_with_it.write_all(b"still").await.unwrap();
    ends_with_it.flush().await.unwrap();
    let mut echoed = [0; 5];
    ends_with_it.read_exact(&mut echoed).await.unwrap();
    assert!(!proxy.carrier.is_closed());

    let since = std::time::Instant::now();
    drop(ends_with_it);
    let reason = tokio::time::timeout(PATIENCE, proxy.carrier.closed())
        .await
        .expect("closed");
    assert_eq!(reason.code, CloseCode::GoingAway);
    assert!(since.elapsed() < PATIENCE / 2, "{:?}", since.elapsed());
    drop((goes_on, another, proxy, agent));
    world.ended().await;
}

#[tokio::test]
async fn resumable_lines_do_not_delay_a_relay_that_is_alone() {
    let world = World::configured(|config| config.timing.drain_timeout = 10 * PATIENCE).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let resumable = Open {
        detached_ms: 60_000,
        ..open("prod")
    };
    let (stream, _) = proxy.carrier.open(resumable.into()).await.unwrap();
    world.trigger.trigger();
    let reason = tokio::time::timeout(PATIENCE, proxy.carrier.closed())
        .await
        .expect("closed");
    assert_eq!(reason.code, CloseCode::GoingAway);
    drop((stream, proxy, agent));
    world.ended().await;
}

async fn eventually_not_ready(admin: std::net::SocketAddr) {
    while ready(admin).await {
        tokio::task::yield_now().await;
    }
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
    // It is not waited for once it is gone; until then a line has all its time.
    let world = World::configured(|config| config.timing.agent_memory = Duration::ZERO).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut stream = line(&proxy, "prod").await;
    drop(agent);
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    // Whether an end or a reset: the line's own frames tell a cut from an end.
    let _ = end.expect("the line ended");
    // Lines end before the carrier does, and the route is there until then.
    for series in [
        "throwline_relay_lines",
        r#"throwline_relay_carriers{role="agent"}"#,
    ] {
        world.until_metric(series, |n| n == 0.0).await;
    }
    assert_eq!(
        refused(&proxy, open("prod")).await.code(),
        RefusalCode::Offline
    );
    eventually("the proxy's carrier lives", || !proxy.carrier.is_closed()).await;
    drop((stream, proxy));
    world.end().await;
}
