//! What people do with kubectl that lasts: each operation runs while something happens to its way,
//! and then says whether every byte was there, once and in order.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::fleet::Fleet;
use crate::pod::{self, Pod};
use crate::pty::Pty;
use crate::upstream::Upstream;
use crate::{Kubectl, eventually, unique};

/// How long an operation may take to end by itself once nothing is done to it any more.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two lines that somebody types.
const TYPING: Duration = Duration::from_millis(20);
/// Between two changes of a watched object.
const CHANGES: Duration = Duration::from_millis(30);

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Lines typed and answered, then an exit code.
    Exec,
    /// The same at a terminal.
    Terminal,
    /// `cp` of so many MiB into a pod, or out of it.
    CopyIn(usize),
    CopyOut(usize),
    /// A download of so many MiB, beside idle connections that are used at the end.
    PortForward {
        mib: usize,
        idle: usize,
    },
    /// `logs -f` of a pod that writes numbered lines as fast as it can.
    Logs,
    /// `get -w` of an object that changes.
    Watch,
    /// One list of so many MiB.
    List(usize),
}

impl Operation {
    pub fn draw(rng: &mut StdRng) -> Self {
        match rng.random_range(0..8) {
            0 => Self::Exec,
            1 => Self::Terminal,
            2 => Self::CopyIn(rng.random_range(1..60)),
            3 => Self::CopyOut(rng.random_range(1..60)),
            4 => Self::PortForward {
                mib: rng.random_range(1..60),
                idle: rng.random_range(0..20),
            },
            5 => Self::Logs,
            6 => Self::Watch,
            _ => Self::List(rng.random_range(1..60)),
        }
    }
}

/// How an operation ended that did not end well.
#[derive(Debug)]
pub enum Fault {
    /// Bytes that are wrong, missing or double, with an exit code of success.
    Corrupted(String),
    /// It failed.
    Lost(anyhow::Error),
}

/// Where operations are run.
pub struct Ground {
    pub upstream: Arc<Upstream>,
    pub namespace: String,
    /// Over the lines that are under test.
    pub kubectl: Kubectl,
}

impl Ground {
    /// A namespace in a fleet's cluster, by way of its first user to its first cluster.
    pub async fn in_fleet(fleet: &Fleet) -> Result<Arc<Self>> {
        let namespace = unique("lines-");
        let admin = fleet.upstream.admin()?;
        admin.ok(&["create", "namespace", &namespace]).await?;
        let kubectl = fleet.kubectl(0, 0).await?.namespace(&namespace);
        Ok(Arc::new(Self {
            upstream: fleet.upstream.clone(),
            namespace,
            kubectl,
        }))
    }
}

/// The longest that an operation had to wait for its next byte, where that means something.
pub type Pause = Option<Duration>;

/// An operation under way.
pub struct Running {
    /// Ends one that would go on for ever.
    enough: CancellationToken,
    task: JoinHandle<Result<Pause>>,
}

/// Wrong bytes, as opposed to none.
#[derive(Debug)]
struct Wrong(String);

impl std::fmt::Display for Wrong {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Wrong {}

fn wrong(text: String) -> anyhow::Error {
    anyhow::Error::new(Wrong(text))
}

impl Running {
    /// Begins; returns when it is under way.
    pub async fn start(operation: Operation, ground: &Arc<Ground>) -> Result<Self> {
        let enough = CancellationToken::new();
        let (begun, is_begun) = tokio::sync::oneshot::channel();
        let work = Work {
            ground: ground.clone(),
            enough: enough.clone(),
            begun: Some(begun),
        };
        let task = tokio::spawn(async move {
            match operation {
                Operation::Exec => work.exec().await,
                Operation::Terminal => work.terminal().await,
                Operation::CopyIn(mib) => work.copy_in(mib).await,
                Operation::CopyOut(mib) => work.copy_out(mib).await,
                Operation::PortForward { mib, idle } => work.port_forward(mib, idle).await,
                Operation::Logs => work.logs().await,
                Operation::Watch => work.watch().await,
                Operation::List(mib) => work.list(mib).await,
            }
        });
        if is_begun.await.is_err() {
            return match task.await? {
                Ok(_) => bail!("it ended before it began"),
                Err(error) => Err(error.context("it did not begin")),
            };
        }
        Ok(Self { enough, task })
    }

    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Nothing more happens to it: lets it come to its end, and judges it.
    pub async fn end(self) -> Result<Pause, Fault> {
        self.enough.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.task).await;
        let ended = ended
            .context("it stands still")
            .and_then(|joined| joined.context("its task"))
            .and_then(|result| result);
        ended.map_err(|error| match error.downcast_ref::<Wrong>() {
            Some(wrong) => Fault::Corrupted(wrong.0.clone()),
            None => Fault::Lost(error),
        })
    }
}

struct Work {
    ground: Arc<Ground>,
    enough: CancellationToken,
    begun: Option<tokio::sync::oneshot::Sender<()>>,
}

impl Work {
    fn begin(&mut self) {
        if let Some(begun) = self.begun.take() {
            let _ = begun.send(());
        }
    }

    async fn pod(&self, script: &str) -> Result<Pod> {
        Pod::start(&self.ground.upstream, &self.ground.namespace, script).await
    }

    fn admin(&self) -> Result<Kubectl> {
        let admin = self.ground.upstream.admin()?;
        Ok(admin.namespace(&self.ground.namespace).within(PATIENCE))
    }

    fn kubectl(&self) -> Kubectl {
        self.ground.kubectl.clone().within(PATIENCE * 2)
    }

    async fn exec(mut self) -> Result<Pause> {
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
        let (mut expected, mut pause) = (0u64, Duration::ZERO);
        while let Some(line) = lines.next_line().await? {
            if line != format!("got {expected}") {
                return Err(wrong(format!("line {expected} is {line:?}")));
            }
            self.begin();
            expected += 1;
            if let Some(sent) = sent_when.recv().await {
                pause = pause.max(sent.elapsed());
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
        Ok(Some(pause))
    }

    async fn terminal(mut self) -> Result<Pause> {
        let pod = self.pod(pod::IDLE).await?;
        let script = "stty -echo; while read -r line; do test \"$line\" = bye && exit 9; echo \"got $line.\"; done";
        let kubectl = self.kubectl();
        let command = kubectl.command(&["exec", "-i", "-t", &pod.name, "--", "sh", "-c", script]);
        let mut terminal = Pty::start(&command, 24, 200)?;
        let (mut typed, mut pause) = (0u64, Duration::ZERO);
        while !self.enough.is_cancelled() {
            terminal.type_in(&format!("{typed}\n"))?;
            let sent = Instant::now();
            let want = format!("got {typed}.");
            eventually(PATIENCE, "the terminal answers", || async {
                ensure!(terminal.screen().contains(&want), "{want:?} is not there");
                Ok(())
            })
            .await?;
            pause = pause.max(sent.elapsed());
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
        Ok(Some(pause))
    }

    async fn copy_in(mut self, mib: usize) -> Result<Pause> {
        let pod = self.pod(pod::IDLE).await?;
        let dir = crate::world::private_dir()?;
        let file = dir.path().join("file");
        let sum = random_file(&file, mib).await?;
        self.begin();
        let to = format!("{}:/tmp/{}", pod.name, unique("copied-"));
        let remote = to.split_once(':').map_or("", |(_, path)| path).to_owned();
        let kubectl = self.kubectl();
        kubectl
            .ok(&["cp", &file.display().to_string(), &to])
            .await?;
        let there = self
            .admin()?
            .ok(&["exec", &pod.name, "--", "sha256sum", &remote])
            .await?;
        self.admin()?
            .ok(&["exec", &pod.name, "--", "rm", &remote])
            .await?;
        same_sum(&sum, &there, "what was copied in")?;
        pod.remove().await?;
        Ok(None)
    }

    async fn copy_out(mut self, mib: usize) -> Result<Pause> {
        let pod = self.pod(pod::IDLE).await?;
        let remote = format!("/tmp/{}", unique("made-"));
        let made = format!(
            "head -c {} /dev/urandom > {remote}; sha256sum {remote}",
            mib << 20
        );
        let sum = self
            .admin()?
            .ok(&["exec", &pod.name, "--", "sh", "-c", &made])
            .await?;
        self.begin();
        let dir = crate::world::private_dir()?;
        let file = dir.path().join("file");
        let from = format!("{}:{remote}", pod.name);
        let kubectl = self.kubectl();
        // The tool itself resumes nothing here: what is copied is copied once.
        kubectl
            .ok(&["cp", &from, &file.display().to_string()])
            .await?;
        let here = sum_of(&file).await?;
        self.admin()?
            .ok(&["exec", &pod.name, "--", "rm", &remote])
            .await?;
        same_sum(&sum, &here, "what was copied out")?;
        pod.remove().await?;
        Ok(None)
    }

    async fn port_forward(mut self, mib: usize, idle: usize) -> Result<Pause> {
        let (pod, port, sum) =
            pod::file_server(&self.ground.upstream, &self.ground.namespace, mib).await?;
        let kubectl = self.kubectl();
        let forward = format!(":{port}");
        let mut child = kubectl
            .command(&["port-forward", &format!("pod/{}", pod.name), &forward])
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let line = lines.next_line().await?.context("no port is forwarded")?;
        let local = line
            .split_once("127.0.0.1:")
            .and_then(|(_, rest)| rest.split_whitespace().next())
            .with_context(|| format!("not a forward: {line}"))?;
        let address = format!("127.0.0.1:{local}");
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let mut waiting = Vec::new();
        for _ in 0..idle {
            waiting.push(TcpStream::connect(&address).await?);
        }
        self.begin();
        let mut count = 0;
        while count == 0 || !self.enough.is_cancelled() {
            let got = download(TcpStream::connect(&address).await?).await?;
            same_sum(&sum, &got, "what was downloaded")?;
            count += 1;
        }
        for stream in waiting {
            let got = download(stream).await.context("an idle connection")?;
            same_sum(&sum, &got, "what an idle connection brought")?;
        }
        ensure!(child.try_wait()?.is_none(), "the port-forward ended");
        child.kill().await?;
        pod.remove().await?;
        Ok(None)
    }

    async fn logs(mut self) -> Result<Pause> {
        let stop = unique("/tmp/stop-");
        let script = format!(
            "i=0; while test ! -e {stop}; do \
               for n in 0 1 2 3 4 5 6 7 8 9; do echo $i$n; done; i=$((i+1)); \
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
        let (mut expected, mut pause, mut end) = (0u64, Duration::ZERO, None);
        let mut last = Instant::now();
        while let Some(line) = lines.next_line().await? {
            if let Some(tens) = line.strip_prefix("end ") {
                end = Some(tens.parse::<u64>()? * 10);
                continue;
            }
            // Zero has a leading digit of its own: "00" is line 0, "10" is line 10.
            if line.parse::<u64>().ok() != Some(expected) {
                return Err(wrong(format!("line {expected} is {line:?}")));
            }
            self.begin();
            expected += 1;
            pause = pause.max(last.elapsed());
            last = Instant::now();
        }
        let (code, stderr) = ended(child).await?;
        stopping.await??;
        ensure!(code == Some(0), "logs ended with {code:?}: {stderr}");
        if end != Some(expected) {
            return Err(wrong(format!("{expected} lines of {end:?}")));
        }
        pod.remove().await?;
        Ok(Some(pause))
    }

    async fn watch(mut self) -> Result<Pause> {
        let name = unique("watched-");
        let admin = self.admin()?;
        admin
            .ok(&["create", "configmap", &name, "--from-literal=n=0"])
            .await?;
        let kubectl = self.kubectl();
        let mut child = kubectl
            .command(&[
                "get",
                "configmap",
                &name,
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
        let (changer, changed) = (admin.clone(), name.clone());
        let changing = tokio::spawn(async move {
            let mut count = 0u64;
            while !enough.is_cancelled() {
                count += 1;
                let patch = format!("{{\"data\": {{\"n\": \"{count}\"}}}}");
                changer
                    .ok(&["patch", "configmap", &changed, "--type=merge", "-p", &patch])
                    .await?;
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
            expected += 1;
        }
        child.kill().await?;
        admin.ok(&["delete", "configmap", &name]).await?;
        Ok(None)
    }

    async fn list(mut self, mib: usize) -> Result<Pause> {
        let namespace = unique("many-");
        let admin = self.admin()?.namespace(&namespace);
        admin.ok(&["create", "namespace", &namespace]).await?;
        let filler = "x".repeat(900 * 1024);
        for number in 0..mib {
            let manifest = serde_json::json!({
                "apiVersion": "v1", "kind": "ConfigMap",
                "metadata": {"name": format!("c{number}"), "namespace": namespace},
                "data": {"x": format!("{number}{filler}")},
            });
            admin
                .ok_with(&["create", "-f", "-"], manifest.to_string().as_bytes())
                .await?;
        }
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let expected = items(&admin.ok(&["get", "--raw", &path]).await?)?;
        self.begin();
        let kubectl = self.kubectl();
        let mut count = 0;
        while count == 0 || !self.enough.is_cancelled() {
            let got = kubectl.ok(&["get", "--raw", &path]).await?;
            if items(&got)? != expected {
                return Err(wrong("another list".to_owned()));
            }
            count += 1;
        }
        admin
            .ok(&["delete", "namespace", &namespace, "--wait=false"])
            .await?;
        Ok(None)
    }
}

/// A list's items; its own version may have moved on.
fn items(text: &str) -> Result<serde_json::Value> {
    let list: serde_json::Value = serde_json::from_str(text).map_err(|error| {
        wrong(format!(
            "a list of {} bytes is no JSON: {error}",
            text.len()
        ))
    })?;
    Ok(list["items"].clone())
}

async fn ended(mut child: Child) -> Result<(Option<i32>, String)> {
    let mut stderr = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut stderr).await?;
    }
    Ok((child.wait().await?.code(), stderr))
}

/// GET of the file server's file, to the end of the connection; the SHA-256 of its body.
async fn download(mut stream: TcpStream) -> Result<String> {
    stream
        .write_all(b"GET /file HTTP/1.0\r\nHost: pod\r\n\r\n")
        .await?;
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await?;
    let head = all
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .context("no answer")?;
    Ok(hex(&throwline_certs::sha256(&all[head + 4..])))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn same_sum(expected: &str, got: &str, what: &str) -> Result<()> {
    let first = |text: &str| text.split_whitespace().next().unwrap_or("").to_owned();
    if first(expected) != first(got) {
        return Err(wrong(format!("{what} has another checksum")));
    }
    Ok(())
}

async fn random_file(path: &std::path::Path, mib: usize) -> Result<String> {
    let mut bytes = vec![0; mib << 20];
    rand::rng().fill(&mut bytes[..]);
    let sum = hex(&throwline_certs::sha256(&bytes));
    tokio::fs::write(path, bytes).await?;
    Ok(sum)
}

async fn sum_of(path: &std::path::Path) -> Result<String> {
    Ok(hex(&throwline_certs::sha256(&tokio::fs::read(path).await?)))
}
