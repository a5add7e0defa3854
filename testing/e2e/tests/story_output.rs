//! The last output of a command, behind a reader that is slow or paused.
//!
//! On a real cluster a command that has ended leaves output in sockets that throw it away when kubectl
//! pings. The demo cluster does the same here (`lossy_sockets`), whatever the timing: what is lost
//! directly must arrive through a line, or be missed in words.

use std::fs::File;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use throwline_e2e::kubectl::Transport;
use throwline_e2e::metrics::Metrics;
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::pty;
use throwline_e2e::{Builder, Environment, Fixture, Kubectl, Suite, eventually};
use tokio::io::{AsyncReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

/// Numbers that a command prints: 31 MB.
const LINES: usize = 4_000_000;
/// More than all buffers on a line's way and the agent's take: 63 MB.
const TOO_MANY: usize = 8_000_000;
/// More than that waits between a pod and its client: the command ends at once.
const SOCKETS: usize = 80 << 20;
/// What an agent reads on of one stream by default.
const AHEAD: usize = 8 << 20;
/// kubectl pings every 5 s.
const PAUSE: Duration = Duration::from_secs(6);
/// Several pings, of which a line that changes its stream may hold up the first.
const LONG_PAUSE: Duration = Duration::from_secs(22);
const LIMIT: Duration = Duration::from_secs(240);
const BOTH: [Transport; 2] = [Transport::WebSocket, Transport::Spdy];

fn main() -> ExitCode {
    Suite::new()
        .story("a_paused_reader_of_a_direct_kubectl_loses_output", direct)
        .story("a_paused_reader_gets_all", not_read)
        .story("a_kubectl_that_was_stopped_gets_all", stopped)
        .story("output_that_is_lost_is_missed_in_words", lost)
        .alone(
            "a_slow_reader_of_a_long_command_is_not_given_up",
            LIMIT,
            slow,
        )
        .alone("output_outlives_the_relay", LIMIT, detached)
        .run(|| Builder::default().lossy_sockets(SOCKETS).start())
}

/// An exec that prints so many numbers and ends with 7.
struct Exec {
    lines: usize,
    child: Child,
    stdout: BufReader<ChildStdout>,
}

/// What it came to.
#[derive(Debug)]
struct Ended {
    bytes: usize,
    of: usize,
    code: Option<i32>,
    stderr: String,
}

impl Exec {
    /// Returns when its first line was read, and nothing more.
    async fn start(kubectl: &Kubectl, pod: &Pod, flags: &[&str]) -> Result<Self> {
        let script = format!("echo ready; seq 1 {LINES}; exit 7");
        let command = [&pod.name, "--", "sh", "-c", &script];
        let arguments = [&["exec"], flags, &command].concat();
        Self::spawn(LINES, kubectl.command(&arguments)).await
    }

    /// In a terminal, which changes no byte of its output.
    async fn in_terminal(lines: usize, kubectl: &Kubectl, pod: &Pod, input: File) -> Result<Self> {
        let script = format!("stty -opost; echo ready; seq 1 {lines}; exit 7");
        let arguments = ["exec", "-i", "-t", &pod.name, "--", "sh", "-c", &script];
        let mut command = kubectl.command(&arguments);
        command.stdin(input);
        Self::spawn(lines, command).await
    }

    async fn spawn(lines: usize, mut command: Command) -> Result<Self> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let mut stdout = BufReader::with_capacity(6, stdout);
        let mut ready = [0; 6];
        stdout.read_exact(&mut ready).await?;
        ensure!(ready == *b"ready\n", "{ready:?}");
        Ok(Self {
            lines,
            child,
            stdout,
        })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let id = self.child.id().context("it has ended")?;
        let pid = Pid::from_raw(i32::try_from(id)?).context("a pid is not 0")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Reads to the end, after `already`, and compares every byte.
    async fn end(mut self, mut already: Vec<u8>) -> Result<Ended> {
        let mut errors = self.child.stderr.take().context("no errors")?;
        let mut stderr = String::new();
        let reading = async {
            tokio::try_join!(
                self.stdout.read_to_end(&mut already),
                errors.read_to_string(&mut stderr)
            )
        };
        let read = tokio::time::timeout(LIMIT / 2, reading).await;
        read.context("it does not end")??;
        let code = self.child.wait().await?.code();
        let expected = numbers(self.lines);
        ensure!(
            expected.starts_with(&already),
            "other bytes, of {}",
            already.len()
        );
        Ok(Ended {
            bytes: already.len(),
            of: expected.len(),
            code,
            stderr,
        })
    }
}

fn numbers(lines: usize) -> Vec<u8> {
    let mut all = Vec::new();
    for number in 1..=lines {
        all.extend(number.to_string().bytes());
        all.push(b'\n');
    }
    all
}

fn is_whole(ended: &Ended) -> Result<()> {
    ensure!(ended.bytes == ended.of, "{ended:?}");
    ensure!(ended.code == Some(7), "{ended:?}");
    Ok(())
}

/// The control: without a line, the same reader loses output.
async fn direct(env: Arc<Environment>) -> Result<()> {
    env.upstream.needs_demo("it loses output when asked to")?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let admin = env.upstream.admin()?.namespace(&env.namespace);
    for transport in BOTH {
        let exec = Exec::start(&admin.clone().over(transport), &pod, &[]).await?;
        tokio::time::sleep(PAUSE).await;
        let ended = exec.end(Vec::new()).await?;
        println!("    directly, {transport:?}: {ended:?}");
        ensure!(ended.bytes < ended.of, "{transport:?}: nothing was lost");
    }
    pod.remove().await
}

async fn not_read(env: Arc<Environment>) -> Result<()> {
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    for transport in BOTH {
        let kubectl = env.newest()?.over(transport);
        for flags in [&[][..], &["-i"]] {
            let exec = Exec::start(&kubectl, &pod, flags).await?;
            tokio::time::sleep(PAUSE).await;
            let ended = exec.end(Vec::new()).await?;
            is_whole(&ended).with_context(|| format!("{transport:?} {flags:?}"))?;
        }
    }
    pod.remove().await
}

/// It pings as soon as it goes on, before it has read anything.
async fn stopped(env: Arc<Environment>) -> Result<()> {
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    for transport in BOTH {
        let exec = Exec::start(&env.newest()?.over(transport), &pod, &[]).await?;
        exec.signal(Signal::STOP)?;
        tokio::time::sleep(PAUSE).await;
        exec.signal(Signal::CONT)?;
        let ended = exec.end(Vec::new()).await?;
        is_whole(&ended).with_context(|| format!("{transport:?}"))?;
    }
    pod.remove().await
}

/// The user of a terminal may want to interrupt, so typed input, and with it kubectl's pings, is
/// never kept waiting. What the agent has read by then arrives; the rest is reported as missing.
async fn lost(env: Arc<Environment>) -> Result<()> {
    env.upstream.needs_demo("it loses output when asked to")?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    for transport in BOTH {
        let kubectl = env.newest()?.over(transport);
        // kubectl asks for a terminal where its input is one.
        let (_keyboard, input) = pty::pair()?;
        let exec = Exec::in_terminal(TOO_MANY, &kubectl, &pod, input).await?;
        tokio::time::sleep(LONG_PAUSE).await;
        let ended = exec.end(Vec::new()).await?;
        println!("    {transport:?}: {ended:?}");
        ensure!(ended.bytes < ended.of, "{transport:?}: nothing was lost");
        ensure!(ended.bytes >= AHEAD, "{transport:?}: {ended:?}");
        // Over SPDY kubectl takes the end of its connection for success, whichever side ends it.
        let is_told = !matches!(ended.code, Some(0 | 7)) && !ended.stderr.is_empty();
        ensure!(
            is_told || transport == Transport::Spdy,
            "lost in silence: {ended:?}"
        );
        ensure!(ended.code != Some(7), "{ended:?}");
    }
    pod.remove().await
}

/// kubectl gives up a connection on which a ping has found no answer for 61 s, so pings may not wait for as
/// long as the output of a command takes that goes on.
async fn slow(_: Arc<Environment>) -> Result<()> {
    // The answers to pings come behind all that waits in sockets: here no more than is usual.
    let env = Environment::start().await?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let kubectl = env.newest()?;
    let command = ["exec", &pod.name, "--", "sh", "-c", "echo ready; yes"];
    let mut exec = Exec::spawn(0, kubectl.command(&command)).await?;
    let end = tokio::time::Instant::now() + Duration::from_secs(75);
    let mut piece = vec![0; 256 * 1024];
    while tokio::time::Instant::now() < end {
        let read = exec.stdout.read_exact(&mut piece).await;
        if let Err(error) = read {
            let mut stderr = String::new();
            let errors = exec.child.stderr.as_mut().context("no errors")?;
            errors.read_to_string(&mut stderr).await?;
            anyhow::bail!("it was given up: {error}: {stderr}");
        }
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    exec.child.kill().await?;
    pod.remove().await?;
    env.close().await
}

/// The line is without its stream, and kubectl pings, when the command has long ended.
async fn detached(_: Arc<Environment>) -> Result<()> {
    let mut env = Builder::default().lossy_sockets(SOCKETS).start().await?;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    for transport in BOTH {
        let mut exec = Exec::start(&env.newest()?.over(transport), &pod, &[]).await?;
        let mut read = vec![0; 1 << 20];
        exec.stdout.read_exact(&mut read).await?;
        env.relay.process.kill().await?;
        let reading = tokio::spawn(exec.end(read));
        tokio::time::sleep(PAUSE).await;
        env.relay.restart().await?;
        let ended = reading.await??;
        is_whole(&ended).with_context(|| format!("{transport:?}"))?;
    }
    let proxy = env.proxy.metrics().await?;
    let resumed = proxy.sum("throwline_local_proxy_line_resumptions_total", &[]);
    ensure!(resumed >= 2.0, "{resumed} resumptions");
    // What was read on is given back.
    let given_back = || async {
        let now = Metrics::of(env.agent.admin).await?;
        ensure!(now.has("throwline_agent_read_ahead_bytes"));
        ensure!(now.sum("throwline_agent_read_ahead_bytes", &[]) == 0.0);
        anyhow::Ok(())
    };
    eventually(LIMIT, "the buffer is given back", given_back).await?;
    pod.remove().await?;
    env.close().await
}
