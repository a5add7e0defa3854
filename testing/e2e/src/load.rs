//! A load on all proxies of a fleet, that counts what it asked and knows of each failure whose it
//! was, when it began and when it ended.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::client::Target;
use crate::fleet::{Fleet, cluster_name, clusters_of};
use crate::{Kubectl, eventually};

/// How long a request may take before it counts as failed.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two requests of one worker: there are many, and one machine.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests on one connection, before a new one is made as a new kubectl would.
const ON_ONE_CONNECTION: usize = 20;

/// A load, until it is stopped or dropped.
pub struct Load {
    counts: Arc<Counts>,
    stop: CancellationToken,
    _stops: DropGuard,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Counts {
    raw: AtomicU64,
    kubectl: AtomicU64,
    failed: Mutex<Vec<Failed>>,
    /// For each worker, when its last request succeeded.
    last_good: Mutex<Vec<Instant>>,
}

/// Who asks, and before which cluster: by their numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    pub user: usize,
    pub cluster: usize,
}

/// A request that failed.
#[derive(Debug, Clone)]
pub struct Failed {
    pub way: Way,
    pub began: Instant,
    pub at: Instant,
    pub why: String,
}

/// What a load has done.
#[derive(Debug)]
pub struct Done {
    pub raw: u64,
    pub kubectl: u64,
    pub failed: Vec<Failed>,
}

/// One that asks without end.
struct Worker {
    counts: Arc<Counts>,
    number: usize,
    way: Way,
    stop: CancellationToken,
}

impl Load {
    /// A worker for each context of each proxy, asking the API server for small things, and one
    /// that runs kubectl for each of the first `kubectls` proxies.
    pub async fn start(fleet: &Fleet, kubectls: usize) -> Result<Self> {
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let counts: Arc<Counts> = Arc::default();
        let worker = |way| {
            let mut last = lock(&counts.last_good);
            last.push(Instant::now());
            Worker {
                counts: Arc::clone(&counts),
                number: last.len() - 1,
                way,
                stop: stop.clone(),
            }
        };
        for (user, proxy) in fleet.proxies.iter().enumerate() {
            let proxy = proxy.lock().await;
            let clusters = clusters_of(user, fleet.agents.len());
            for cluster in clusters.iter().copied() {
                let context = format!("throwline-{}", cluster_name(cluster));
                let target = Target::read(&proxy.kubeconfig, &context)?;
                tasks.spawn(worker(Way { user, cluster }).ask_raw(target));
            }
            let first = clusters.first().copied().filter(|_| user < kubectls);
            if let Some(cluster) = first {
                let kubectl = fleet.kubectl_at(&proxy, cluster)?;
                tasks.spawn(worker(Way { user, cluster }).ask_kubectl(kubectl));
            }
        }
        tasks.close();
        Ok(Self {
            counts,
            _stops: stop.clone().drop_guard(),
            stop,
            tasks,
        })
    }

    /// Waits until every worker has succeeded after now; returns how long the slowest took.
    pub async fn all_succeed(&self, limit: Duration) -> Result<Duration> {
        let from = Instant::now();
        eventually(limit, "every worker succeeds again", || async {
            let last = lock(&self.counts.last_good);
            let waiting = last.iter().filter(|good| **good <= from).count();
            ensure!(waiting == 0, "{waiting} workers have not succeeded");
            Ok(())
        })
        .await?;
        let last_failure = lock(&self.counts.failed)
            .iter()
            .filter(|failed| failed.at >= from)
            .map(|failed| failed.at - from)
            .max();
        Ok(last_failure.unwrap_or_default())
    }

    pub fn failures(&self) -> Vec<Failed> {
        lock(&self.counts.failed).clone()
    }

    /// How many requests have ended so far.
    pub fn requests(&self) -> u64 {
        self.counts.raw.load(Ordering::Relaxed) + self.counts.kubectl.load(Ordering::Relaxed)
    }

    /// Lets what is under way end, and tells what was done.
    pub async fn stop(self) -> Result<Done> {
        self.stop.cancel();
        if tokio::time::timeout(PATIENCE * 2, self.tasks.wait())
            .await
            .is_err()
        {
            bail!("a request of the load does not end");
        }
        Ok(Done {
            raw: self.counts.raw.load(Ordering::Relaxed),
            kubectl: self.counts.kubectl.load(Ordering::Relaxed),
            failed: self.failures(),
        })
    }
}

impl Worker {
    async fn ask_raw(self, target: Target) {
        let mut connection: Option<(http1::SendRequest<Empty<Bytes>>, usize)> = None;
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let asked = async {
                let (sender, left) = match connection.take() {
                    Some((sender, left)) if left > 0 && !sender.is_closed() => (sender, left),
                    _ => (connect(&target).await?, ON_ONE_CONNECTION),
                };
                connection = Some((get(sender, &target).await?, left - 1));
                Ok(())
            };
            let outcome = match tokio::time::timeout(PATIENCE, asked).await {
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow::anyhow!("no answer within {PATIENCE:?}")),
            };
            self.note(began, outcome, &self.counts.raw);
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn ask_kubectl(self, kubectl: Kubectl) {
        while !self.stop.is_cancelled() {
            let began = Instant::now();
            let outcome = kubectl.ok(&["get", "namespaces"]).await.map(drop);
            self.note(began, outcome, &self.counts.kubectl);
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn note(&self, began: Instant, outcome: Result<()>, of: &AtomicU64) {
        of.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(()) => {
                if let Some(last) = lock(&self.counts.last_good).get_mut(self.number) {
                    *last = Instant::now();
                }
            }
            Err(error) => lock(&self.counts.failed).push(Failed {
                way: self.way,
                began,
                at: Instant::now(),
                why: format!("{error:#}"),
            }),
        }
    }
}

async fn connect(target: &Target) -> Result<http1::SendRequest<Empty<Bytes>>> {
    let stream = target.connect(&[b"http/1.1"]).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with its sender.
    tokio::spawn(connection);
    Ok(sender)
}

async fn get(
    mut sender: http1::SendRequest<Empty<Bytes>>,
    target: &Target,
) -> Result<http1::SendRequest<Empty<Bytes>>> {
    let request = http::Request::get(format!("{}/api/v1/namespaces/default", target.prefix))
        .header(http::header::HOST, &target.address)
        .body(Empty::new())?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let text = String::from_utf8_lossy(&body);
    ensure!(status == 200, "{status}: {text}");
    ensure!(text.contains("\"Namespace\""), "not whole: {text}");
    Ok(sender)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Done {
    /// One line, for people.
    pub fn line(&self) -> String {
        let failed = self.failed.len();
        let (raw, kubectl) = (self.raw, self.kubectl);
        format!("requests={raw} kubectl={kubectl} failed={failed}")
    }

    /// Fails with the first few failures, if there are any.
    pub fn none_failed(&self) -> Result<()> {
        let some: Vec<&str> = self
            .failed
            .iter()
            .take(5)
            .map(|one| one.why.as_str())
            .collect();
        ensure!(some.is_empty(), "{}:\n{}", self.line(), some.join("\n"));
        Ok(())
    }
}
