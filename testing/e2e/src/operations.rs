//! Long operations of kubectl: each runs while a fault affects its way, and then reports whether every
//! byte was there, once and in order.

mod copied;
mod streamed;
mod typed;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::io::AsyncReadExt;
use tokio::process::Child;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::Kubectl;
use crate::fleet::Fleet;
use crate::latency::Pauses;
use crate::pod::Pod;
use crate::upstream::Upstream;

/// How long an operation may take to end by itself once nothing is done to it any more.
const PATIENCE: Duration = Duration::from_secs(180);
/// The same for sizes above this many MiB.
const LARGE: usize = 100;
const PATIENCE_LARGE: Duration = Duration::from_secs(900);

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Lines typed and answered, then an exit code.
    Exec,
    /// The same at a terminal.
    Terminal,
    /// `cp` of so many MiB into a pod, or out of it, again and again.
    CopyIn(usize),
    CopyOut(usize),
    /// Downloads of so many MiB, beside idle connections that are used at the end.
    PortForward {
        mib: usize,
        idle: usize,
    },
    /// `logs -f` of a pod that writes numbered lines, in the demo cluster as fast as it can.
    Logs,
    /// `get -w` of an object that changes.
    Watch,
    /// Lists of so many MiB.
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

    pub fn name(self) -> &'static str {
        match self {
            Self::Exec => "exec",
            Self::Terminal => "exec at a terminal",
            Self::CopyIn(_) => "cp into a pod",
            Self::CopyOut(_) => "cp out of a pod",
            Self::PortForward { .. } => "port-forward",
            Self::Logs => "logs -f",
            Self::Watch => "get -w",
            Self::List(_) => "a large list",
        }
    }

    /// How long it may take to end by itself.
    fn patience(self) -> Duration {
        match self {
            Self::CopyIn(mib)
            | Self::CopyOut(mib)
            | Self::PortForward { mib, .. }
            | Self::List(mib)
                if mib > LARGE =>
            {
                PATIENCE_LARGE
            }
            _ => PATIENCE,
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
        let namespace = fleet.upstream.namespace("lines-").await?;
        let kubectl = fleet.kubectl(0, 0).await?.namespace(&namespace);
        Ok(Arc::new(Self {
            upstream: fleet.upstream.clone(),
            namespace,
            kubectl,
        }))
    }
}

/// An operation under way.
pub struct Running {
    /// Ends one that would go on without end.
    enough: CancellationToken,
    task: JoinHandle<Result<Pauses>>,
    patience: Duration,
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
        let patience = operation.patience();
        let work = Work {
            ground: ground.clone(),
            patience,
            pauses: Pauses::default(),
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
        Ok(Self {
            enough,
            task,
            patience,
        })
    }

    pub fn is_over(&self) -> bool {
        self.task.is_finished()
    }

    /// Nothing more happens to it: lets it come to its end, and judges it. All that it waited for.
    pub async fn end(self) -> Result<Pauses, Fault> {
        self.enough.cancel();
        let ended = tokio::time::timeout(self.patience, self.task).await;
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

/// One operation, as it goes.
struct Work {
    ground: Arc<Ground>,
    patience: Duration,
    pauses: Pauses,
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
        Ok(admin
            .namespace(&self.ground.namespace)
            .within(self.patience))
    }

    fn kubectl(&self) -> Kubectl {
        self.ground.kubectl.clone().within(self.patience * 2)
    }
}

/// Whether a request did not begin because there was no way: it was refused and nothing was lost.
fn is_no_way(said: &str) -> bool {
    // Of the local proxy or of the agent.
    said.contains("Error from server (ServiceUnavailable): throwline")
}

async fn ended(mut child: Child) -> Result<(Option<i32>, String)> {
    let mut stderr = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut stderr).await?;
    }
    Ok((child.wait().await?.code(), stderr))
}
