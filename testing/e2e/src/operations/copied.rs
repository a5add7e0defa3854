//! What is large, and compared by its checksum.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use aws_lc_rs::digest;
use rand::Rng;
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;

use super::{Work, wrong};
use crate::latency::Pauses;
use crate::pod::FileServer;
use crate::{pod, unique};

/// Read and written at once.
const PIECE: usize = 256 * 1024;
/// Between two looks at how far a copy has come.
const LOOK: Duration = Duration::from_millis(10);
/// What a copy must have moved before it counts as under way, and between two looks to have
/// progressed: more than its other output.
const UNDER_WAY: u64 = 512 * 1024;
const PROGRESS: u64 = 16 * 1024;

/// Objects made by one kubectl.
const AT_ONCE: usize = 20;
/// Before what could not begin is tried again.
const NO_WAY: Duration = Duration::from_millis(500);

/// Which way a copy goes, by what the system counts of its process.
#[derive(Clone, Copy)]
enum Counted {
    Read,
    Written,
}

impl Counted {
    fn field(self) -> &'static str {
        match self {
            Self::Read => "rchar:",
            Self::Written => "wchar:",
        }
    }
}

impl Work {
    pub(super) async fn copy_in(mut self, mib: usize) -> Result<Pauses> {
        let pod = self.pod(pod::IDLE).await?;
        let dir = crate::environment::private_dir()?;
        let file = dir.path().join("file");
        let sum = random_file(&file, mib).await?;
        let file = file.display().to_string();
        self.begin();
        let mut is_done = false;
        while !is_done || !self.enough.is_cancelled() {
            let remote = format!("/tmp/{}", unique("copied-"));
            let to = format!("{}:{remote}", pod.name);
            self.copy(&["cp", &file, &to], Counted::Written, mib)
                .await?;
            let there = self
                .admin()?
                .ok(&["exec", &pod.name, "--", "sha256sum", &remote])
                .await?;
            self.admin()?
                .ok(&["exec", &pod.name, "--", "rm", &remote])
                .await?;
            same_sum(&sum, &there, "what was copied in")?;
            is_done = true;
        }
        pod.remove().await?;
        Ok(self.pauses)
    }

    pub(super) async fn copy_out(mut self, mib: usize) -> Result<Pauses> {
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
        let dir = crate::environment::private_dir()?;
        let file = dir.path().join("file");
        let from = format!("{}:{remote}", pod.name);
        let mut is_done = false;
        while !is_done || !self.enough.is_cancelled() {
            // The tool itself resumes nothing here: what is copied is copied once.
            let to = file.display().to_string();
            self.copy(&["cp", &from, &to], Counted::Read, mib).await?;
            let here = sum_of(tokio::fs::File::open(&file).await?).await?;
            same_sum(&sum, &here, "what was copied out")?;
            is_done = true;
        }
        self.admin()?
            .ok(&["exec", &pod.name, "--", "rm", &remote])
            .await?;
        pod.remove().await?;
        Ok(self.pauses)
    }

    /// Copies; again where there was no way to begin it, which is no fault of a line.
    async fn copy(&mut self, arguments: &[&str], counted: Counted, mib: usize) -> Result<()> {
        let began = Instant::now();
        loop {
            match self.copy_once(arguments, counted, mib).await? {
                Ok(()) => return Ok(()),
                Err(said) if super::is_no_way(&said) && began.elapsed() < self.patience => {
                    tokio::time::sleep(NO_WAY).await;
                }
                Err(said) => bail!("{arguments:?} failed: {said}"),
            }
        }
    }

    /// Runs one copy and watches its progress. Returns its error output when it fails.
    async fn copy_once(
        &mut self,
        arguments: &[&str],
        counted: Counted,
        mib: usize,
    ) -> Result<Result<(), String>> {
        let kubectl = self.kubectl();
        let child = kubectl.command(arguments).spawn()?;
        let id = child.id().context("a copy that has just begun")?;
        let size = (mib as u64) << 20;
        let mut pauses = Pauses::default();
        let looking = async {
            let (mut known, mut last) = (0, None);
            // Its counters go with it.
            while let Some(now) = count(id, counted) {
                if now >= size {
                    break;
                }
                if now >= UNDER_WAY && now >= known + PROGRESS {
                    if let Some(last) = last {
                        pauses.since(last);
                    }
                    (known, last) = (now, Some(Instant::now()));
                }
                tokio::time::sleep(LOOK).await;
            }
            std::future::pending::<()>().await;
        };
        let output = tokio::select! {
            output = tokio::time::timeout(self.patience, child.wait_with_output()) => output,
            () = looking => unreachable!("it looks on for ever"),
        };
        let output = output.with_context(|| format!("{arguments:?} stands still"))??;
        self.pauses.merge(pauses);
        let said = String::from_utf8_lossy(&output.stderr);
        Ok(match output.status.success() {
            true => Ok(()),
            false => Err(format!("{}: {said}", output.status)),
        })
    }

    pub(super) async fn port_forward(mut self, mib: usize, idle: usize) -> Result<Pauses> {
        let FileServer {
            pod,
            port,
            file,
            small,
        } = pod::file_server(&self.ground.upstream, &self.ground.namespace, mib).await?;
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
        let mut is_done = false;
        while !is_done || !self.enough.is_cancelled() {
            let stream = TcpStream::connect(&address).await?;
            let got = download(stream, "file", Some(&mut self.pauses)).await?;
            same_sum(&file, &got, "what was downloaded")?;
            is_done = true;
        }
        for stream in waiting {
            let got = download(stream, "small", None);
            let got = got.await.context("an idle connection")?;
            same_sum(&small, &got, "what an idle connection brought")?;
        }
        ensure!(child.try_wait()?.is_none(), "the port-forward ended");
        child.kill().await?;
        pod.remove().await?;
        Ok(self.pauses)
    }

    pub(super) async fn list(mut self, mib: usize) -> Result<Pauses> {
        let namespace = self.ground.upstream.namespace("many-").await?;
        let admin = self.admin()?.namespace(&namespace);
        let filler = "x".repeat(900 * 1024);
        let numbers: Vec<usize> = (0..mib).collect();
        for numbers in numbers.chunks(AT_ONCE) {
            let one = |number: &usize| {
                serde_json::json!({
                    "apiVersion": "v1", "kind": "ConfigMap",
                    "metadata": {"name": format!("c{number}"), "namespace": namespace},
                    "data": {"x": format!("{number}{filler}")},
                })
            };
            let items: Vec<_> = numbers.iter().map(one).collect();
            let list = serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items});
            admin
                .ok_with(&["create", "-f", "-"], list.to_string().as_bytes())
                .await?;
        }
        let path = format!("/api/v1/namespaces/{namespace}/configmaps");
        let arguments = ["get", "--raw", &path];
        let expected = self.items(admin.command(&arguments), false).await?;
        // A cluster creates one there.
        ensure!(expected.len() >= mib, "{} items", expected.len());
        self.begin();
        let mut is_done = false;
        while !is_done || !self.enough.is_cancelled() {
            let command = self.kubectl().command(&arguments);
            match self.items(command, true).await {
                Ok(got) if got == expected => is_done = true,
                Ok(_) => return Err(wrong("another list".to_owned())),
                Err(error) if super::is_no_way(&format!("{error:#}")) => {
                    tokio::time::sleep(NO_WAY).await;
                }
                Err(error) => return Err(error),
            }
        }
        admin
            .ok(&["delete", "namespace", &namespace, "--wait=false"])
            .await?;
        Ok(self.pauses)
    }

    /// The checksums of a list's items; its own version may have moved on. `timed`: between its
    /// first byte and its last.
    async fn items(&mut self, mut command: Command, timed: bool) -> Result<Vec<Sum>> {
        let mut child = command.stderr(Stdio::piped()).spawn()?;
        let mut stdout = child.stdout.take().context("no output")?;
        let (mut all, mut last) = (Vec::new(), None);
        let pauses = &mut self.pauses;
        let reading = async {
            loop {
                all.reserve(PIECE);
                let count = stdout.read_buf(&mut all).await?;
                let now = Instant::now();
                if let Some(last) = last.filter(|_| timed) {
                    pauses.between(last, now);
                }
                last = Some(now);
                if count == 0 {
                    return anyhow::Ok(());
                }
            }
        };
        let reading = tokio::time::timeout(self.patience, reading);
        reading.await.context("a list stands still")??;
        let (code, stderr) = super::ended(child).await?;
        ensure!(code == Some(0), "a list ended with {code:?}: {stderr}");
        let length = all.len();
        let parsed = tokio::task::spawn_blocking(move || serde_json::from_slice::<List>(&all));
        let list = parsed.await?;
        let list = list.map_err(|error| wrong(format!("a list of {length} bytes: {error}")))?;
        Ok(list.items)
    }
}

#[derive(Deserialize)]
struct List {
    items: Vec<Sum>,
}

/// An item's checksum: a list of them is small.
#[derive(Debug, PartialEq, Eq)]
struct Sum([u8; 32]);

impl<'de> Deserialize<'de> for Sum {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let item = serde_json::Value::deserialize(deserializer)?;
        Ok(Self(throwline_certs::sha256(item.to_string().as_bytes())))
    }
}

/// What a process has read or written so far; none when it has ended.
fn count(id: u32, counted: Counted) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{id}/io")).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(counted.field()));
    line?.trim().parse().ok()
}

/// GET of a file server's file, to the end of the connection; the SHA-256 of its body.
async fn download(
    mut stream: TcpStream,
    file: &str,
    mut pauses: Option<&mut Pauses>,
) -> Result<String> {
    let request = format!("GET /{file} HTTP/1.0\r\nHost: pod\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut last = Instant::now();
    let mut head = Vec::new();
    let mut sum = digest::Context::new(&digest::SHA256);
    let mut is_body = false;
    let mut piece = vec![0; PIECE];
    loop {
        let count = stream.read(&mut piece).await?;
        let now = Instant::now();
        if let Some(pauses) = &mut pauses {
            pauses.between(last, now);
        }
        last = now;
        let piece = piece.get(..count).unwrap_or_default();
        if count == 0 {
            break;
        }
        if is_body {
            sum.update(piece);
            continue;
        }
        head.extend_from_slice(piece);
        if let Some(end) = head.windows(4).position(|window| window == b"\r\n\r\n") {
            is_body = true;
            sum.update(head.get(end + 4..).unwrap_or_default());
        }
    }
    ensure!(is_body, "no answer");
    Ok(hex(sum.finish().as_ref()))
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

async fn random_file(path: &Path, mib: usize) -> Result<String> {
    let mut file = tokio::fs::File::create(path).await?;
    let mut piece = vec![0; 1 << 20];
    for _ in 0..mib {
        rand::rng().fill(&mut piece[..]);
        file.write_all(&piece).await?;
    }
    file.flush().await?;
    sum_of(tokio::fs::File::open(path).await?).await
}

async fn sum_of(mut from: impl AsyncRead + Unpin) -> Result<String> {
    let mut sum = digest::Context::new(&digest::SHA256);
    let mut piece = vec![0; PIECE];
    loop {
        match from.read(&mut piece).await? {
            0 => return Ok(hex(sum.finish().as_ref())),
            count => sum.update(piece.get(..count).unwrap_or_default()),
        }
    }
}
