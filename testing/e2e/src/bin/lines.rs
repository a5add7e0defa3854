//! What a line that rests costs each process it goes through. Run it by `cargo xtask lines`.
//!
//! Relay, agent and local proxy are real processes; each line is one upgraded request, as an exec
//! or a port-forward is, that has carried something both ways and then carries nothing. The figures
//! are the growth of resident memory (VmRSS) from one line to N, divided; the last line is the result.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use throwline_e2e::backend::{Backend, ECHO};
use throwline_e2e::client::Target;
use throwline_e2e::environment::{
    CLUSTER, MANY_LINES_AT_A_RELAY, MANY_LINES_AT_AN_AGENT, private_dir,
};
use throwline_e2e::metrics::Metrics;
use throwline_e2e::{Builder, Environment, Fixture, Process};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

/// Lines that are opened at once.
const OPENING: usize = 16;
/// What each carries before it rests: several frames of each layer, so that its buffers were there.
const CARRIED: usize = 64 * 1024;
/// Buffers are given back after 5 s; processes are read when they no longer shrink.
const SETTLED: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    match lines().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lines: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn lines() -> Result<()> {
    let count = asked_for()?;
    throwline_ops::limits::raise_open_files();
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let env = Builder::default()
        .relay_arguments(&MANY_LINES_AT_A_RELAY)
        .agent_arguments(&MANY_LINES_AT_AN_AGENT)
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    let context = format!("throwline-{CLUSTER}");
    let target = Target::read(&env.proxy.kubeconfig, &context)?;
    // What the first ones make is made once.
    let mut held = open_all(&target, OPENING).await?;
    let before = settled(&env).await?;
    let opened = open_all(&target, count).await;
    held.extend(opened.with_context(|| env.diagnostics())?);
    let now = Metrics::of(env.proxy.admin).await?;
    let copied = now.sum("throwline_local_proxy_upgraded", &[]);
    ensure!(copied == held.len() as f64, "{copied} lines are open");
    let after = settled(&env).await?;
    // They are still what they were.
    stream::iter(&mut held)
        .map(anyhow::Ok)
        .try_for_each_concurrent(OPENING, carry)
        .await?;
    let each = |which: usize| {
        let grown = after[which].saturating_sub(before[which]);
        grown as f64 / count as f64
    };
    println!(
        "lines={count} local_proxy_kib_per_line={:.1} relay_kib_per_line={:.1} agent_kib_per_line={:.1}",
        each(0),
        each(1),
        each(2)
    );
    Ok(())
}

fn asked_for() -> Result<usize> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match &arguments[..] {
        [] => Ok(1000),
        [flag, value] if flag == "--lines" => {
            let count = value.parse().context("--lines needs a number")?;
            ensure!(count > 0, "--lines needs a number above 0");
            Ok(count)
        }
        _ => bail!("usage: lines [--lines N]"),
    }
}

type Line = TlsStream<TcpStream>;

async fn open_all(target: &Target, count: usize) -> Result<Vec<Line>> {
    let opening = stream::iter(0..count).map(|number| async move {
        let line = open(target).await;
        line.with_context(|| format!("line {number} of {count}"))
    });
    opening.buffer_unordered(OPENING).try_collect().await
}

async fn open(target: &Target) -> Result<Line> {
    let mut line = target.connect(&[b"http/1.1"]).await?;
    let request = format!(
        "GET {}{ECHO} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
        target.prefix, target.address
    );
    line.write_all(request.as_bytes()).await?;
    line.flush().await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        ensure!(head.len() < 16 * 1024, "an endless head");
        head.push(line.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head);
    ensure!(head.starts_with("HTTP/1.1 101"), "{head}");
    carry(&mut line).await?;
    Ok(line)
}

async fn carry(line: &mut Line) -> Result<()> {
    let said = vec![b'x'; CARRIED];
    let mut heard = vec![0; CARRIED];
    let (mut read, mut write) = tokio::io::split(line);
    let said = async {
        write.write_all(&said).await?;
        write.flush().await
    };
    let both = async { tokio::try_join!(said, read.read_exact(&mut heard)) };
    tokio::time::timeout(PATIENCE, both)
        .await
        .context("a line stands still")??;
    ensure!(heard.iter().all(|byte| *byte == b'x'), "other bytes");
    Ok(())
}

/// KiB of the local proxy, the relay and the agent, once they no longer shrink.
async fn settled(env: &Environment) -> Result<[u64; 3]> {
    let read = || {
        let [proxy, relay, agent] = env.processes().map(Process::resident_kib);
        anyhow::Ok([proxy?, relay?, agent?])
    };
    let settling = async {
        let mut before = read()?;
        loop {
            tokio::time::sleep(SETTLED).await;
            let now = read()?;
            if now.iter().zip(before).all(|(now, before)| *now >= before) {
                return Ok(now);
            }
            before = now;
        }
    };
    let settling = tokio::time::timeout(PATIENCE * 2, settling);
    settling.await.context("memory shrinks for ever")?
}
