//! The kubeconfig's contexts while a local proxy runs: written at its start, and added to when
//! a cluster is enrolled meanwhile.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng as _;
use throwline_tunnel::proto::traffic::TrafficClass;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::config::Config;
use crate::error::Error;
use crate::kubeconfig::{self, Change, Entry, Files, Left, Owner, Written};
use crate::loopback::tls::LoopbackTls;
use crate::session::Link;
use crate::store::{ProxyFile, Store};

/// While there is no carrier, lists are requested less often by this factor.
const RARELY: u32 = 20;
/// Bound on the wait, at the end, for a write in progress, which then depends on the disk only.
const FINISH: Duration = Duration::from_secs(10);

pub(crate) struct Contexts {
    store: Store,
    link: Link,
    port: u16,
    files: Option<Files>,
    set_current: bool,
    /// All clusters are served, not only named ones.
    all: bool,
    every: Duration,
    /// Those that have their context.
    clusters: Vec<String>,
    /// Of these, those that another local proxy serves.
    left: Vec<Left>,
    writing: Option<JoinHandle<Result<Written, Error>>>,
    stop: Arc<AtomicBool>,
}

impl Contexts {
    pub(crate) fn new(config: &Config, store: &Store, link: &Link, port: u16) -> Self {
        let mut clusters = config.clusters.clone();
        let mut seen = HashSet::new();
        clusters.retain(|name| seen.insert(name.clone()));
        Self {
            store: store.clone(),
            link: link.clone(),
            port,
            files: config.kubeconfig.clone(),
            set_current: config.set_current,
            all: clusters.is_empty(),
            every: config.timing.list,
            clusters,
            left: Vec::new(),
            writing: None,
            stop: Arc::default(),
        }
    }

    pub(crate) fn clusters(&self) -> &[String] {
        &self.clusters
    }

    /// Writes the contexts of the clusters that are served. Dropped, it leaves the writing to [`Contexts::finish`].
    pub(crate) async fn first(&mut self, remembered: ProxyFile) -> Result<Written, Error> {
        if self.all {
            self.clusters = self.reachable(remembered).await?;
        }
        self.write(self.clusters.clone(), self.set_current).await
    }

    /// The clusters that the user may reach, or those of the last run while the relay is unreachable.
    async fn reachable(&self, remembered: ProxyFile) -> Result<Vec<String>, Error> {
        let listed = async {
            let (carrier, _) = self.link.carrier(TrafficClass::Interactive).await?;
            crate::session::list(&carrier).await
        };
        match listed.await {
            Ok(clusters) => Ok(clusters.into_iter().map(|cluster| cluster.name).collect()),
            Err(failure) if failure.may_pass() && !remembered.clusters.is_empty() => {
                tracing::warn!(%failure, "the relay cannot be asked; starting with the clusters of the last run");
                Ok(remembered.clusters)
            }
            Err(failure) => Err(failure.into()),
        }
    }

    /// Adds contexts for clusters that appear later, and takes over those of another local proxy that has
    /// ended. Contexts of clusters that disappear are kept: a cluster may reappear, and until then
    /// kubectl shows the reason why it cannot be reached.
    pub(crate) async fn keep_up(&mut self) -> Infallible {
        if !self.all && self.left.is_empty() {
            return std::future::pending().await;
        }
        let mut listed = Instant::now();
        loop {
            // Proxies that were started together, as by a login script, must not list together.
            let about = rand::rng().random_range(0.8..1.2);
            sleep(self.every.mul_f64(about)).await;
            self.take_over().await;
            if !self.all {
                continue;
            }
            // An idle proxy has no carrier; it dials for the list only seldom.
            let dial = listed.elapsed() >= self.every * RARELY;
            let clusters = match self.link.list(dial).await {
                Ok(Some(clusters)) => clusters,
                Ok(None) => continue,
                Err(failure) => {
                    tracing::debug!(%failure, "the relay was not asked for new clusters");
                    if dial {
                        listed = Instant::now();
                    }
                    continue;
                }
            };
            listed = Instant::now();
            let known: HashSet<&String> = self.clusters.iter().collect();
            let names = clusters.into_iter().map(|cluster| cluster.name);
            let new: Vec<String> = names.filter(|name| !known.contains(name)).collect();
            if new.is_empty() {
                continue;
            }
            let had = self.clusters.len();
            self.clusters.extend(new.iter().cloned());
            match self.write(new, false).await {
                Ok(written) => {
                    written.changes.iter().for_each(log);
                    for left in &written.left {
                        tracing::info!("{left}");
                    }
                }
                Err(error) => {
                    // The next list has them again.
                    self.clusters.truncate(had);
                    tracing::warn!(%error, "new clusters have no context in the kubeconfig yet");
                }
            }
        }
    }

    /// Writes the contexts that were left to a proxy which runs no more.
    async fn take_over(&mut self) {
        if self.left.is_empty() {
            return;
        }
        let left = self.left.clone();
        let ended = tokio::task::spawn_blocking(move || {
            let mut served: HashMap<PathBuf, bool> = HashMap::new();
            let mut ended = Vec::new();
            for left in left {
                let is_served = served.entry(left.dir.clone());
                if !*is_served.or_insert_with(|| left.is_served()) {
                    ended.push(left.cluster);
                }
            }
            ended
        });
        let ended = ended.await.unwrap_or_default();
        if ended.is_empty() {
            return;
        }
        match self.write(ended, false).await {
            Ok(written) => written.changes.iter().for_each(log),
            Err(error) => {
                tracing::warn!(%error, "the contexts of a local proxy that has ended stay as they are")
            }
        }
    }

    async fn write(&mut self, clusters: Vec<String>, set_current: bool) -> Result<Written, Error> {
        let owner = self.owner();
        let entries: Vec<Entry> = clusters
            .iter()
            .map(|name| LoopbackTls::entry(&self.store, name, self.port))
            .collect();
        let known = ProxyFile {
            port: Some(self.port),
            clusters: match self.all {
                true => self.clusters.clone(),
                false => Vec::new(),
            },
        };
        let (store, files, stop) = (self.store.clone(), self.files.clone(), self.stop.clone());
        let all = self.all;
        let work = move || {
            let known = match all {
                true => known,
                false => ProxyFile {
                    clusters: store.proxy_file().clusters,
                    ..known
                },
            };
            if let Err(error) = store.save_proxy_file(&known) {
                tracing::warn!(%error, "the port is not remembered");
            }
            match files {
                Some(files) => Ok(kubeconfig::write(
                    &files,
                    &owner,
                    &entries,
                    set_current,
                    &stop,
                )?),
                None => Ok(Written {
                    contexts: entries
                        .iter()
                        .map(|entry| kubeconfig::entry_name(&entry.name))
                        .collect(),
                    changes: Vec::new(),
                    left: Vec::new(),
                }),
            }
        };
        let writing = self.writing.insert(tokio::task::spawn_blocking(work));
        let written = writing.await;
        self.writing = None;
        let written = written.map_err(Error::Task)??;
        let asked: HashSet<String> = clusters.into_iter().collect();
        self.left.retain(|left| !asked.contains(&left.cluster));
        self.left.extend(written.left.iter().cloned());
        Ok(written)
    }

    /// Waits for what is being written, so that the process does not end half-way.
    pub(crate) async fn finish(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(writing) = self.writing.take() {
            let _ = timeout(FINISH, writing).await;
        }
    }

    fn owner(&self) -> Owner {
        let credentials = self.link.credentials();
        Owner {
            relay: credentials.relay.url.to_string(),
            user: credentials.identity.id().name().to_owned(),
        }
    }
}

fn log(change: &Change) {
    match change {
        Change::Added { context, file } => {
            tracing::info!(context, file = %file.display(), "a new cluster's context was added to the kubeconfig");
        }
        change => tracing::info!("{change}"),
    }
}
