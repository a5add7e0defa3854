//! Case 1: thousands of sockets that never finish their handshake.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
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

/// Connects, and sends a byte of a TLS record now and then, for ever; comes back when it is shed.
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
