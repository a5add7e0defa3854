//! Streamed output: logs and watches.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncBufReadExt, BufReader};

use super::{Work, ended, wrong};
use crate::latency::Pauses;
use crate::unique;

/// Between two changes of a watched object.
const CHANGES: Duration = Duration::from_millis(30);

impl Work {
    pub(super) async fn logs(mut self) -> Result<Pauses> {
        let stop = unique("/tmp/stop-");
        // A kubelet begins a new file after 10 MiB, and a follower of the log may miss lines then.
        let rest = match self.ground.upstream.is_demo() {
            true => "",
            false => "sleep 0.02;",
        };
        let script = format!(
            "i=0; while test ! -e {stop}; do \
               for n in 0 1 2 3 4 5 6 7 8 9; do echo $i$n; done; i=$((i+1)); {rest} \
             done; echo end $i; rm {stop}"
        );
        let pod = self.pod(&script).await?;
        let kubectl = self.kubectl();
        let mut child = kubectl.command(&["logs", "-f", &pod.name]).spawn()?;
        let stdout = child.stdout.take().context("no output")?;
        let mut lines = BufReader::with_capacity(256 * 1024, stdout).lines();
        let admin = self.admin()?;
        let (name, enough) = (pod.name.clone(), self.enough.clone());
        let stopping = tokio::spawn(async move {
            enough.cancelled().await;
            admin.ok(&["exec", &name, "--", "touch", &stop]).await
        });
        let (mut expected, mut end) = (0u64, None);
        let mut last = Instant::now();
        while let Some(line) = lines.next_line().await? {
            if let Some(tens) = line.strip_prefix("end ") {
                end = Some(tens.parse::<u64>()? * 10);
                continue;
            }
            // Zero has a leading digit, too: "00" is line 0, "10" is line 10.
            if line.parse::<u64>().ok() != Some(expected) {
                return Err(wrong(format!("line {expected} is {line:?}")));
            }
            self.begin();
            expected += 1;
            let now = Instant::now();
            self.pauses.between(last, now);
            last = now;
        }
        let (code, stderr) = ended(child).await?;
        stopping.await??;
        ensure!(code == Some(0), "logs ended with {code:?}: {stderr}");
        if end != Some(expected) {
            return Err(wrong(format!("{expected} lines of {end:?}")));
        }
        pod.remove().await?;
        Ok(self.pauses)
    }

    pub(super) async fn watch(mut self) -> Result<Pauses> {
        let name = unique("watched-");
        let admin = self.admin()?;
        admin
            .ok(&["create", "configmap", &name, "--from-literal=n=0"])
            .await?;
        let kubectl = self.kubectl();
        // As a list of one. Of an object that it is given by name, kubectl begins the watch at any
        // later state and leaves the first one out, so that a change in between would be missed.
        let selector = format!("--field-selector=metadata.name={name}");
        let mut child = kubectl
            .command(&[
                "get",
                "configmap",
                &selector,
                "-w",
                "-o",
                "jsonpath={.data.n}{\"\\n\"}",
            ])
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let first = lines.next_line().await?;
        ensure!(first.as_deref() == Some("0"), "it begins with {first:?}");
        self.begin();
        let enough = self.enough.clone();
        let (changed_at, mut changed_when) = tokio::sync::mpsc::unbounded_channel();
        let (changer, changed) = (admin.clone(), name.clone());
        let changing = tokio::spawn(async move {
            let mut count = 0u64;
            while !enough.is_cancelled() {
                count += 1;
                let patch = format!("{{\"data\": {{\"n\": \"{count}\"}}}}");
                changer
                    .ok(&["patch", "configmap", &changed, "--type=merge", "-p", &patch])
                    .await?;
                let _ = changed_at.send(Instant::now());
                tokio::time::sleep(CHANGES).await;
            }
            anyhow::Ok(count)
        });
        let mut expected = 1u64;
        let mut count = None;
        let mut changing = Some(changing);
        while count != Some(expected - 1) {
            let line = tokio::select! {
                line = lines.next_line() => line?.context("the watch ended")?,
                done = async { changing.as_mut().context("none")?.await? }, if changing.is_some() => {
                    changing = None;
                    count = Some(done?);
                    continue;
                }
            };
            if line.parse::<u64>().ok() != Some(expected) {
                return Err(wrong(format!("change {expected} is {line:?}")));
            }
            let seen = Instant::now();
            expected += 1;
            // The watch may see a change before its author has the answer.
            if let Some(changed) = changed_when.recv().await {
                self.pauses.between(changed, seen);
            }
        }
        child.kill().await?;
        admin.ok(&["delete", "configmap", &name]).await?;
        Ok(self.pauses)
    }
}
