//! What each layer of an idle carrier holds at a relay, counted by the allocator.
//!
//! Each layer is built many times, and the allocation for one is printed. Where both ends are
//! alike, one is half of a pair; where they are not, ours is what is given back when it is dropped.
//! The whole is a relay in this process whose agents are in another. Prints one line of JSON, in
//! bytes; `throwline-benches idle` reads it.

use std::alloc::System;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::AsyncWriteExt as _;
use rustls::pki_types::ServerName;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use throwline_authority::Authority;
use throwline_certs::tls::{self, HttpsCertificate, RelayCertificate};
use throwline_ops::Shutdown;
use throwline_tunnel::carrier::{self, AcceptConfig, Connection, DialConfig, Prover};
use throwline_tunnel::proto::messages::Role;
use throwline_tunnel::ws;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use url::Url;

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How often each layer is built.
const COUNT: usize = 400;
/// For tasks to rest, and for what was closed to be given back.
const SETTLE: Duration = Duration::from_secs(2);
/// How long agents may take to connect.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::main]
async fn main() -> Result<()> {
    throwline_ops::limits::raise_open_files();
    let dir = throwline_e2e::environment::private_dir()?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url: Url = format!("https://localhost:{}", listener.local_addr()?.port()).parse()?;
    let state = dir.path().join("relay");
    let authority = Authority::open_or_create(&state, &url).await?;
    authority.set_relay_url(&url).await?;

    let socket = sockets_held().await?;
    let tls = tls_held(&authority, &url).await? - socket;
    let websocket = websocket_held().await? - socket;
    let carrier = carrier_held().await? - socket - websocket;
    let whole = relay_held(listener, authority, &url, &state).await?;
    let layers = serde_json::json!({
        "socket": socket,
        "tls": tls,
        "websocket": websocket,
        "multiplexer": carrier,
        "whole": whole,
    });
    println!("{layers}");
    Ok(())
}

/// Bytes that are allocated now.
fn held() -> f64 {
    let stats = HEAP.stats();
    stats.bytes_allocated as f64 - stats.bytes_deallocated as f64
}

async fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let near = TcpStream::connect(listener.local_addr()?).await?;
    let (far, _) = listener.accept().await?;
    Ok((near, far))
}

async fn sockets_held() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut all = Vec::with_capacity(COUNT);
    let before = held();
    for _ in 0..COUNT {
        all.push(pair(&listener).await?);
    }
    Ok((held() - before) / (2 * COUNT) as f64)
}

/// The relay's end, its socket with it.
async fn tls_held(authority: &Authority, url: &Url) -> Result<f64> {
    let certificate = HttpsCertificate::issue(Arc::new(authority.clone()), url).await?;
    let certificate = RelayCertificate::Own(Arc::new(certificate));
    let acceptor = TlsAcceptor::from(tls::relay_server(certificate)?);
    let connector = TlsConnector::from(tls::carrier_client(
        authority.roots(),
        tls::Trust::default(),
    )?);
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (mut near, mut far) = (Vec::with_capacity(COUNT), Vec::with_capacity(COUNT));
    for _ in 0..COUNT {
        let (dialled, accepted) = pair(&listener).await?;
        let name = ServerName::try_from("localhost")?;
        let (dialled, accepted) =
            tokio::join!(connector.connect(name, dialled), acceptor.accept(accepted));
        near.push(Box::new(dialled?));
        far.push(Box::new(accepted?));
    }
    let before = held();
    far.clear();
    tokio::time::sleep(SETTLE).await;
    Ok((before - held()) / COUNT as f64)
}

/// One end that has sent and received, its socket with it.
async fn websocket_held() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let config = ws::Config::default();
    let mut all = Vec::with_capacity(COUNT);
    let before = held();
    for _ in 0..COUNT {
        let (near, far) = pair(&listener).await?;
        let (near, far) = tokio::join!(
            ws::wrap(near, Bytes::new(), ws::Side::Client, &config),
            ws::wrap(far, Bytes::new(), ws::Side::Server, &config)
        );
        let mut ends = [near, far];
        for (io, driver) in &mut ends {
            io.write_all(&[7; 64]).await?;
            driver.flush().await?;
        }
        for (io, _) in &mut ends {
            futures::AsyncReadExt::read_exact(io, &mut [0; 64]).await?;
        }
        all.push(ends);
    }
    Ok((held() - before) / (2 * COUNT) as f64)
}

/// One end of a carrier that is driven, its WebSocket and socket with it.
async fn carrier_held() -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let prover = Arc::new(Prover {
        assertion: Box::new(|_| Ok("assertion".to_owned())),
        sign: Box::new(|transcript| Ok(transcript.to_vec())),
        sha256: |_| [7; 32],
        id: "spiffe://bench/cluster/c".to_owned(),
    });
    let dial = DialConfig::new("http://localhost".parse()?, None, prover, Role::Agent, "a");
    let mut all: Vec<(Connection, Connection)> = Vec::with_capacity(COUNT);
    let before = held();
    for _ in 0..COUNT {
        let (near, far) = pair(&listener).await?;
        let (near, far) = tokio::join!(
            carrier::dial_over(near, &dial),
            carrier::accept(far, AcceptConfig::new("bench"), |_, _| Ok(()))
        );
        all.push((near?, far?.0));
    }
    tokio::time::sleep(SETTLE).await;
    Ok((held() - before) / (2 * COUNT) as f64)
}

/// All that a relay allocates for an agent; the agents are in a process of their own.
async fn relay_held(
    listener: TcpListener,
    authority: Authority,
    url: &Url,
    state: &Path,
) -> Result<f64> {
    let (_stop, shutdown) = Shutdown::new();
    let config = throwline_relay::Config::new(url.clone(), throwline_relay::Tls::Own);
    tokio::spawn(throwline_relay::run(
        listener,
        None,
        Arc::new(authority),
        config,
        shutdown,
    ));
    // The first ones make what all share.
    let first = agents(state, url, "first-", 20).await?;
    tokio::time::sleep(SETTLE).await;
    let before = held();
    let rest = agents(state, url, "rest-", COUNT).await?;
    tokio::time::sleep(SETTLE).await;
    let each = (held() - before) / COUNT as f64;
    drop((first, rest));
    ensure!(each > 0.0, "nothing was allocated for {COUNT} agents");
    Ok(each)
}

/// Gone with its handle.
async fn agents(
    state: &Path,
    url: &Url,
    prefix: &str,
    count: usize,
) -> Result<tokio::process::Child> {
    let benches = std::env::current_exe()?.with_file_name("throwline-benches");
    let mut child = tokio::process::Command::new(benches)
        .args(["agents", "--public", url.as_str(), "--prefix", prefix])
        .args(["--count", &count.to_string(), "--state"])
        .arg(state)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let output = child.stdout.take().context("no standard output")?;
    let mut lines = BufReader::new(output).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await??;
    line.context("the agents ended at once")?;
    Ok(child)
}
