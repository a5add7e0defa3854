//! One local proxy from start to end.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use throwline_ops::{Drain, Shutdown};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cluster_name::is_cluster_name;
use crate::config::{Config, DEFAULT_PORT};
use crate::contexts::Contexts;
use crate::error::Error;
use crate::instance_lock::{InstanceLock, LockError};
use crate::kubeconfig::{Change, Left};
use crate::loopback::server;
use crate::loopback::tls::LoopbackTls;
use crate::request::proxy::{LargeHeads, Proxy};
use crate::session::{Link, SessionContext, Sessions};
use crate::store::{Store, StoreError};

/// Ports tried from the preferred one on.
const PORTS: u16 = 64;
/// How long to wait for another proxy of the same state directory that is stopping, and how
/// often to try.
const PREDECESSOR: Duration = Duration::from_secs(2);
const PREDECESSOR_POLL: Duration = Duration::from_millis(100);
/// How often unused sessions are closed.
const SWEEP: Duration = Duration::from_secs(5);

/// Sent once, when kubectl can be used.
#[derive(Clone, Debug)]
pub struct Ready {
    pub addr: SocketAddr,
    /// The port that was asked for, if another one had to be taken.
    pub instead_of: Option<u16>,
    /// The clusters' names, in the order of `contexts`.
    pub clusters: Vec<String>,
    /// Their names in the kubeconfig, `throwline-NAME` each unless that was taken.
    pub contexts: Vec<String>,
    /// All that was changed in the kubeconfig.
    pub changes: Vec<Change>,
    /// Contexts that another local proxy of this relay and user serves, and keeps.
    pub left: Vec<Left>,
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
    let deadline = Instant::now() + PREDECESSOR;
    let open = || {
        let store = store.clone();
        blocking(move || {
            // An expired certificate is renewed at the first dial.
            let credentials = store.load_even_expired()?;
            store.prepare()?;
            let instance = lock(&store)?;
            let loopback = LoopbackTls::open(&store)?;
            Ok((credentials, instance, loopback, store.proxy_file()))
        })
    };
    let (credentials, mut instance, loopback, remembered) = loop {
        match open().await {
            // The predecessor may still be stopping, as after a restart by a service manager.
            Err(Error::AlreadyRuns { .. }) if Instant::now() < deadline => tokio::select! {
                () = tokio::time::sleep(PREDECESSOR_POLL) => {}
                () = shutdown.requested() => return Ok(()),
            },
            opened => break opened?,
        }
    };
    let preferred = config.port.or(remembered.port).unwrap_or(DEFAULT_PORT);
    // The port is in every kubeconfig, so the one that was used before is taken again where it is
    // free.
    let (listener, addr) = listen(preferred).await?;
    instance.set_address(addr);

    let link = Link::new(
        store.clone(),
        credentials,
        config.outbound.clone(),
        config.timing.clone(),
        config.metrics.clone(),
    );
    let (kill, leave) = (CancellationToken::new(), CancellationToken::new());
    let tasks = TaskTracker::new();
    // However this function ends, also when its future is dropped, no task outlives it.
    let _ends = [kill.clone().drop_guard(), leave.clone().drop_guard()];
    let sessions = Arc::new(Sessions::new(SessionContext {
        dial: Arc::new(link.clone()),
        timing: config.timing.clone(),
        limits: config.limits.session,
        metrics: config.metrics.clone(),
        tasks: tasks.clone(),
        kill: kill.clone(),
    }));
    // The driver stops last and by a separate token: the sessions above need its carrier to end
    // cleanly.
    let driving = tokio::spawn(link.clone().drive(leave.clone()));
    let stop = async || {
        kill.cancel();
        tasks.close();
        tasks.wait().await;
        // Last, so that the final bytes of sessions are still sent.
        leave.cancel();
        // A panic of the driver has no consequence at this point.
        let _ = driving.await;
    };
    sessions.context().spawn(link.clone().keep_renewed());
    let proxy = Arc::new(Proxy {
        large_heads: Arc::new(LargeHeads::new(config.limits.loopback.large_heads)),
        drain: Drain::new(),
        sessions,
        only: (!config.clusters.is_empty()).then(|| config.clusters.iter().cloned().collect()),
    });

    let mut contexts = Contexts::new(&config, &store, &link, addr.port());
    let first = tokio::select! {
        first = contexts.first(remembered) => first.map(Some),
        () = shutdown.requested() => Ok(None),
    };
    let written = match first {
        Ok(Some(written)) => written,
        // Stopped during the start, or the start failed. A write of the kubeconfig in progress
        // is completed.
        ended => {
            contexts.finish().await;
            stop().await;
            return ended.map(drop);
        }
    };
    let started = Ready {
        addr,
        instead_of: (preferred != 0 && preferred != addr.port()).then_some(preferred),
        clusters: contexts.clusters().to_vec(),
        contexts: written.contexts,
        changes: written.changes,
        left: written.left,
    };
    // The receiver may have been dropped; the proxy runs nevertheless.
    let _ = ready.send(started);
    let proving = link.clone().keep_proved(proxy.sessions.clone());
    proxy.sessions.context().spawn(proving);
    let sweeper = proxy.clone();
    proxy.sessions.context().spawn(async move {
        let mut every = tokio::time::interval(SWEEP);
        loop {
            every.tick().await;
            sweeper.sessions.sweep(Instant::now());
        }
    });
    let (timing, limits) = (&config.timing, config.limits.loopback);
    let serving = server::run(
        listener,
        loopback.tls,
        proxy.clone(),
        timing,
        limits,
        shutdown,
    );
    tokio::pin!(serving);
    tokio::select! {
        () = &mut serving => {}
        never = contexts.keep_up() => match never {},
    }
    contexts.finish().await;
    if let Err(requests) = proxy.drain.drained_within(config.timing.drain).await {
        tracing::info!(requests, "open requests are reset, the proxy stops");
    }
    stop().await;
    drop(instance);
    Ok(())
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

fn lock(store: &Store) -> Result<InstanceLock, Error> {
    let path = InstanceLock::path(store.dir());
    InstanceLock::acquire(&path).map_err(|error| match error {
        LockError::Held { holder } => Error::AlreadyRuns {
            dir: store.dir().to_owned(),
            holder,
        },
        LockError::Io(source) => StoreError::Unwritable { path, source }.into(),
    })
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(Error::Task)?
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
