//! What is typed, and answered.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::{Work, ended, wrong};
use crate::latency::Pauses;
use crate::pod;
use crate::pty::Pty;

/// Between two typed lines.
const TYPING: Duration = Duration::from_millis(20);
/// Between two looks at a terminal.
const LOOK: Duration = Duration::from_millis(5);

impl Work {
    pub(super) async fn exec(mut self) -> Result<Pauses> {
        let pod = self.pod(pod::IDLE).await?;
        let script = "while read -r line; do echo \"got $line\"; done; exit 7";
        let kubectl = self.kubectl();
        let mut command = kubectl.command(&["exec", "-i", &pod.name, "--", "sh", "-c", script]);
        let mut child = command.stdin(Stdio::piped()).spawn()?;
        let mut stdin = child.stdin.take().context("no input")?;
        let stdout = child.stdout.take().context("no output")?;
        let mut lines = BufReader::new(stdout).lines();
        let enough = self.enough.clone();
        let (sent_at, mut sent_when) = tokio::sync::mpsc::unbounded_channel();
        let typing = tokio::spawn(async move {
            let mut count = 0u64;
            while !enough.is_cancelled() {
                stdin.write_all(format!("{count}\n").as_bytes()).await?;
                let _ = sent_at.send(Instant::now());
                count += 1;
                tokio::time::sleep(TYPING).await;
            }
            drop(stdin);
            anyhow::Ok(count)
        });
        let mut expected = 0u64;
        while let Some(line) = lines.next_line().await? {
            if line != format!("got {expected}") {
                return Err(wrong(format!("line {expected} is {line:?}")));
            }
            self.begin();
            expected += 1;
            if let Some(sent) = sent_when.recv().await {
                self.pauses.since(sent);
            }
        }
        let (code, stderr) = ended(child).await?;
        let typed = typing.await?;
        ensure!(code == Some(7), "exec ended with {code:?}: {stderr}");
        let typed = typed?;
        if expected != typed {
            return Err(wrong(format!("{typed} lines typed, {expected} answered")));
        }
        pod.remove().await?;
        Ok(self.pauses)
    }

    pub(super) async fn terminal(mut self) -> Result<Pauses> {
        let pod = self.pod(pod::IDLE).await?;
        let script = "stty -echo; while read -r line; do test \"$line\" = bye && exit 9; echo \"got $line.\"; done";
        let kubectl = self.kubectl();
        let command = kubectl.command(&["exec", "-i", "-t", &pod.name, "--", "sh", "-c", script]);
        let mut terminal = Pty::start(&command, 24, 200)?;
        let mut typed = 0u64;
        while !self.enough.is_cancelled() {
            terminal.type_in(&format!("{typed}\n"))?;
            let sent = Instant::now();
            let want = format!("got {typed}.");
            while !terminal.screen().contains(&want) {
                ensure!(sent.elapsed() < self.patience, "{want:?} is not there");
                tokio::time::sleep(LOOK).await;
            }
            self.pauses.since(sent);
            self.begin();
            typed += 1;
        }
        terminal.type_in("bye\n")?;
        let code = terminal.ended().await?;
        let screen = terminal.screen();
        ensure!(
            code == Some(9),
            "the terminal ended with {code:?}: {screen}"
        );
        for line in 0..typed {
            let count = screen.matches(&format!("got {line}.")).count();
            if count != 1 {
                return Err(wrong(format!("line {line} is there {count} times")));
            }
        }
        pod.remove().await?;
        Ok(self.pauses)
    }
}
