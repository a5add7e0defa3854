//! `kubectl exec -i POD -- cat`, typed into at the pace of a fast typist: how long each line takes to come
//! back.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use throwline_e2e::Kubectl;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;

/// Between two lines, whether the last one has come back or not.
const PACE: Duration = Duration::from_millis(100);
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// An exec that echoes. It ends when it is dropped.
pub(super) struct Typing {
    _kubectl: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Typing {
    /// Begins; returns when a first line has come back.
    pub(super) async fn start(kubectl: &Kubectl, pod: &str) -> anyhow::Result<Self> {
        let mut command = kubectl.command(&["exec", "-i", pod, "--", "cat"]);
        let mut kubectl = command
            .stdin(Stdio::piped())
            // A pipe that is not read could fill.
            .stderr(Stdio::null())
            .spawn()?;
        let stdin = kubectl.stdin.take().context("no input")?;
        let stdout = kubectl.stdout.take().context("no output")?;
        let mut this = Self {
            _kubectl: kubectl,
            stdin,
            lines: BufReader::new(stdout).lines(),
        };
        this.echoes(1).await?;
        Ok(this)
    }

    /// Types so many lines; how long each took.
    pub(super) async fn echoes(&mut self, count: usize) -> anyhow::Result<Vec<Duration>> {
        let (typed, mut typed_at) = mpsc::unbounded_channel();
        let (stdin, lines) = (&mut self.stdin, &mut self.lines);
        let typing = async move {
            let mut pace = tokio::time::interval(PACE);
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            for number in 0..count {
                pace.tick().await;
                let _ = typed.send(Instant::now());
                // One write, so that it is one message.
                stdin
                    .write_all(format!("{}\n", line(number)).as_bytes())
                    .await?;
                stdin.flush().await?;
            }
            anyhow::Ok(())
        };
        let reading = async move {
            let mut times = Vec::with_capacity(count);
            for number in 0..count {
                let echo = tokio::time::timeout(PATIENCE, lines.next_line()).await;
                let echo = echo.with_context(|| format!("line {number} did not come back"))??;
                let echo = echo.context("the exec that is typed into has ended")?;
                ensure!(echo == line(number), "{echo:?} came back as line {number}");
                let at = typed_at.recv().await.context("no line was typed")?;
                times.push(at.elapsed());
            }
            anyhow::Ok(times)
        };
        let ((), times) = tokio::try_join!(typing, reading)?;
        Ok(times)
    }
}

/// Of a few letters, as a key is.
fn line(number: usize) -> String {
    format!("k{number}")
}
