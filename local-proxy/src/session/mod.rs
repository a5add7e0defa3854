//! Sessions to clusters: who has one, who needs a new one.
//!
//! Each cluster has API sessions (HTTP/2, one as a rule) and one warm upgrade session (HTTP/1.1).
//! Where sessions come from is behind [`Dial`], so everything above it is tested without a relay.

mod api;
mod link;
mod renew;
mod upgrade;

pub(crate) use api::{ApiSession, Lease};
pub(crate) use link::{Link, dial_config, dial_error, open_error, refused_by_agent};
pub(crate) use upgrade::UpgradeSession;

use crate::{
    config::Timing,
    error::Failure,
    metrics::{Held, Metrics},
};
use futures::future::BoxFuture;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use throwline_tunnel::{line::Handle, mux, proto::messages::LineKind};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long a second API session to a cluster is kept without use.
const SURPLUS: Duration = Duration::from_secs(10);

/// A sealed session's byte stream.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A session fresh from its handshake.
pub(crate) struct Dialed {
    pub(crate) io: Box<dyn Io>,
    /// When it was dialled; see [`Dial::epoch`].
    pub(crate) epoch: Epoch,
    /// The line below, if that outlives its carrier.
    pub(crate) line: Option<Handle<mux::Stream>>,
    /// From end to end, as the first words had it.
    pub(crate) round_trip: Duration,
}

/// What sessions are made of: those of an earlier epoch finish what they have and take nothing new.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Epoch {
    /// Rises with the user's identity.
    pub(crate) generation: u64,
    /// Rises with each carrier, so that one that was told to drain empties. What can go on over
    /// another carrier does not care.
    pub(crate) carrier: u64,
}

/// What a session stands on.
pub(crate) struct Ground {
    epoch: Epoch,
    line: Option<Handle<mux::Stream>>,
}

impl Ground {
    fn of(dialed: &Dialed) -> Self {
        Self {
            epoch: dialed.epoch,
            line: dialed.line.clone(),
        }
    }

    fn is_current(&self, now: Epoch) -> bool {
        self.epoch.generation == now.generation
            && (self.line.is_some() || self.epoch.carrier == now.carrier)
    }

    /// A line that was cut will go on, but who comes now is better served elsewhere, or told that
    /// there is no elsewhere.
    fn is_connected(&self) -> bool {
        let line = self.line.as_ref();
        line.is_none_or(|line| line.phase().attached)
    }
}

/// Opens sealed sessions.
pub(crate) trait Dial: Send + Sync + 'static {
    fn dial<'a>(
        &'a self,
        cluster: &'a str,
        kind: LineKind,
    ) -> BoxFuture<'a, Result<Dialed, Failure>>;

    fn epoch(&self) -> Epoch;
}

/// All clusters' sessions.
pub(crate) struct Sessions {
    shared: Arc<Shared>,
    clusters: Mutex<HashMap<String, Arc<Cluster>>>,
}

/// What sessions are made with.
pub(crate) struct Shared {
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) timing: Timing,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: TaskTracker,
    /// Ends every session at once.
    pub(crate) kill: CancellationToken,
}

impl Shared {
    /// Runs `work` until it ends or everything is ended.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let held = Held::one(&self.metrics.tasks);
        let kill = self.kill.clone();
        self.tasks.spawn(async move {
            let _held = held;
            kill.run_until_cancelled_owned(work).await;
        });
    }
}

/// One cluster's sessions.
struct Cluster {
    name: String,
    api: Mutex<Vec<ApiSession>>,
    /// One opens, the others wait for what comes of it.
    opening: tokio::sync::Mutex<Option<Failure>>,
    attempts: AtomicU64,
    spare: Mutex<Spare>,
}

#[derive(Default)]
struct Spare {
    session: Option<(UpgradeSession, Instant)>,
    making: bool,
}

impl Sessions {
    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            clusters: Mutex::default(),
        }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// A place for one request on an API session. `fresh`: on one opened for it now.
    pub(crate) async fn api(&self, name: &str, fresh: bool) -> Result<Lease, Failure> {
        let cluster = self.cluster(name);
        if !fresh && let Some(lease) = cluster.lease(&self.shared) {
            return Ok(lease);
        }
        let seen = cluster.attempts.load(Ordering::Acquire);
        let mut last = cluster.opening.lock().await;
        // Whoever held the lock may have opened one, or found that none can be opened.
        if !fresh && let Some(lease) = cluster.lease(&self.shared) {
            return Ok(lease);
        }
        if cluster.attempts.load(Ordering::Acquire) != seen
            && let Some(failure) = last.as_ref()
        {
            return Err(failure.clone());
        }
        let has_far = lock(&cluster.api).iter().any(ApiSession::is_far);
        let opened = ApiSession::open(&self.shared, name, !has_far).await;
        cluster.attempts.fetch_add(1, Ordering::AcqRel);
        match opened {
            Ok(session) => {
                *last = None;
                let lease = session.lease();
                lock(&cluster.api).push(session);
                drop(last);
                self.warm(&cluster);
                Ok(lease)
            }
            Err(failure) => {
                *last = Some(failure.clone());
                drop(last);
                self.forget(&cluster);
                Err(failure)
            }
        }
    }

    /// A session for one upgraded request: the warm spare unless `fresh`. Either way the next
    /// spare is then made.
    pub(crate) async fn upgrade(&self, name: &str, fresh: bool) -> Result<UpgradeSession, Failure> {
        let cluster = self.cluster(name);
        let spare = if fresh {
            None
        } else {
            cluster.take_spare(&self.shared)
        };
        let session = match spare {
            Some(session) => Ok(session),
            None => UpgradeSession::open(&self.shared, name).await,
        };
        match &session {
            Ok(_) => self.warm(&cluster),
            Err(_) => self.forget(&cluster),
        }
        session
    }

    /// Drops what nobody has used for long, so that an idle proxy holds no sessions, and what
    /// belongs to a carrier that is to end.
    pub(crate) fn sweep(&self, now: Instant) {
        let idle = self.shared.timing.session_idle;
        let epoch = self.shared.dial.epoch();
        lock(&self.clusters).retain(|_, cluster| {
            // What is dropped here finishes what it has; a carrier that drains empties so.
            // One is enough for whoever comes next: a second was made for many requests at once, or
            // while the line of the first was cut.
            let mut has_one = false;
            lock(&cluster.api).retain(|session| {
                let is_one = session.is_connected() && !std::mem::replace(&mut has_one, true);
                let idle = if is_one { idle } else { SURPLUS.min(idle) };
                session.is_usable(epoch) && session.is_used(now, idle)
            });
            let mut spare = lock(&cluster.spare);
            if let Some((session, since)) = &spare.session
                && (!session.is_usable(epoch) || now.duration_since(*since) > idle)
            {
                spare.session = None;
            }
            let empty = spare.session.is_none() && !spare.making;
            drop(spare);
            // A count of one: nobody is about to open a session through this entry.
            !empty || !lock(&cluster.api).is_empty() || Arc::strong_count(cluster) > 1
        });
    }

    fn cluster(&self, name: &str) -> Arc<Cluster> {
        let mut clusters = lock(&self.clusters);
        if let Some(cluster) = clusters.get(name) {
            return cluster.clone();
        }
        let cluster = Arc::new(Cluster {
            name: name.to_owned(),
            api: Mutex::default(),
            opening: tokio::sync::Mutex::default(),
            attempts: AtomicU64::new(0),
            spare: Mutex::default(),
        });
        clusters.insert(name.to_owned(), cluster.clone());
        cluster
    }

    /// Names that never led anywhere must not pile up.
    fn forget(&self, cluster: &Arc<Cluster>) {
        let mut clusters = lock(&self.clusters);
        // One is the map's, one the caller's.
        if Arc::strong_count(cluster) <= 2
            && lock(&cluster.api).is_empty()
            && lock(&cluster.spare).session.is_none()
        {
            clusters.remove(&cluster.name);
        }
    }

    /// Sees to it, in the background, that the cluster has a spare upgrade session.
    fn warm(&self, cluster: &Arc<Cluster>) {
        {
            let mut spare = lock(&cluster.spare);
            let epoch = self.shared.dial.epoch();
            let good = spare
                .session
                .as_ref()
                .is_some_and(|(session, _)| session.is_usable(epoch));
            if good || spare.making {
                return;
            }
            spare.session = None;
            spare.making = true;
        }
        let making = Making(cluster.clone());
        let shared = self.shared.clone();
        self.shared.spawn(async move {
            match UpgradeSession::open(&shared, &making.0.name).await {
                Ok(session) => {
                    lock(&making.0.spare).session = Some((session, Instant::now()));
                }
                Err(failure) => {
                    tracing::debug!(cluster = making.0.name, %failure, "no spare upgrade session");
                }
            }
        });
    }

    #[cfg(test)]
    pub(crate) fn counts(&self, name: &str) -> (usize, bool) {
        let cluster = self.cluster(name);
        let api = lock(&cluster.api).len();
        let spare = lock(&cluster.spare).session.is_some();
        (api, spare)
    }
}

/// Gives the turn to make a spare back, also when the task is cancelled.
struct Making(Arc<Cluster>);

impl Drop for Making {
    fn drop(&mut self) {
        lock(&self.0.spare).making = false;
    }
}

impl Cluster {
    fn lease(&self, shared: &Shared) -> Option<Lease> {
        let epoch = shared.dial.epoch();
        let mut sessions = lock(&self.api);
        // A session that is dropped here ends when its last stream does.
        sessions.retain(|session| session.is_usable(epoch));
        sessions
            .iter()
            .find(|session| session.has_room() && session.is_connected())
            .map(ApiSession::lease)
    }

    fn take_spare(&self, shared: &Shared) -> Option<UpgradeSession> {
        let (session, _) = lock(&self.spare).session.take()?;
        (session.is_usable(shared.dial.epoch()) && session.is_connected()).then_some(session)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing under these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
