//! One local proxy from start to end.

use crate::{
    clusters::list,
    config::{Config, DEFAULT_PORT},
    error::Error,
    forward::Proxy,
    kubeconfig,
    loopback::Loopback,
    route::is_cluster_name,
    server,
    session::{Link, Sessions, Shared},
    store::{ProxyFile, Store},
};
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};
use throwline_ops::Shutdown;
use tokio::{net::TcpListener, sync::oneshot, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// Ports tried from the preferred one on.
const PORTS: u16 = 64;
/// How often unused sessions are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// Said once, when kubectl can be used.
#[derive(Clone, Debug)]
pub struct Ready {
    pub addr: SocketAddr,
    /// The port that was asked for, if another one had to be taken.
    pub instead_of: Option<u16>,
    /// The clusters' names, in the order of `contexts`.
    pub clusters: Vec<String>,
    /// `throwline-NAME` each.
    pub contexts: Vec<String>,
    /// The file that has them.
    pub kubeconfig: Option<PathBuf>,
    /// The context that `current-context` was set to, if it was.
    pub current: Option<String>,
}

/// Serves kubectl until `shutdown`, then gives open requests a short time to finish.
pub async fn run(
    config: Config,
    ready: oneshot::Sender<Ready>,
    shutdown: Shutdown,
) -> Result<(), Error> {
    if let Some(bad) = config.clusters.iter().find(|name| !is_cluster_name(name)) {
        return Err(Error::BadClusterName(bad.clone()));
    }
    let store = Store::new(&config.state_dir);
    let (credentials, loopback, remembered) = blocking({
        let store = store.clone();
        move || {
            let credentials = store.load()?;
            Ok((credentials, Loopback::open(&store)?, store.proxy_file()))
        }
    })
    .await?;
    let preferred = config.port.or(remembered.port).unwrap_or(DEFAULT_PORT);
    let (listener, addr) = listen(preferred).await?;

    let link = Link::new(
        store.clone(),
        credentials,
        config.outbound.clone(),
        config.timing.clone(),
        config.metrics.clone(),
    );
    let (kill, leave) = (CancellationToken::new(), CancellationToken::new());
    let tasks = TaskTracker::new();
    // Whatever way this function ends, also when its future is dropped, nothing outlives it.
    let _ends = [kill.clone().drop_guard(), leave.clone().drop_guard()];
    let sessions = Sessions::new(Shared {
        dial: Arc::new(link.clone()),
        timing: config.timing.clone(),
        metrics: config.metrics.clone(),
        tasks: tasks.clone(),
        kill: kill.clone(),
    });
    let driving = tokio::spawn(link.clone().drive(leave.clone()));
    let stop = async || {
        kill.cancel();
        tasks.close();
        tasks.wait().await;
        // Last, so that what sessions have said at their end still goes out.
        leave.cancel();
        // A panic in it is nobody's business any more.
        let _ = driving.await;
    };
    sessions.shared().spawn(link.clone().keep_renewed());
    let proxy = Arc::new(Proxy {
        sessions,
        only: (!config.clusters.is_empty()).then(|| config.clusters.iter().cloned().collect()),
    });

    let started = start(&config, &store, &link, addr, preferred, remembered).await;
    match started {
        Ok(started) => {
            // Whoever asked may have gone; the proxy is there all the same.
            let _ = ready.send(started);
            let sweeper = proxy.clone();
            proxy.sessions.shared().spawn(async move {
                let mut every = tokio::time::interval(SWEEP);
                loop {
                    every.tick().await;
                    sweeper.sessions.sweep(Instant::now());
                }
            });
            let timing = &config.timing;
            server::run(listener, loopback.tls, proxy.clone(), timing, shutdown).await;
            drain(&proxy, config.timing.drain).await;
            stop().await;
            Ok(())
        }
        Err(error) => {
            stop().await;
            Err(error)
        }
    }
}

async fn start(
    config: &Config,
    store: &Store,
    link: &Link,
    addr: SocketAddr,
    preferred: u16,
    remembered: ProxyFile,
) -> Result<Ready, Error> {
    let clusters = if config.clusters.is_empty() {
        reachable(link, remembered).await?
    } else {
        config.clusters.clone()
    };
    let entries: Vec<_> = clusters
        .iter()
        .map(|name| Loopback::entry(store, name, addr.port()))
        .collect();
    let set_current = config.set_current;
    let target = config.kubeconfig.clone();
    let known = ProxyFile {
        port: Some(addr.port()),
        clusters: if config.clusters.is_empty() {
            clusters.clone()
        } else {
            store.proxy_file().clusters
        },
    };
    let store = store.clone();
    let (contexts, current) = blocking(move || {
        if let Err(error) = store.save_proxy_file(&known) {
            tracing::warn!(%error, "the port is not remembered");
        }
        match target {
            Some(path) => {
                let written = kubeconfig::write(&path, &entries, set_current)?;
                Ok((written.contexts, written.current))
            }
            None => {
                let names = entries.iter().map(|e| kubeconfig::entry_name(&e.name));
                Ok((names.collect(), None))
            }
        }
    })
    .await?;
    Ok(Ready {
        addr,
        instead_of: (preferred != 0 && preferred != addr.port()).then_some(preferred),
        clusters,
        contexts,
        kubeconfig: config.kubeconfig.clone(),
        current,
    })
}

/// The clusters that the user may reach, or those of the last run while nobody can say.
async fn reachable(link: &Link, remembered: ProxyFile) -> Result<Vec<String>, Error> {
    let listed = async {
        let (carrier, _) = link.carrier().await?;
        list(&carrier).await
    };
    match listed.await {
        Ok(clusters) => Ok(clusters
            .into_iter()
            .map(|cluster| cluster.name)
            // A relay names what goes into a file of the user's.
            .filter(|name| is_cluster_name(name))
            .collect()),
        Err(failure) if failure.may_pass() && !remembered.clusters.is_empty() => {
            tracing::warn!(%failure, "the relay cannot be asked; starting with the clusters of the last run");
            Ok(remembered.clusters)
        }
        Err(failure) => Err(failure.into()),
    }
}

/// The preferred port, or the next one that is free; 0 is whatever the system gives.
async fn listen(preferred: u16) -> Result<(TcpListener, SocketAddr), Error> {
    let last = if preferred == 0 {
        0
    } else {
        preferred.saturating_add(PORTS - 1)
    };
    let failed = |source| Error::Listen {
        first: preferred,
        last,
        source,
    };
    let mut busy = None;
    for port in preferred..=last {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
            Ok(listener) => {
                let addr = listener.local_addr().map_err(failed)?;
                return Ok((listener, addr));
            }
            Err(error) => busy = Some(error),
        }
    }
    Err(failed(
        busy.unwrap_or_else(|| std::io::ErrorKind::AddrInUse.into()),
    ))
}

/// Waits, for a short while, until nothing is being answered.
async fn drain(proxy: &Proxy, grace: Duration) {
    let metrics = proxy.metrics();
    let deadline = Instant::now() + grace;
    let mut look = tokio::time::interval(Duration::from_millis(20));
    while metrics.requests_in_flight.get() > 0 && Instant::now() < deadline {
        look.tick().await;
    }
    let cut = metrics.requests_in_flight.get();
    if cut > 0 {
        tracing::info!(requests = cut, "requests are cut, the proxy stops");
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Internal(error.to_string()))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_busy_port_is_stepped_over() {
        let (_held, first) = listen(0).await.unwrap();
        let (_listener, second) = listen(first.port()).await.unwrap();
        assert!(second.port() > first.port());
        assert!(second.ip().is_loopback());
    }

    #[tokio::test]
    async fn a_wrong_name_is_refused_before_anything_is_touched() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("none"));
        config.clusters = vec!["Prod_EU".to_owned()];
        let (_trigger, shutdown) = Shutdown::new();
        let (ready, _) = oneshot::channel();
        let error = run(config, ready, shutdown).await.unwrap_err();
        assert!(matches!(error, Error::BadClusterName(_)), "{error}");
        assert!(!dir.path().join("none").exists());
    }

    #[tokio::test]
    async fn without_a_login_it_says_how_to_log_in() {
        let dir = tempfile::tempdir().unwrap();
        let (_trigger, shutdown) = Shutdown::new();
        let (ready, _) = oneshot::channel();
        let error = run(Config::new(dir.path()), ready, shutdown)
            .await
            .unwrap_err();
        assert!(error.to_string().contains("throwline login"), "{error}");
    }
}
