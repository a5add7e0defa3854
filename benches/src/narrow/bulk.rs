//! Bulk transfers of kubectl that go on until they are stopped, and how many bytes have arrived.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use throwline_e2e::{Kubectl, eventually, unique};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::task::JoinHandle;

use super::source::{DOWN, PIECE, UP};

/// How long the first bytes may take.
const START: Duration = Duration::from_secs(20);
/// Of the file that is copied, most of which is never read: more than the fastest link carries in a
/// cell's limit. Its bytes are a hole's.
const ENDLESS: u64 = 4 << 30;

/// As seen from the user's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Direction {
    Down,
    Up,
}

/// What kubectl transfers beside the typing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Bulk {
    None,
    Exec(Direction),
    Cp(Direction),
    PortForward(Direction),
}

impl Bulk {
    pub(super) const ALL: [Self; 7] = [
        Self::None,
        Self::Exec(Direction::Down),
        Self::Exec(Direction::Up),
        Self::Cp(Direction::Down),
        Self::Cp(Direction::Up),
        Self::PortForward(Direction::Down),
        Self::PortForward(Direction::Up),
    ];

    /// Measured on every link, also without `--all`.
    pub(super) fn is_of_every_link(self) -> bool {
        matches!(self, Self::None | Self::Exec(_))
    }
}

impl fmt::Display for Bulk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, direction) = match self {
            Self::None => return f.write_str("none"),
            Self::Exec(direction) => ("exec", direction),
            Self::Cp(direction) => ("cp", direction),
            Self::PortForward(direction) => ("port-forward", direction),
        };
        let arrow = match direction {
            Direction::Down => "↓",
            Direction::Up => "↑",
        };
        write!(f, "{name} {arrow}")
    }
}

/// Between which ends bulk flows.
#[derive(Debug, Clone)]
pub(super) struct Ends {
    pub(super) pod: String,
    pub(super) source_port: u16,
    /// A directory that user and pod share, as both are on one machine.
    pub(super) dir: PathBuf,
}

impl Ends {
    /// A file that no copy reads to its end.
    fn endless(&self) -> anyhow::Result<PathBuf> {
        let file = self.dir.join("endless");
        if !file.exists() {
            std::fs::File::create(&file)?.set_len(ENDLESS)?;
        }
        Ok(file)
    }
}

/// Where the bytes that have arrived are counted.
#[derive(Debug)]
enum Arrived {
    Counted(Arc<AtomicU64>),
    /// The length of this file.
    Written(PathBuf),
}

/// A transfer under way. It ends when it is dropped.
pub(super) struct Flow {
    kubectl: Child,
    arrived: Arrived,
    /// Reads and writes on the user's side.
    moving: Option<JoinHandle<std::io::Result<()>>>,
}

impl Flow {
    /// Begins; returns when the first bytes have arrived. None where there is no bulk.
    pub(super) async fn start(
        bulk: Bulk,
        kubectl: &Kubectl,
        ends: &Ends,
    ) -> anyhow::Result<Option<Self>> {
        let mut flow = match bulk {
            Bulk::None => return Ok(None),
            Bulk::Exec(direction) => exec(direction, kubectl, ends),
            Bulk::Cp(direction) => cp(direction, kubectl, ends),
            Bulk::PortForward(direction) => port_forward(direction, kubectl, ends).await,
        }?;
        let begun = eventually(START, "bulk flows", || async {
            match flow.arrived() {
                0 => bail!("none of its bytes arrived"),
                _ => Ok(()),
            }
        });
        if let Err(error) = begun.await {
            // With what kubectl has to say about it.
            return Err(flow.ended().await.err().unwrap_or(error));
        }
        Ok(Some(flow))
    }

    /// Bytes so far, at the end that receives them.
    pub(super) fn arrived(&self) -> u64 {
        match &self.arrived {
            Arrived::Counted(count) => count.load(Ordering::Relaxed),
            Arrived::Written(file) => std::fs::metadata(file).map_or(0, |file| file.len()),
        }
    }

    /// An error where it has ended: none does so by itself.
    pub(super) async fn ended(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.kubectl.try_wait()? else {
            return Ok(());
        };
        let mut stderr = String::new();
        if let Some(mut pipe) = self.kubectl.stderr.take() {
            let reading = pipe.read_to_string(&mut stderr);
            let _ = tokio::time::timeout(Duration::from_secs(1), reading).await;
        }
        bail!("the bulk transfer ended with {status}: {}", stderr.trim());
    }

    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        Ok(self.kubectl.kill().await?)
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(moving) = &self.moving {
            moving.abort();
        }
        if let Arrived::Written(file) = &self.arrived {
            // A writer may hold it a moment longer; then it goes with the writer.
            let _ = std::fs::remove_file(file);
        }
    }
}

fn exec(direction: Direction, kubectl: &Kubectl, ends: &Ends) -> anyhow::Result<Flow> {
    match direction {
        Direction::Down => {
            let command = ["exec", &ends.pod, "--", "cat", "/dev/zero"];
            let mut kubectl = kubectl.command(&command).spawn()?;
            let stdout = kubectl.stdout.take().context("no output")?;
            Ok(Flow::reading(kubectl, stdout))
        }
        Direction::Up => {
            let file = ends.dir.join(unique("exec-"));
            let script = format!("cat > {}", file.display());
            let command = ["exec", "-i", &ends.pod, "--", "sh", "-c", &script];
            let mut command = kubectl.command(&command);
            let mut kubectl = command.stdin(Stdio::piped()).spawn()?;
            let mut stdin = kubectl.stdin.take().context("no input")?;
            let moving = async move {
                let piece = vec![0; PIECE];
                loop {
                    stdin.write_all(&piece).await?;
                }
            };
            Ok(Flow {
                kubectl,
                arrived: Arrived::Written(file),
                moving: Some(tokio::spawn(moving)),
            })
        }
    }
}

fn cp(direction: Direction, kubectl: &Kubectl, ends: &Ends) -> anyhow::Result<Flow> {
    let endless = ends.endless()?;
    let file = ends.dir.join(unique("copied-"));
    let inside = |path: &Path| format!("{}:{}", ends.pod, path.display());
    let (from, to) = match direction {
        Direction::Down => (inside(&endless), file.display().to_string()),
        Direction::Up => (endless.display().to_string(), inside(&file)),
    };
    Ok(Flow {
        kubectl: kubectl.command(&["cp", &from, &to]).spawn()?,
        arrived: Arrived::Written(file),
        moving: None,
    })
}

async fn port_forward(
    direction: Direction,
    kubectl: &Kubectl,
    ends: &Ends,
) -> anyhow::Result<Flow> {
    let (pod, port) = (
        format!("pod/{}", ends.pod),
        format!(":{}", ends.source_port),
    );
    let mut kubectl = kubectl.command(&["port-forward", &pod, &port]).spawn()?;
    let mut lines = BufReader::new(kubectl.stdout.take().context("no output")?).lines();
    let line = tokio::time::timeout(START, lines.next_line()).await;
    let line = line.context("no port was forwarded in time")??;
    let line = line.context("no port was forwarded")?;
    let port = forwarded(&line).with_context(|| format!("not a forwarded port: {line}"))?;
    // It prints a line a connection, and would end where it cannot.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    match direction {
        Direction::Down => {
            stream.write_all(&[DOWN]).await?;
            Ok(Flow::reading(kubectl, stream))
        }
        Direction::Up => {
            stream.write_all(&[UP]).await?;
            let (mut from, mut to) = stream.into_split();
            let count = Arc::new(AtomicU64::new(0));
            let arrived = Arrived::Counted(count.clone());
            let writing = async move {
                let piece = vec![0; PIECE];
                loop {
                    to.write_all(&piece).await?;
                }
            };
            let reading = async move {
                loop {
                    count.store(from.read_u64().await?, Ordering::Relaxed);
                }
            };
            let moving = async move {
                tokio::select! {
                    ended = writing => ended,
                    ended = reading => ended,
                }
            };
            Ok(Flow {
                kubectl,
                arrived,
                moving: Some(tokio::spawn(moving)),
            })
        }
    }
}

/// The local port in "Forwarding from 127.0.0.1:40000 -> 80".
fn forwarded(line: &str) -> Option<u16> {
    let (_, rest) = line.split_once("Forwarding from ")?;
    let address: SocketAddr = rest.split_whitespace().next()?.parse().ok()?;
    Some(address.port())
}

impl Flow {
    fn reading(kubectl: Child, mut from: impl AsyncRead + Unpin + Send + 'static) -> Self {
        let count = Arc::new(AtomicU64::new(0));
        let arrived = Arrived::Counted(count.clone());
        let moving = async move {
            let mut piece = vec![0; PIECE];
            loop {
                match from.read(&mut piece).await? {
                    0 => return Ok(()),
                    bytes => count.fetch_add(bytes as u64, Ordering::Relaxed),
                };
            }
        };
        Self {
            kubectl,
            arrived,
            moving: Some(tokio::spawn(moving)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forwarded_port_is_read_from_its_line() {
        let line = "Forwarding from 127.0.0.1:40123 -> 8080";
        assert_eq!(forwarded(line), Some(40123));
        assert_eq!(forwarded("error: no such pod"), None);
    }

    #[test]
    fn bulk_is_named_with_its_direction() {
        let names: Vec<String> = Bulk::ALL.iter().map(Bulk::to_string).collect();
        assert_eq!(names[0], "none");
        assert_eq!(names[1], "exec ↓");
        assert_eq!(names[6], "port-forward ↑");
    }
}
