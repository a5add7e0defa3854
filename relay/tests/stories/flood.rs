//! Case 1: thousands of sockets that never finish their handshake.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use throwline_certs::tls;
use throwline_tunnel::proto::busy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::{World, eventually};

/// Both ends of each socket are in this process, and other stories run beside this one.
fn affordable() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(1024_usize);
    (soft.saturating_sub(400) / 2).min(5_000)
}

/// A socket from one of the many addresses of loopback.
async fn connect(number: usize, to: SocketAddr) -> std::io::Result<TcpStream> {
    let last = u8::try_from(number % 250 + 1).unwrap_or(1);
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(IpAddr::from([127, 0, 0, last]), 0))?;
    socket.connect(to).await
}

/// Connects, and sends a byte of a TLS record now and then, without end; connects again when it is shed.
async fn drip(number: usize, to: SocketAddr, open: Arc<AtomicUsize>) {
    loop {
        let Ok(mut socket) = connect(number, to).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        open.fetch_add(1, Ordering::Relaxed);
        for byte in [0x16, 0x03, 0x01, 0x02, 0x00, 0x01].into_iter().cycle() {
            if socket.write_all(&[byte]).await.is_err() {
                break;
            }
            // One of a thousand writes a second in all.
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_dripping_sockets_do_not_keep_a_good_peer_out() {
    let count = affordable();
    // Less than the flood, so that the set is overfull whatever the machine affords.
    let room = count * 3 / 4;
    let world = World::configured(move |config| config.limits.half_open = room).await;
    let prod = world.cluster("prod").await;
    let open = Arc::new(AtomicUsize::new(0));
    let mut flood = tokio::task::JoinSet::new();
    for number in 0..count {
        flood.spawn(drip(number, world.address, Arc::clone(&open)));
    }
    eventually("the flood is there", || {
        open.load(Ordering::Relaxed) >= count
    })
    .await;
    world
        .until_metric("throwline_relay_half_open_shed_total", |n| n > 0.0)
        .await;

    let mut joined = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let agent = world.dial(&prod).await.unwrap();
        joined.push(start.elapsed());
        drop(agent);
    }
    // The middle one: a flood that starved newcomers would delay each of them, a machine that is
    // busy with other tests only some.
    joined.sort();
    assert!(
        joined[2] < Duration::from_secs(1),
        "joined after {joined:?}"
    );
    assert!(world.metric("throwline_relay_half_open") <= room as f64 + 1.0);
    flood.shutdown().await;
    world.end().await;
}

/// The first flight of a TLS handshake with this relay.
fn client_hello(world: &World) -> Vec<u8> {
    let config = tls::carrier_client(world.authority.roots(), tls::Trust::default()).unwrap();
    let name = rustls::pki_types::ServerName::from(world.address.ip());
    let mut client = rustls::ClientConnection::new(config, name).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

/// Sends hellos from one address, one connection after the other, and never goes on with a handshake
/// that the relay begins; counts those after which it shall dial again later.
async fn greet(hello: Arc<Vec<u8>>, to: SocketAddr, told: Arc<AtomicUsize>) {
    loop {
        let Ok(mut socket) = connect(8, to).await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let mut answer = Vec::new();
        if socket.write_all(&hello).await.is_ok() {
            let whole = socket.read_to_end(&mut answer);
            let _ = tokio::time::timeout(Duration::from_secs(1), whole).await;
        }
        if let [21, 3, 3, 0, 2, 2, code] = answer[..]
            && busy::retry_after(code).is_some()
        {
            told.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_from_one_address_do_not_keep_others_out() {
    let world = World::configured(|config| config.limits.handshakes_per_second = 20).await;
    let anna = world.user("anna").await;
    let hello = Arc::new(client_hello(&world));
    let told = Arc::new(AtomicUsize::new(0));
    let mut flood = tokio::task::JoinSet::new();
    for _ in 0..affordable().min(300) {
        flood.spawn(greet(Arc::clone(&hello), world.address, Arc::clone(&told)));
    }
    eventually("the flood is more than the relay takes on", || {
        told.load(Ordering::Relaxed) > 100
    })
    .await;
    let mut joined = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        // Not rejected: this address has one handshake only.
        let carrier = world.dial(&anna).await.unwrap();
        joined.push(start.elapsed());
        drop(carrier);
    }
    joined.sort();
    // A flood that was served in the order of its arrival would delay each for seconds.
    assert!(
        joined[2] < Duration::from_secs(2),
        "joined after {joined:?}"
    );
    let limited = r#"throwline_relay_limited_total{limit="handshakes"}"#;
    assert!(world.metric(limited) > 100.0);
    flood.shutdown().await;
    world.end().await;
}
