//! Where lines go, and the refusals where they cannot.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use throwline_certs::PeerIdentity;
use throwline_policy::{Decision, DenyCode};
use throwline_relay::policy::Policy;
use throwline_tunnel::carrier::Connection;
use throwline_tunnel::message;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    AgentStatus, ClusterInfo, ClusterList, Impersonation, ListClusters, Open, Refusal, RefusalCode,
    Role, StreamHeader, StreamKind,
};
use throwline_tunnel::proto::wire::CLUSTER_LIST_CAP;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Agent, PATIENCE, Setup, World, eventually, line, open, refused};
use crate::raw::{self, Socket};

#[tokio::test]
async fn a_line_reaches_its_cluster_and_carries_bytes_both_ways() {
    let world = World::new().await;
    let mut agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut stream = line(&proxy, "prod").await;
    world
        .until_metric("throwline_relay_lines", |n| n == 1.0)
        .await;

    let opened = agent.opened.recv().await.unwrap();
    assert_eq!(opened.cluster, "prod");
    assert_eq!(opened.line_id, vec![7; 16]);
    assert_eq!(opened.user, world.user_id("anna"));
    assert!(opened.client_addr.starts_with("127.0.0.1:"));

    // More than all buffers on the way together, to see it flow.
    let sent: Vec<u8> = (0..4 << 20).map(|byte: u32| (byte % 251) as u8).collect();
    let (mut read, mut write) = tokio::io::split(stream);
    let writing = {
        let sent = sent.clone();
        tokio::spawn(async move {
            write.write_all(&sent).await.unwrap();
            write.shutdown().await.unwrap();
            write
        })
    };
    let mut received = vec![0; sent.len()];
    read.read_exact(&mut received).await.unwrap();
    assert!(received == sent, "the same bytes");
    assert_eq!(read.read(&mut [0; 1]).await.unwrap(), 0);
    stream = read.unsplit(writing.await.unwrap());
    drop(stream);
    world
        .until_metric("throwline_relay_lines", |n| n == 0.0)
        .await;
    let bytes = (sent.len() + 4) as f64;
    for direction in ["to-cluster", "to-user"] {
        let series = format!(r#"throwline_relay_line_bytes_total{{direction="{direction}"}}"#);
        world.until_metric(&series, |n| n == bytes).await;
    }
    drop((agent, proxy));
    world.end().await;
}

/// An agent that receives no end of a line keeps it for a proxy that will not come.
#[tokio::test]
async fn what_a_proxy_says_before_it_goes_is_passed_on() {
    let world = World::new().await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut lines = Vec::new();
    for _ in 0..20 {
        lines.push(line(&proxy, "prod").await);
    }
    let to_cluster = r#"throwline_relay_line_bytes_total{direction="to-cluster"}"#;
    let before = world.metric(to_cluster);
    for line in &mut lines {
        line.write_all(b"last words").await.unwrap();
    }
    proxy.carrier.close(CloseCode::GoingAway, "stopping");
    world
        .until_metric(to_cluster, |n| n == before + 200.0)
        .await;
    drop((lines, agent, proxy));
    world.end().await;
}

/// Case 18: what a peer claims decides nothing.
#[tokio::test]
async fn only_the_proved_identity_decides_where_a_line_goes() {
    let world = World::plaintext().await;
    let mut prod = world.agent(&world.cluster("prod").await).await;
    // An agent that calls itself by the other's name wherever it can.
    let mut config = world.dial_config(&world.cluster("test").await);
    config.instance = "prod".into();
    config.software = "cluster/prod".into();
    let mut test = Agent::serve(throwline_tunnel::carrier::dial(&config).await.unwrap());
    let _status = test
        .tell(AgentStatus {
            message: "spiffe://relay/cluster/prod".into(),
            ..AgentStatus::default()
        })
        .await;
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 2.0)
        .await;

    let proxy = world.proxy(&world.user("anna").await).await;
    let mut claimed = open("prod");
    claimed.user = "spiffe://relay/user/root".into();
    claimed.client_addr = "192.0.2.1:1".into();
    let (stream, _) = proxy.carrier.open(claimed.into()).await.unwrap();
    let opened = prod.opened.recv().await.unwrap();
    assert_eq!(opened.user, world.user_id("anna"));
    assert!(opened.client_addr.starts_with("127.0.0.1:"));
    assert!(test.opened.try_recv().is_err());

    let (other, _) = proxy.carrier.open(open("test").into()).await.unwrap();
    assert_eq!(test.opened.recv().await.unwrap().cluster, "test");
    assert!(prod.opened.try_recv().is_err());
    drop((stream, other, proxy, prod, test));
    world.end().await;
}

/// Case 18, in the head of the request.
#[tokio::test]
async fn crafted_hosts_and_paths_lead_nowhere_else() {
    let world = World::plaintext().await;
    let user = world.user("anna").await;
    for host in ["prod", "other.example", "prod.relay:1", "[::1]"] {
        let assertion = raw::assertion(&user, &world.url);
        let request = raw::upgrade(host, "/v1/carrier?cluster=prod", &assertion, "throwline.v1");
        let answer = raw::send(world.address, request.as_bytes()).await;
        let mut socket = Socket::after(answer);
        let reply = socket.prove(&user, &assertion, &world.url, |_| {}).await;
        assert!(reply.is_some(), "{host}");
    }
    for path in [
        "/v1/carrier/prod",
        "/v1/carrier/",
        "//v1/carrier",
        "/v1/../v1/carrier",
        "/V1/CARRIER",
        "/v1/%63arrier",
    ] {
        let assertion = raw::assertion(&user, &world.url);
        let request = raw::upgrade("relay", path, &assertion, "throwline.v1");
        let answer = raw::send(world.address, request.as_bytes()).await;
        assert_eq!(answer.status, 404, "{path}");
    }
    world.end().await;
}

#[tokio::test]
async fn two_agents_of_one_cluster_share_its_lines_and_outlive_each_other() {
    let world = World::plaintext().await;
    let identity = world.cluster("prod").await;
    let mut first = world.agent(&identity).await;
    let mut second = world.agent(&identity).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let one = line(&proxy, "prod").await;
    let two = line(&proxy, "prod").await;
    // The least loaded takes the next.
    assert!(first.opened.recv().await.is_some());
    assert!(second.opened.recv().await.is_some());
    drop(first);
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 1.0)
        .await;
    // The old one's departure took no route along.
    let three = line(&proxy, "prod").await;
    drop((one, two, three, proxy, second));
    world.end().await;
}

#[tokio::test]
async fn a_line_can_ask_for_one_agent_of_several() {
    let world = World::plaintext().await;
    let identity = world.cluster("prod").await;
    let mut config = world.dial_config(&identity);
    config.instance = "wanted".into();
    let mut wanted = Agent::serve(throwline_tunnel::carrier::dial(&config).await.unwrap());
    let mut other = world.agent(&identity).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    for _ in 0..3 {
        let asked = Open {
            agent_instance: "wanted".into(),
            ..open("prod")
        };
        drop(proxy.carrier.open(asked.into()).await.unwrap());
        assert!(wanted.opened.recv().await.is_some());
    }
    assert!(other.opened.try_recv().is_err());
    drop((proxy, wanted, other));
    world.end().await;
}

#[tokio::test]
async fn each_absence_has_its_own_words() {
    let world = World::with(Setup {
        configure: Box::new(|config| config.timing.agent_wait = Duration::from_millis(20)),
        ..Setup::default()
    })
    .await;
    let _never = world.cluster("never").await;
    let agent = world.agent(&world.cluster("gone").await).await;
    drop(agent);
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 0.0)
        .await;
    let proxy = world.proxy(&world.user("anna").await).await;

    let unknown = refused(&proxy, open("nowhere")).await;
    assert_eq!(unknown.code(), RefusalCode::UnknownCluster);
    assert!(unknown.message.contains("nowhere"));
    let no_name = refused(&proxy, open("../\u{1b}[31m")).await;
    assert_eq!(no_name.code(), RefusalCode::UnknownCluster);
    assert!(!no_name.message.contains('\u{1b}'));
    let never = refused(&proxy, open("never")).await;
    assert_eq!(never.code(), RefusalCode::NeverConnected);
    let gone = refused(&proxy, open("gone")).await;
    assert_eq!(gone.code(), RefusalCode::Offline);
    let now_ms = crate::harness::unix_now() * 1000;
    assert!(gone.since_unix_ms.abs_diff(now_ms) < 30_000, "{gone:?}");
    for (code, count) in [
        ("unknown-cluster", 2.0),
        ("never-connected", 1.0),
        ("offline", 1.0),
    ] {
        let series = format!(r#"throwline_relay_refusals_total{{code="{code}"}}"#);
        assert_eq!(world.metric(&series), count, "{code}");
    }
    drop(proxy);
    world.end().await;
}

#[tokio::test]
async fn a_line_waits_for_an_agent_that_was_here_a_moment_ago() {
    let world = World::configured(|config| config.timing.agent_wait = PATIENCE).await;
    let identity = world.cluster("prod").await;
    drop(world.agent(&identity).await);
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 0.0)
        .await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let (stream, agent) = tokio::join!(line(&proxy, "prod"), world.agent(&identity));
    drop((stream, proxy, agent));
    world.end().await;
}

#[tokio::test]
async fn an_agents_own_refusal_reaches_the_user() {
    let world = World::plaintext().await;
    let identity = world.cluster("prod").await;
    let agent = Agent::serve_with(world.dial(&identity).await.unwrap(), |_| {
        Some(Refusal::new(RefusalCode::Limit, "the agent is busy"))
    });
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 1.0)
        .await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let refusal = refused(&proxy, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::Limit);
    assert_eq!(refusal.message, "throwline agent: the agent is busy");
    drop((proxy, agent));
    world.end().await;
}

#[tokio::test]
async fn an_agent_may_not_open_lines_nor_list() {
    let world = World::plaintext().await;
    let _prod = world.agent(&world.cluster("prod").await).await;
    let agent = world.dial(&world.cluster("test").await).await.unwrap();
    assert_eq!(
        refused(&agent, open("prod")).await.code(),
        RefusalCode::NotAllowed
    );
    let list: StreamHeader = StreamKind::ListClusters(ListClusters {}).into();
    assert_eq!(refused(&agent, list).await.code(), RefusalCode::NotAllowed);
    drop((agent, _prod));
    world.end().await;
}

/// A user whose name is a cluster's is no cluster.
#[tokio::test]
async fn a_proxy_is_never_opened_to() {
    let world = World::configured(|config| {
        config.timing.agent_wait = Duration::from_millis(20);
    })
    .await;
    let _enrolled = world.cluster("prod").await;
    let mut impostor = world.proxy(&world.user("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    assert_eq!(
        refused(&proxy, open("prod")).await.code(),
        RefusalCode::NeverConnected
    );
    let mut config = world.dial_config(&world.user("prod").await);
    config.role = Role::Agent;
    assert!(throwline_tunnel::carrier::dial(&config).await.is_err());
    let nothing = tokio::time::timeout(Duration::from_millis(20), impostor.incoming.next()).await;
    assert!(nothing.is_err());
    drop((proxy, impostor));
    world.end().await;
}

#[tokio::test]
async fn a_malformed_open_is_refused_and_the_carrier_lives() {
    let world = World::plaintext().await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    for (wanted, code) in [
        (
            Open {
                line_id: vec![1; 15],
                ..open("prod")
            },
            RefusalCode::BadRequest,
        ),
        (
            Open {
                version: 99,
                ..open("prod")
            },
            RefusalCode::Version,
        ),
        (open(""), RefusalCode::UnknownCluster),
    ] {
        assert_eq!(refused(&proxy, wanted).await.code(), code);
    }
    let from_the_future = StreamHeader { kind: None };
    assert_eq!(
        refused(&proxy, from_the_future).await.code(),
        RefusalCode::Unsupported
    );
    drop(line(&proxy, "prod").await);
    drop((proxy, agent));
    world.end().await;
}

/// Permits lines in short terms, until it permits no more.
struct ShortTerms {
    ends: AtomicBool,
    decisions: AtomicU32,
}

#[async_trait]
impl Policy for ShortTerms {
    async fn decide(&self, _: &PeerIdentity, _: &str, now: SystemTime) -> Decision {
        self.decisions.fetch_add(1, Ordering::Relaxed);
        if self.ends.load(Ordering::Relaxed) {
            return Decision::deny(DenyCode::Expired, "the grant ended at noon");
        }
        Decision::Allow {
            reason: "a grant".into(),
            until: Some(now + Duration::from_millis(50)),
            obligations: Vec::new(),
        }
    }
}

#[tokio::test]
async fn a_line_ends_with_its_permission_and_goes_on_with_an_extended_one() {
    let policy = Arc::new(ShortTerms {
        ends: AtomicBool::new(false),
        decisions: AtomicU32::new(0),
    });
    let world = World::with(Setup {
        policy: Some(policy.clone()),
        ..Setup::default()
    })
    .await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let anna = world.proxy(&world.user("anna").await).await;
    let mut stream = line(&anna, "prod").await;
    let before = policy.decisions.load(Ordering::Relaxed);
    eventually("two more decisions", || {
        policy.decisions.load(Ordering::Relaxed) >= before + 2
    })
    .await;
    stream.write_all(b"still").await.unwrap();
    stream.flush().await.unwrap();
    let mut echoed = [0; 5];
    stream.read_exact(&mut echoed).await.unwrap();

    policy.ends.store(true, Ordering::Relaxed);
    let mut rest = Vec::new();
    let end = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
    let _ = end.expect("the line ended");
    let ended = r#"throwline_relay_ended_total{reason="permission-ended",what="line"}"#;
    world.until_metric(ended, |n| n == 1.0).await;
    // The refusal of its resumption has the reason.
    let refusal = refused(&anna, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::NotAllowed);
    for part in ["prod has ended", "at noon", "ask an administrator"] {
        assert!(refusal.message.contains(part), "{}", refusal.message);
    }
    assert!(!anna.carrier.is_closed() && !agent.carrier.is_closed());
    drop((stream, anna, agent));
    world.end().await;
}

struct OnlyProd;

#[async_trait]
impl Policy for OnlyProd {
    async fn decide(&self, user: &PeerIdentity, cluster: &str, _: SystemTime) -> Decision {
        if user.id.name() == "anna" && cluster == "prod" {
            Decision::allow("a test")
        } else {
            Decision::deny(
                DenyCode::NotAllowed,
                format!("you may not reach the cluster {cluster}"),
            )
        }
    }
}

#[tokio::test]
async fn the_policy_is_asked_for_lines_and_lists() {
    let world = World::with(Setup {
        policy: Some(Arc::new(OnlyProd)),
        ..Setup::default()
    })
    .await;
    let prod = world.agent(&world.cluster("prod").await).await;
    let test = world.agent(&world.cluster("test").await).await;
    let anna = world.proxy(&world.user("anna").await).await;
    let ben = world.proxy(&world.user("ben").await).await;
    drop(line(&anna, "prod").await);
    for (who, cluster) in [(&anna, "test"), (&ben, "prod"), (&ben, "test")] {
        assert_eq!(
            refused(who, open(cluster)).await.code(),
            RefusalCode::NotAllowed
        );
    }
    let names = |list: Vec<ClusterInfo>| list.into_iter().map(|one| one.name).collect::<Vec<_>>();
    assert_eq!(names(list(&anna).await), ["prod"]);
    assert!(list(&ben).await.is_empty());
    drop((anna, ben, prod, test));
    world.end().await;
}

async fn list(connection: &Connection) -> Vec<ClusterInfo> {
    let header = StreamKind::ListClusters(ListClusters {}).into();
    let (mut stream, _) = connection.carrier.open(header).await.unwrap();
    let list: ClusterList = message::read_long(&mut stream, CLUSTER_LIST_CAP)
        .await
        .unwrap();
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0, "then the end");
    list.clusters
}

#[tokio::test]
async fn the_list_tells_how_each_cluster_is_now() {
    let world = World::configured(|config| {
        config.timing.carrier.ping_interval = Duration::from_millis(20);
    })
    .await;
    let prod = world.cluster("prod").await;
    let _never = world.cluster("never").await;
    let agent = world.agent(&prod).await;
    let status = AgentStatus {
        kubernetes_version: "v1.36.1".into(),
        agent_version: "0.1.0".into(),
        api_server_reachable: true,
        message: String::new(),
        impersonation: Impersonation::Constrained.into(),
    };
    let control = agent.tell(status).await;
    eventually("a round trip is measured", || {
        agent.carrier.round_trip().is_some()
    })
    .await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let find =
        |list: Vec<ClusterInfo>, name: &str| list.into_iter().find(|one| one.name == name).unwrap();
    let up = loop {
        let up = find(list(&proxy).await, "prod");
        if up.round_trip_us > 0 && !up.kubernetes_version.is_empty() {
            break up;
        }
        tokio::task::yield_now().await;
    };
    assert!(up.connected);
    assert_eq!(up.carriers, 1);
    assert_eq!(up.kubernetes_version, "v1.36.1");
    assert_eq!(up.agent_version, "0.1.0");
    let now_ms = crate::harness::unix_now() * 1000;
    assert!(up.since_unix_ms.abs_diff(now_ms) < 30_000);
    let never = find(list(&proxy).await, "never");
    assert!(!never.connected);
    assert_eq!(never.since_unix_ms, 0);

    drop((control, agent));
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 0.0)
        .await;
    let down = find(list(&proxy).await, "prod");
    assert!(!down.connected);
    assert!(down.since_unix_ms.abs_diff(now_ms) < 30_000, "{down:?}");
    assert_eq!(down.kubernetes_version, "v1.36.1");
    drop(proxy);
    world.end().await;
}

#[tokio::test]
async fn a_line_that_waits_on_a_dead_carrier_takes_the_one_that_comes() {
    let world = World::new().await;
    let prod = world.cluster("prod").await;
    // It answers nothing, as one whose network has gone before the relay could know.
    let mut dead = world.dial(&prod).await.unwrap();
    world
        .until_metric(r#"throwline_relay_carriers{role="agent"}"#, |n| n == 1.0)
        .await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let carrier = proxy.carrier.clone();
    let opening = tokio::spawn(async move { carrier.open(open("prod").into()).await });
    let unanswered = dead.incoming.next().await.unwrap();
    let agent = world.agent(&prod).await;
    let (line, reply) = opening.await.unwrap().unwrap();
    assert_eq!(reply.agent_instance, "echo");
    drop((line, unanswered, dead, agent, proxy));
    world.end().await;
}
