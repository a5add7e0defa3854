//! Memory stays flat whatever passes, and a client that does not read affects no other.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt, try_join_all};
use throwline_e2e::backend::Backend;
use throwline_e2e::client::Target;
use throwline_e2e::environment::{Builder, CLUSTER, private_dir};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{Environment, Fixture, Suite, eventually};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone(
            "a_gib_answered_and_a_gib_uploaded_below_64_mib",
            minutes(5),
            a_gib_each_way,
        )
        .alone(
            "a_gib_through_exec_below_64_mib",
            minutes(6),
            a_gib_through_exec,
        )
        .alone(
            "readers_that_stop_cost_a_mib_at_most",
            minutes(4),
            readers_that_stop,
        )
        .alone(
            "stalled_readers_do_not_slow_others",
            minutes(4),
            stalled_readers,
        )
        .alone(
            "everything_is_given_back",
            minutes(3),
            everything_is_given_back,
        )
        .run(fixture)
}

const MIB: u64 = 1024 * 1024;
const GIB: u64 = 1024 * MIB;
/// What no process of ours may ever hold, whatever passes.
const CEILING_KIB: u64 = 64 * 1024;

/// An environment before an API server that sends and takes as much as a request names.
struct Loaded {
    env: Environment,
    backend: Backend,
    _dir: tempfile::TempDir,
}

async fn fixture() -> Result<Loaded> {
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let env = Builder::default()
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    Ok(Loaded {
        env,
        backend,
        _dir: dir,
    })
}

impl Fixture for Loaded {
    fn diagnostics(&self) -> String {
        self.env.diagnostics()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.env.close().await }.boxed()
    }
}

impl Loaded {
    fn target(&self) -> Result<Target> {
        Target::read(&self.env.proxy.kubeconfig, &format!("throwline-{CLUSTER}"))
    }

    fn request(&self, method: &str, path: &str, more: &str) -> Result<Vec<u8>> {
        let target = self.target()?;
        let (prefix, host) = (&target.prefix, &target.address);
        Ok(format!("{method} {prefix}{path} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n").into_bytes())
    }
}

fn below_the_ceiling(env: &Environment) -> Result<()> {
    for process in env.processes() {
        let peak = process.peak_kib()?;
        println!("  {}: at most {} MiB resident", process.name(), peak / 1024);
        ensure!(
            peak < CEILING_KIB,
            "{} held {} MiB",
            process.name(),
            peak / 1024
        );
    }
    Ok(())
}

async fn a_gib_each_way(fixture: Arc<Loaded>) -> Result<()> {
    let target = fixture.target()?;
    let mut stream = target.connect(&[b"http/1.1"]).await?;
    let close = "Connection: close\r\n";
    stream
        .write_all(&fixture.request("GET", &format!("/test/bytes/{GIB}"), close)?)
        .await?;
    stream.flush().await?;
    let mut buffer = vec![0; 256 * 1024];
    let (mut total, mut payload) = (0u64, 0u64);
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        total += count as u64;
        payload += buffer[..count].iter().filter(|byte| **byte == b'x').count() as u64;
    }
    // The body is all x; its framing and head hold few.
    ensure!(
        (GIB..GIB + 4096).contains(&payload),
        "{payload} of {total} bytes"
    );

    let mut stream = target.connect(&[b"http/1.1"]).await?;
    let length = format!("Content-Length: {GIB}\r\nContent-Type: text/plain\r\n{close}");
    stream
        .write_all(&fixture.request("POST", "/test/upload", &length)?)
        .await?;
    let piece = vec![b'y'; 256 * 1024];
    for _ in 0..GIB / piece.len() as u64 {
        stream.write_all(&piece).await?;
    }
    stream.flush().await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    ensure!(answer.starts_with("HTTP/1.1 201"), "{answer}");
    ensure!(answer.contains(&GIB.to_string()), "{answer}");
    ensure!(fixture.backend.uploaded() == GIB);
    below_the_ceiling(&fixture.env)
}

async fn a_gib_through_exec(_: Arc<Loaded>) -> Result<()> {
    let env = Environment::start().await?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let kubectl = env.newest()?;
    let script = format!("head -c {GIB} /dev/zero");
    let mut child = kubectl
        .command(&["exec", &pod.name, "--", "sh", "-c", &script])
        .spawn()?;
    let mut stdout = child.stdout.take().context("no output")?;
    let mut buffer = vec![0; 256 * 1024];
    let mut total = 0;
    loop {
        let count = stdout.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        total += count as u64;
    }
    ensure!(total == GIB, "{total} bytes came");
    ensure!(child.wait().await?.success());

    let upload = ["exec", "-i", &pod.name, "--", "sh", "-c", "wc -c"];
    let mut child = kubectl.command(&upload).stdin(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    let piece = vec![0; 256 * 1024];
    for _ in 0..GIB / piece.len() as u64 {
        stdin.write_all(&piece).await?;
    }
    drop(stdin);
    let output = child.wait_with_output().await?;
    let counted = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    ensure!(counted == GIB.to_string(), "{counted} bytes went");
    below_the_ceiling(&env)?;
    pod.remove().await?;
    env.close().await
}

/// A client that asks for a lot, reads the first bytes, and never again.
async fn stalled(fixture: &Loaded) -> Result<impl Sized> {
    let mut stream = fixture.target()?.connect(&[b"http/1.1"]).await?;
    stream
        .write_all(&fixture.request("GET", &format!("/test/bytes/{GIB}"), "")?)
        .await?;
    // TLS may hold what was written until a flush.
    stream.flush().await?;
    let mut first = [0; 64];
    stream.read_exact(&mut first).await?;
    Ok(stream)
}

/// Longer than a process takes to give back what it has freed.
const GIVEN_BACK: Duration = Duration::from_secs(4);

/// Waits until each process holds what it held a while ago, and has nothing more to give back.
async fn settled(env: &Environment) -> Result<Vec<u64>> {
    let measure = || -> Result<Vec<u64>> {
        env.processes()
            .iter()
            .map(|process| process.resident_kib())
            .collect()
    };
    eventually(
        Duration::from_secs(60),
        "memory stays where it is",
        || async {
            let before = measure()?;
            tokio::time::sleep(GIVEN_BACK).await;
            let after = measure()?;
            let calm = before
                .iter()
                .zip(&after)
                .all(|(before, after)| after.abs_diff(*before) < 512);
            ensure!(calm, "{before:?} KiB became {after:?}");
            Ok(after)
        },
    )
    .await
}

/// A mebibyte at most, in each process, for each of `count` that `what` names.
fn a_mib_each(
    env: &Environment,
    before: &[u64],
    after: &[u64],
    count: usize,
    what: &str,
) -> Result<()> {
    for ((process, before), after) in env.processes().iter().zip(before).zip(after) {
        let each = after.saturating_sub(*before) / count as u64;
        println!("  {}: {each} KiB {what}", process.name());
        ensure!(each <= 1024, "{} holds {each} KiB {what}", process.name());
    }
    Ok(())
}

async fn readers_that_stop(fixture: Arc<Loaded>) -> Result<()> {
    const READERS: usize = 40;
    // Warm: the first stalled reader fills what is shared and was never used yet.
    let first = stalled(&fixture).await?;
    let before = settled(&fixture.env).await?;
    let readers = try_join_all((0..READERS).map(|_| stalled(&fixture))).await?;
    let after = settled(&fixture.env).await?;
    a_mib_each(&fixture.env, &before, &after, READERS, "a stalled reader")?;
    drop((first, readers));
    Ok(())
}

/// The best of three measurements: what else the machine does only ever adds.
async fn quiet_p99(fixture: &Loaded) -> Result<Duration> {
    let mut best = p99(fixture).await?;
    for _ in 0..2 {
        best = best.min(p99(fixture).await?);
    }
    Ok(best)
}

/// The 99th of a hundred small requests, in order of their time.
async fn p99(fixture: &Loaded) -> Result<Duration> {
    let mut stream = fixture.target()?.connect(&[b"http/1.1"]).await?;
    let request = fixture.request("GET", "/test/small", "")?;
    let mut times = Vec::new();
    let mut buffer = vec![0; 4096];
    for _ in 0..100 {
        let start = Instant::now();
        stream.write_all(&request).await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"{}") && !answer.ends_with(b"0\r\n\r\n") {
            let read =
                tokio::time::timeout(Duration::from_secs(10), stream.read(&mut buffer)).await;
            let count = read.context("a small request is not answered")??;
            ensure!(count > 0, "the connection was closed");
            answer.extend_from_slice(&buffer[..count]);
            // A refusal would otherwise be waited out as no answer.
            ensure!(
                answer.len() < 12 || answer.starts_with(b"HTTP/1.1 200"),
                "{}",
                String::from_utf8_lossy(&answer)
            );
        }
        times.push(start.elapsed());
    }
    times.sort();
    Ok(times[98])
}

/// Case 10, end to end.
async fn stalled_readers(fixture: Arc<Loaded>) -> Result<()> {
    const READERS: usize = 500;
    p99(&fixture).await?;
    let alone = quiet_p99(&fixture).await?;
    let mut readers = Vec::new();
    for _ in 0..READERS / 50 {
        readers.extend(try_join_all((0..50).map(|_| stalled(&fixture))).await?);
    }
    // Until then their windows fill, at the speed of bulk.
    settled(&fixture.env).await?;
    let beside = quiet_p99(&fixture).await?;
    println!(
        "  p99 of a small request: {alone:?} alone, {beside:?} beside {READERS} stalled readers"
    );
    // Unmoved, but for the noise of a small number.
    ensure!(
        beside < alone * 3 + Duration::from_millis(20),
        "{alone:?} became {beside:?}"
    );
    drop(readers);
    Ok(())
}

async fn everything_is_given_back(fixture: Arc<Loaded>) -> Result<()> {
    let env = &fixture.env;
    p99(&fixture).await?;
    let descriptors = || -> Result<Vec<usize>> {
        env.processes()
            .iter()
            .map(|process| process.descriptors())
            .collect()
    };
    let before = eventually(Duration::from_secs(30), "it is quiet", || async {
        let first = descriptors()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(first == descriptors()?);
        Ok(first)
    })
    .await?;
    let lines = async || -> Result<f64> {
        let metrics = env.relay.metrics().await?;
        Ok(metrics.sum("throwline_relay_lines", &[]))
    };
    let lines_before = lines().await?;
    let readers = try_join_all((0..50).map(|_| stalled(&fixture))).await?;
    drop(readers);
    eventually(Duration::from_secs(30), "descriptors are back", || async {
        let now = descriptors()?;
        let back = before
            .iter()
            .zip(&now)
            .all(|(before, now)| *now <= before + 2);
        ensure!(back, "{before:?} became {now:?}");
        Ok(())
    })
    .await?;
    // API sessions may stay; nothing is added to them.
    let lines_after = lines().await?;
    ensure!(
        lines_after <= lines_before,
        "{lines_before} lines became {lines_after}"
    );
    Ok(())
}
