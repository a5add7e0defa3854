//! Every limit refuses with its own code, is counted, and gives back what was held.

use throwline_relay::Tls;
use throwline_tunnel::carrier::{DialError, OpenError, dial};
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Setup, World, line, open, refused};
use crate::raw;

fn assert_limit(refusal: &Refusal) {
    assert_eq!(refusal.code(), RefusalCode::Limit);
    assert!(refusal.retry_after_ms > 0);
}

#[tokio::test]
async fn lines_of_one_user_are_limited_over_all_its_carriers() {
    let world = World::configured(|config| config.limits.lines_per_user = 2).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let anna = world.user("anna").await;
    let (here, there) = (world.proxy(&anna).await, world.proxy(&anna).await);
    let ben = world.proxy(&world.user("ben").await).await;
    let one = line(&here, "prod").await;
    let two = line(&there, "prod").await;
    assert_limit(&refused(&here, open("prod")).await);
    assert_limit(&refused(&there, open("prod")).await);
    let of_ben = line(&ben, "prod").await;
    drop(one);
    world
        .until_metric("throwline_relay_lines", |n| n == 2.0)
        .await;
    let three = line(&here, "prod").await;
    assert_eq!(
        world.metric(r#"throwline_relay_refusals_total{code="limit"}"#),
        2.0
    );
    drop((two, three, of_ben, here, there, ben, agent));
    world.end().await;
}

#[tokio::test]
async fn lines_to_one_cluster_are_limited_over_all_users() {
    let world = World::configured(|config| config.limits.lines_per_cluster = 1).await;
    let prod = world.agent(&world.cluster("prod").await).await;
    let test = world.agent(&world.cluster("test").await).await;
    let anna = world.proxy(&world.user("anna").await).await;
    let ben = world.proxy(&world.user("ben").await).await;
    let one = line(&anna, "prod").await;
    assert_limit(&refused(&ben, open("prod")).await);
    let other = line(&ben, "test").await;
    drop((one, other, anna, ben, prod, test));
    world.end().await;
}

#[tokio::test]
async fn refused_lines_hold_nothing() {
    let world = World::configured(|config| {
        config.limits.lines_per_user = 1;
        config.timing.agent_wait = std::time::Duration::ZERO;
    })
    .await;
    let proxy = world.proxy(&world.user("anna").await).await;
    for _ in 0..10 {
        let refusal = refused(&proxy, open("nowhere")).await;
        assert_eq!(refusal.code(), RefusalCode::UnknownCluster);
    }
    drop(proxy);
    world.end().await;
}

#[tokio::test]
async fn carriers_of_one_identity_are_limited() {
    let world = World::configured(|config| config.limits.carriers_per_identity = 2).await;
    let anna = world.user("anna").await;
    let one = world.proxy(&anna).await;
    let two = world.proxy(&anna).await;
    match world.dial(&anna).await {
        Err(DialError::Http {
            status,
            code,
            retry_after,
            ..
        }) => {
            assert_eq!((status, code.as_str()), (429, "limit"));
            assert!(retry_after.is_some());
        }
        other => panic!("{other:?}"),
    }
    let ben = world.proxy(&world.user("ben").await).await;
    drop(one);
    world
        .until_metric(r#"throwline_relay_carriers{role="local-proxy"}"#, |n| {
            n == 2.0
        })
        .await;
    let again = world.proxy(&anna).await;
    drop((two, again, ben));
    world.end().await;
}

#[tokio::test]
async fn a_full_relay_asks_to_come_back() {
    let world = World::configured(|config| config.limits.carriers = 1).await;
    let one = world.proxy(&world.user("anna").await).await;
    match world.dial(&world.user("ben").await).await {
        Err(DialError::Http {
            status: 503,
            retry_after: Some(_),
            ..
        }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(
        world.metric(r#"throwline_relay_handshakes_total{outcome="limit"}"#),
        1.0
    );
    drop(one);
    world.end().await;
}

#[tokio::test]
async fn streams_of_one_carrier_are_limited_and_the_carrier_lives() {
    let world = World::configured(|config| config.limits.streams_per_carrier = 4).await;
    let agent = world.agent(&world.cluster("prod").await).await;
    let proxy = world.proxy(&world.user("anna").await).await;
    let mut lines = Vec::new();
    for _ in 0..4 {
        lines.push(line(&proxy, "prod").await);
    }
    match proxy.carrier.open(open("prod").into()).await {
        Err(OpenError::Limit) => {}
        Err(OpenError::Refused(refusal)) => assert_eq!(refusal.code(), RefusalCode::Limit),
        other => panic!("{other:?}"),
    }
    assert!(!proxy.carrier.is_closed());
    lines.truncate(2);
    world
        .until_metric("throwline_relay_lines", |n| n == 2.0)
        .await;
    lines.push(line(&proxy, "prod").await);
    drop((lines, proxy, agent));
    world.end().await;
}

#[tokio::test]
async fn more_remembered_assertions_than_fit_refuse_rather_than_forget() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        configure: Box::new(|config| config.limits.remembered_assertions = 2),
        ..Setup::default()
    })
    .await;
    let user = world.user("anna").await;
    let first = raw::assertion(&user, &world.url);
    assert_eq!(raw::carrier(world.address, &first).await.status, 101);
    drop(dial(&world.dial_config(&user)).await.unwrap());
    let answer = raw::carrier(world.address, &raw::assertion(&user, &world.url)).await;
    assert_eq!(answer.status, 503);
    assert!(answer.headers.contains_key("retry-after"));
    assert_eq!(raw::carrier(world.address, &first).await.status, 401);
    world.end().await;
}

#[tokio::test]
async fn one_address_sheds_its_own_half_open_connections() {
    let world = World::configured(|config| config.limits.half_open_per_address = 3).await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(tokio::net::TcpStream::connect(world.address).await.unwrap());
    }
    let shed = "throwline_relay_half_open_shed_total";
    world.until_metric(shed, |n| n == 1.0).await;
    // It is the oldest that ends; a reset is as good as a close.
    let end = silent[0].read(&mut [0; 1]).await;
    assert!(!matches!(end, Ok(1..)));
    world
        .until_metric("throwline_relay_half_open", |n| n == 3.0)
        .await;
    drop(silent);
    world.end().await;
}

#[tokio::test]
async fn lines_in_all_are_limited() {
    let world = World::configured(|config| config.limits.lines = 1).await;
    let prod = world.agent(&world.cluster("prod").await).await;
    let anna = world.proxy(&world.user("anna").await).await;
    let ben = world.proxy(&world.user("ben").await).await;
    let one = line(&anna, "prod").await;
    assert_limit(&refused(&ben, open("prod")).await);
    assert_eq!(
        world.metric(r#"throwline_relay_limited_total{limit="lines"}"#),
        1.0
    );
    assert_eq!(
        world.metric(r#"throwline_relay_limits{limit="lines"}"#),
        1.0
    );
    drop((one, anna, ben, prod));
    world.end().await;
}

#[tokio::test]
async fn more_handshakes_than_the_rate_wait_or_are_told_when_to_come() {
    let world = World::with(Setup {
        tls: Some(Tls::Plaintext),
        configure: Box::new(|config| config.limits.handshakes_per_second = 1),
        ..Setup::default()
    })
    .await;
    let anna = world.user("anna").await;
    let dials: Vec<_> = (0..8)
        .map(|_| {
            let dialling = world.dial_config(&anna);
            tokio::spawn(async move { dial(&dialling).await })
        })
        .collect();
    let mut waits = Vec::new();
    let mut carriers = Vec::new();
    for dialled in dials {
        match dialled.await.unwrap() {
            Ok(connection) => carriers.push(connection),
            Err(error @ DialError::Http { status: 503, .. }) => {
                waits.push(error.retry_after().unwrap());
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    // One second's worth at once, five seconds' worth after a wait; the last is sent away.
    assert!(carriers.len() >= 2, "{} got in", carriers.len());
    assert!(!waits.is_empty(), "nobody was sent away");
    waits.sort_unstable();
    let moments = waits.len();
    waits.dedup();
    assert_eq!(waits.len(), moments, "two were told the same moment");
    assert!(world.metric(r#"throwline_relay_limited_total{limit="handshakes"}"#) >= 1.0);
    // A health check is answered all the same.
    assert_eq!(raw::get(world.address, "/v1/ping").await.status, 200);
    drop(carriers);
    world.end().await;
}

#[tokio::test]
async fn a_budget_that_is_used_up_slows_a_line_and_loses_nothing() {
    let world = World::configured(|config| config.limits.buffered_bytes_per_user = 0).await;
    let prod = world.agent(&world.cluster("prod").await).await;
    let anna = world.proxy(&world.user("anna").await).await;
    let mut echoed = line(&anna, "prod").await;
    let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
    let mut got = vec![0; bytes.len()];
    let (mut read, mut write) = tokio::io::split(&mut echoed);
    let sent = async {
        write.write_all(&bytes).await.unwrap();
        write.flush().await.unwrap();
    };
    let (_, all) = tokio::join!(sent, read.read_exact(&mut got));
    all.unwrap();
    assert!(got == bytes);
    drop(echoed);
    world
        .until_metric(
            r#"throwline_relay_limited_total{limit="buffers-per-user"}"#,
            |n| n > 0.0,
        )
        .await;
    drop((anna, prod));
    world.end().await;
}

#[tokio::test]
async fn greedy_users_leave_streams_of_an_agents_carrier_to_others() {
    let world = World::configured(|config| {
        config.mux.max_streams = 16;
        config.limits.lines_per_user_and_carrier = 4;
    })
    .await;
    let prod = world.agent(&world.cluster("prod").await).await;
    let mut held = Vec::new();
    let mut proxies = Vec::new();
    for number in 0..4 {
        let user = world.user(&format!("greedy-{number}")).await;
        let proxy = world.proxy(&user).await;
        while let Ok((stream, _)) = proxy.carrier.open(open("prod").into()).await {
            held.push(stream);
        }
        let refusal = refused(&proxy, open("prod")).await;
        assert_limit(&refusal);
        let why = match number {
            0..3 => "you have 4 lines open to it",
            _ => "reserved for users with few",
        };
        assert!(refusal.message.contains(why), "{}", refusal.message);
        proxies.push(proxy);
    }
    // Three have their whole share, the fourth what everybody gets.
    assert_eq!(held.len(), 13);
    for name in ["anna", "ben", "cleo"] {
        let proxy = world.proxy(&world.user(name).await).await;
        held.push(line(&proxy, "prod").await);
        proxies.push(proxy);
    }
    let limited = r#"throwline_relay_limited_total{limit="lines-per-user-and-carrier"}"#;
    assert!(world.metric(limited) >= 4.0);
    drop((held, proxies, prod));
    world.end().await;
}

#[tokio::test]
async fn over_tls_a_dialer_is_told_before_the_handshake_when_to_come() {
    let world = World::configured(|config| config.limits.handshakes_per_second = 1).await;
    let anna = world.user("anna").await;
    let dials: Vec<_> = (0..12)
        .map(|_| {
            let dialling = world.dial_config(&anna);
            tokio::spawn(async move { dial(&dialling).await })
        })
        .collect();
    let (mut waits, mut carriers) = (Vec::new(), Vec::new());
    for dialled in dials {
        match dialled.await.unwrap() {
            Ok(connection) => carriers.push(connection),
            Err(error @ DialError::Busy { .. }) => waits.push(error.retry_after().unwrap()),
            // Those that are admitted complete.
            Err(other) => panic!("{other:?}"),
        }
    }
    assert!(carriers.len() >= 2, "{} got in", carriers.len());
    assert!(!waits.is_empty(), "nobody was sent away");
    assert!(waits.iter().all(|wait| (1..=64).contains(&wait.as_secs())));
    assert_eq!(
        world.metric(r#"throwline_relay_handshakes_total{outcome="busy"}"#),
        waits.len() as f64
    );
    drop(carriers);
    world.end().await;
}
