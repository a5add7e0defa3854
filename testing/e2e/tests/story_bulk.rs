//! What a person waits for does not wait behind bulk: at a hop where the connection of the bulk stands still,
//! keystrokes and small requests pass.

use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use throwline_e2e::environment::Builder;
use throwline_e2e::link::Link;
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{Environment, Fixture, Kubectl, Suite, eventually};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(60);
/// More than everything that is interactive here, and less than what a transfer moves at once.
const LIMIT: u64 = 2 * 1024 * 1024;
/// About 1 MB/s, of which a cluster keeps what the story takes: some 20 MB.
const PRINTING: &str = "trap 'exit 0' TERM INT; while :; do head -c 100000 /dev/zero | tr '\\0' x; echo; sleep 0.1; done";
/// In the order of the environment's links.
const HOPS: [&str; 2] = ["agent to relay", "local proxy to relay"];

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone("keystrokes_pass_a_stalled_download", minutes(5), |_| {
            beside("cat /dev/zero")
        })
        .alone("keystrokes_pass_a_stalled_upload", minutes(5), |_| {
            beside("cat >/dev/null")
        })
        .alone("requests_pass_a_stalled_answer", minutes(5), |_| {
            beside_an_answer()
        })
        .run(|| async { Ok(()) })
}

/// An endless transfer through exec, with its other end.
async fn transfer(kubectl: &Kubectl, pod: &str, script: &str) -> Result<Child> {
    let mut child = kubectl
        .command(&["exec", "-i", pod, "--", "sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut input = child.stdin.take().context("no input")?;
    discard(child.stdout.take().context("no output")?);
    tokio::spawn(async move {
        let piece = vec![0; 64 * 1024];
        while input.write_all(&piece).await.is_ok() {}
    });
    Ok(child)
}

async fn beside(script: &str) -> Result<()> {
    let env = Builder::default().by_links().start().await?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let kubectl = env.newest()?;
    let mut terminal = kubectl
        .command(&["exec", "-i", &pod.name, "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut keyboard = terminal.stdin.take().context("no input")?;
    let mut screen = BufReader::new(terminal.stdout.take().context("no output")?);
    let mut echo = async |key: &str| -> Result<()> {
        keyboard.write_all(format!("{key}\n").as_bytes()).await?;
        let mut line = String::new();
        timeout(PATIENCE, screen.read_line(&mut line))
            .await
            .context("the keystroke has not come back")??;
        ensure!(line.trim() == key, "{line:?} came back for {key}");
        Ok(())
    };
    echo("before").await?;
    let mut bulk = transfer(&kubectl, &pod.name, script).await?;
    bulk_has_moved(&env).await?;
    for (hop, link) in HOPS.into_iter().zip(&env.links) {
        stall(link).await.context(hop)?;
        for key in 0..10 {
            echo(&key.to_string()).await.context(hop)?;
        }
        listed(&kubectl, &pod).await.context(hop)?;
        release(link).context(hop)?;
        echo("between").await?;
    }
    ensure!(bulk.try_wait()?.is_none(), "the transfer has ended");
    bulk.kill().await?;
    terminal.kill().await?;
    pod.remove().await?;
    env.close().await
}

/// Requests share a session, until one of them is answered with bulk.
async fn beside_an_answer() -> Result<()> {
    let env = Builder::default().by_links().start().await?;
    let pod = Pod::start(&env.upstream, &env.namespace, PRINTING).await?;
    let kubectl = env.newest()?;
    let mut logs = kubectl
        .command(&["logs", "-f", &pod.name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    discard(logs.stdout.take().context("no output")?);
    bulk_has_moved(&env).await?;
    for (hop, link) in HOPS.into_iter().zip(&env.links) {
        stall(link).await.context(hop)?;
        for _ in 0..3 {
            listed(&kubectl, &pod).await.context(hop)?;
        }
        release(link).context(hop)?;
    }
    ensure!(logs.try_wait()?.is_none(), "the logs have ended");
    logs.kill().await?;
    pod.remove().await?;
    env.close().await
}

async fn bulk_has_moved(env: &Environment) -> Result<()> {
    eventually(PATIENCE, "bulk has a carrier at both hops", || async {
        carriers(env).await
    })
    .await
}

/// Waits until the connection of the bulk stands still at this hop: not one byte of it passes until
/// [`release`].
async fn stall(link: &Link) -> Result<()> {
    link.limit(Some(LIMIT));
    eventually(
        PATIENCE,
        "the connection of the bulk is stalled",
        || async {
            ensure!(link.stalled() > 0);
            Ok(())
        },
    )
    .await
}

fn release(link: &Link) -> Result<()> {
    ensure!(link.stalled() > 0, "bulk was not stalled meanwhile");
    link.limit(None);
    Ok(())
}

async fn listed(kubectl: &Kubectl, pod: &Pod) -> Result<()> {
    let got = kubectl.run(&["get", "pods", "-o", "name"]).await?;
    ensure!(got.text().contains(&pod.name), "{}", got.text());
    Ok(())
}

/// Reads to the end, so that the writer never waits.
fn discard(mut output: ChildStdout) {
    tokio::spawn(async move {
        let mut piece = vec![0; 64 * 1024];
        while output.read(&mut piece).await.is_ok_and(|read| read > 0) {}
    });
}

/// Each dialler has one for interactive lines and one for bulk.
async fn carriers(env: &Environment) -> Result<()> {
    let metrics = env.relay.metrics().await?;
    for role in ["role=\"agent\"", "role=\"local-proxy\""] {
        let count = metrics.sum("throwline_relay_carriers", &[role]);
        ensure!(count >= 2.0, "{count} carriers with {role}");
    }
    // The line of bulk has left the interactive one, on both sides.
    let agent = throwline_e2e::metrics::Metrics::of(env.agent.admin).await?;
    let moved = agent.sum("throwline_agent_line_resumptions_total", &[]);
    ensure!(moved >= 2.0, "the line has moved {moved} times");
    Ok(())
}
