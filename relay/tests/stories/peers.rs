//! Lines to agents that are connected to another relay of the set.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use throwline_certs::Identity;
use throwline_certs::tls::{RelayIdentity, Trust, carrier_client, peer_client};
use throwline_relay::registry::{
    Membership, Memory, PeerRelay, Presence, Registry, Remote, Route, Tunnel,
};
use throwline_tunnel::carrier::{Connection, DialConfig, DialError, dial};
use throwline_tunnel::proto::messages::{Open, RefusalCode, Role};
use throwline_tunnel::proto::traffic::TrafficClass;
use tokio::net::TcpListener;

use crate::harness::{Setup, World, eventually, line, open, prover, refused};

/// What a shared registry would tell: this relay's own tunnels, and those that a story places
/// elsewhere.
#[derive(Default)]
struct Told {
    own: Memory,
    elsewhere: Mutex<Vec<(String, Remote)>>,
    away: Mutex<Option<Duration>>,
    /// Not known, and so perhaps several.
    relays: tokio::sync::watch::Sender<u32>,
}

impl Told {
    fn place(&self, cluster: &str, relay: &PeerRelay) {
        let remote = Remote {
            relay: relay.clone(),
            agent_instance: String::new(),
            certificate: String::new(),
            class: TrafficClass::Interactive,
            since: SystemTime::now(),
        };
        self.elsewhere
            .lock()
            .unwrap()
            .push((cluster.to_owned(), remote));
    }
}

#[async_trait]
impl Registry for Told {
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership {
        self.own.join(tunnel).await
    }

    async fn find(&self, cluster: &str) -> Presence {
        if let Some(away) = *self.away.lock().unwrap() {
            return Presence::Unknown(away);
        }
        let own = self.own.find(cluster).await;
        let mut routes = match own {
            Presence::Connected(routes) => routes,
            _ => Vec::new(),
        };
        let elsewhere = self.elsewhere.lock().unwrap();
        let placed = elsewhere.iter().filter(|(name, _)| name == cluster);
        routes.extend(placed.map(|(_, remote)| Route::There(remote.clone())));
        if routes.is_empty() {
            return Presence::Gone(Duration::from_secs(3600));
        }
        Presence::Connected(routes)
    }

    async fn connected(&self, cluster: &str) {
        self.own.connected(cluster).await;
    }

    async fn drain(&self) {
        self.own.drain().await;
    }

    fn relays(&self) -> tokio::sync::watch::Receiver<u32> {
        self.relays.subscribe()
    }
}

struct Member {
    world: World,
    told: Arc<Told>,
    relay: PeerRelay,
}

/// Relays of one authority, as `first` has made it.
async fn member(instance: &'static str, first: Option<&Member>) -> Member {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let relay = PeerRelay {
        instance: instance.to_owned(),
        address: listener.local_addr().unwrap().to_string(),
    };
    let told = Arc::new(Told::default());
    let world = World::with(Setup {
        authority: first.map(|first| first.world.authority.clone()),
        registry: Some(told.clone()),
        peers: Some(listener),
        configure: Box::new(move |config| config.instance = instance.to_owned()),
        ..Setup::default()
    })
    .await;
    Member { world, told, relay }
}

async fn two() -> (Member, Member) {
    let one = member("one", None).await;
    let two = member("two", Some(&one)).await;
    (one, two)
}

/// Dials the listener for peers by hand.
async fn dial_peer(
    at: &Member,
    tls: Arc<rustls::ClientConfig>,
    identity: &Identity,
    role: Role,
) -> Result<Connection, DialError> {
    let url = format!("https://{}", at.relay.address).parse().unwrap();
    let config = DialConfig::new(url, Some(tls), Arc::new(prover(identity)), role, "by-hand");
    dial(&config).await
}

async fn relay_identity(member: &Member, instance: &str) -> RelayIdentity {
    let authority = Arc::new(member.world.authority.clone());
    RelayIdentity::issue(authority, instance).await.unwrap()
}

#[tokio::test]
async fn a_line_goes_to_the_relay_that_has_the_agent_and_no_further() {
    let (one, two) = two().await;
    let mut agent = two.world.agent(&two.world.cluster("prod").await).await;
    one.told.place("prod", &two.relay);
    let user = one.world.user("anna").await;
    let proxy = one.world.proxy(&user).await;

    let first = line(&proxy, "prod").await;
    let second = line(&proxy, "prod").await;
    let opened: Open = agent.opened.recv().await.unwrap();
    assert_eq!(opened.user, one.world.user_id("anna"));
    assert!(opened.client_addr.starts_with("127.0.0.1:"));
    let carriers = r#"throwline_relay_carriers{role="relay"}"#;
    assert_eq!(two.world.metric(carriers), 1.0, "both lines on one carrier");
    for (world, direction) in [(&one.world, "out"), (&two.world, "in")] {
        let series = format!(r#"throwline_relay_forwarded_lines_total{{direction="{direction}"}}"#);
        assert_eq!(world.metric(&series), 2.0, "{direction}");
    }

    // Two thinks that a third has it; one asks two all the same, and is not led in a circle.
    one.told.place("test", &two.relay);
    two.told.place("test", &one.relay);
    two.world.cluster("test").await;
    let refusal = refused(&proxy, open("test")).await;
    assert_eq!(refusal.code(), RefusalCode::Offline, "{refusal}");

    drop((first, second));
    for world in [&one.world, &two.world] {
        world
            .until_metric("throwline_relay_lines", |n| n == 0.0)
            .await;
    }
    drop((agent, proxy));
}

#[tokio::test]
async fn a_relay_that_is_gone_is_passed_by() {
    let (one, two) = two().await;
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = PeerRelay {
        instance: "gone".to_owned(),
        address: closed.local_addr().unwrap().to_string(),
    };
    drop(closed);
    let _agent = two.world.agent(&two.world.cluster("prod").await).await;
    one.told.place("prod", &gone);
    one.told.place("prod", &two.relay);
    let proxy = one.world.proxy(&one.world.user("anna").await).await;
    let start = Instant::now();
    for _ in 0..5 {
        line(&proxy, "prod").await;
    }
    // Known to be gone, it is not dialled for each line, but again after 3 s.
    let failures = one.world.metric("throwline_relay_peer_failures_total");
    let most = 1.0 + (start.elapsed().as_secs_f64() / 3.0).floor();
    assert!(
        (1.0..=most).contains(&failures),
        "{failures} of at most {most}"
    );
}

#[tokio::test]
async fn another_relay_at_that_address_gets_no_line() {
    let (one, two) = two().await;
    let _agent = two.world.agent(&two.world.cluster("prod").await).await;
    let other = PeerRelay {
        instance: "three".to_owned(),
        ..two.relay.clone()
    };
    one.told.place("prod", &other);
    let proxy = one.world.proxy(&one.world.user("anna").await).await;
    let refusal = refused(&proxy, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::Offline, "{refusal}");
    // The agent may be on its way for 5 s, and a relay that failed is left alone for 3 s.
    let failures = one.world.metric("throwline_relay_peer_failures_total");
    assert!((1.0..=2.0).contains(&failures), "{failures}");
}

#[tokio::test]
async fn a_draining_relay_still_takes_lines_from_its_peers() {
    let (one, two) = two().await;
    let agent = two.world.agent(&two.world.cluster("prod").await).await;
    one.told.place("prod", &two.relay);
    let proxy = one.world.proxy(&one.world.user("anna").await).await;
    let held = line(&proxy, "prod").await;
    two.world.trigger.trigger();
    eventually("the public door is closed", || {
        std::net::TcpStream::connect(two.world.address).is_err()
    })
    .await;
    line(&proxy, "prod").await;
    drop((held, agent));
    two.world.ended().await;
}

#[tokio::test]
async fn each_door_is_for_its_own_kind() {
    let (one, two) = two().await;
    let user = one.world.user("anna").await;
    let relay = relay_identity(&one, "forged").await;

    // A relay's identity at the public door.
    let public = one.world.dial(&relay.current()).await;
    assert!(
        matches!(public, Err(DialError::Unauthenticated)),
        "{public:?}"
    );

    // A user at the door for peers: without a relay's certificate, and with a stolen connection.
    let tls = carrier_client(one.world.authority.roots(), Trust::default()).unwrap();
    let bare = dial_peer(&two, tls, &user, Role::LocalProxy).await;
    assert!(bare.is_err(), "{bare:?}");
    let tls = peer_client(&relay, "two").unwrap();
    let lent = dial_peer(&two, tls, &user, Role::LocalProxy).await;
    assert!(matches!(lent, Err(DialError::Unauthenticated)), "{lent:?}");

    // Two names: one in TLS, another in the assertion.
    let tls = peer_client(&relay, "two").unwrap();
    let other = relay_identity(&one, "other").await.current();
    let connection = dial_peer(&two, tls, &other, Role::Relay).await;
    if let Ok(connection) = connection {
        let opened = connection.carrier.open(open("prod").into()).await;
        assert!(opened.is_err(), "{opened:?}");
    }
    let carriers = r#"throwline_relay_carriers{role="relay"}"#;
    assert_eq!(two.world.metric(carriers), 0.0);
}

#[tokio::test]
async fn what_a_relay_forwards_is_checked() {
    let (one, two) = two().await;
    let _agent = two.world.agent(&two.world.cluster("prod").await).await;
    let relay = relay_identity(&one, "by-hand").await;
    let tls = peer_client(&relay, "two").unwrap();
    let peer = dial_peer(&two, tls, &relay.current(), Role::Relay)
        .await
        .unwrap();
    let good = Open {
        user: one.world.user_id("anna"),
        client_addr: "192.0.2.1:5000".to_owned(),
        ..open("prod")
    };
    let opened = peer.carrier.open(good.clone().into()).await;
    assert!(opened.is_ok(), "{opened:?}");
    for (what, bad) in [
        (
            "no user",
            Open {
                user: String::new(),
                ..good.clone()
            },
        ),
        (
            "another domain's",
            Open {
                user: "spiffe://elsewhere.example/user/anna".to_owned(),
                ..good.clone()
            },
        ),
        (
            "a cluster",
            Open {
                user: good.user.replace("/user/anna", "/cluster/prod"),
                ..good.clone()
            },
        ),
        (
            "two lines of log",
            Open {
                client_addr: "192.0.2.1:5000\nforged".to_owned(),
                ..good.clone()
            },
        ),
    ] {
        let refusal = refused(&peer, bad).await;
        assert_eq!(refusal.code(), RefusalCode::BadRequest, "{what}: {refusal}");
    }
}

#[tokio::test]
async fn a_database_that_is_away_too_long_is_named() {
    let (one, _two) = two().await;
    one.world.cluster("prod").await;
    *one.told.away.lock().unwrap() = Some(Duration::from_secs(700));
    let proxy = one.world.proxy(&one.world.user("anna").await).await;
    let refusal = refused(&proxy, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::Internal);
    assert!(
        refusal
            .message
            .contains("database has not answered for 700 s"),
        "{refusal}"
    );
}
