//! All clusters' sessions: reuse, opening, idle timeout.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::time::Instant;

use crate::failure::Failure;
use crate::mutex::lock;
use crate::session::api::{ApiSession, Lease};
use crate::session::context::SessionContext;
use crate::session::upgrade::UpgradeSession;

/// API sessions of one cluster that move bulk before a request has to share one with it.
const SESSIONS_BESIDE_BULK: usize = 4;

/// All clusters' sessions.
pub(crate) struct Sessions {
    context: Arc<SessionContext>,
    clusters: Mutex<HashMap<String, Arc<Cluster>>>,
}

/// One cluster's sessions.
struct Cluster {
    name: String,
    api: Mutex<Vec<ApiSession>>,
    /// One task opens a session; the others wait for its outcome.
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
    pub(crate) fn new(context: SessionContext) -> Self {
        Self {
            context: Arc::new(context),
            clusters: Mutex::default(),
        }
    }

    pub(crate) fn context(&self) -> &SessionContext {
        &self.context
    }

    /// A lease for one request on an API session. `fresh`: on a session opened for it now.
    pub(crate) async fn api(&self, name: &str, fresh: bool) -> Result<Lease, Failure> {
        let cluster = self.cluster(name);
        if !fresh && let Some(lease) = cluster.lease(&self.context) {
            return Ok(lease);
        }
        let seen = cluster.attempts.load(Ordering::Acquire);
        let mut last = cluster.opening.lock().await;
        // The previous holder of the lock may have opened a session, or failed to.
        if !fresh && let Some(lease) = cluster.lease(&self.context) {
            return Ok(lease);
        }
        if cluster.attempts.load(Ordering::Acquire) != seen
            && let Some(failure) = last.as_ref()
        {
            return Err(failure.clone());
        }
        let has_far = lock(&cluster.api).iter().any(ApiSession::is_far);
        let opened = ApiSession::open(&self.context, name, !has_far).await;
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
            cluster.take_spare(&self.context)
        };
        let session = match spare {
            Some(session) => Ok(session),
            None => UpgradeSession::open(&self.context, name).await,
        };
        match &session {
            Ok(_) => self.warm(&cluster),
            Err(_) => self.forget(&cluster),
        }
        session
    }

    /// Drops sessions without recent use, so that an idle proxy holds none, and those of a carrier
    /// that is draining.
    pub(crate) fn sweep(&self, now: Instant) {
        let timing = &self.context.timing;
        let idle = timing.session_idle;
        let epoch = self.context.dial.epoch();
        lock(&self.clusters).retain(|_, cluster| {
            // A dropped session finishes its streams, so a draining carrier empties.
            // One idle session is enough: a second was opened for many requests at once, beside bulk, or
            // while the line of the first was detached.
            let mut has_one = false;
            lock(&cluster.api).retain(|session| {
                let may_be_one = session.is_connected() && !session.is_bulk();
                let is_one = may_be_one && !std::mem::replace(&mut has_one, true);
                let idle = if is_one {
                    idle
                } else {
                    timing.surplus_session_idle.min(idle)
                };
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
            // A count of one: no task is about to open a session through this entry.
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

    /// Removes the entry of a name without sessions, so that unknown names do not accumulate.
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

    /// Opens a spare upgrade session in the background, if there is none.
    fn warm(&self, cluster: &Arc<Cluster>) {
        {
            let mut spare = lock(&cluster.spare);
            let epoch = self.context.dial.epoch();
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
        let context = self.context.clone();
        self.context.spawn(async move {
            match UpgradeSession::open(&context, &making.0.name).await {
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

/// Resets [`Spare::making`], also when the task is cancelled.
struct Making(Arc<Cluster>);

impl Drop for Making {
    fn drop(&mut self) {
        lock(&self.0.spare).making = false;
    }
}

impl Cluster {
    fn lease(&self, context: &SessionContext) -> Option<Lease> {
        let epoch = context.dial.epoch();
        let mut sessions = lock(&self.api);
        // A session that is dropped here ends when its last stream does.
        sessions.retain(|session| session.is_usable(epoch));
        let mut usable = sessions
            .iter()
            .filter(|session| session.has_room() && session.is_connected());
        // Small answers would wait behind a large one. A session more is opened for them, within bounds:
        // every one of them may come to move bulk.
        let any = (sessions.len() >= SESSIONS_BESIDE_BULK).then(|| usable.clone().next_back());
        let found = usable.find(|session| !session.is_bulk()).or(any.flatten());
        found.map(ApiSession::lease)
    }

    fn take_spare(&self, context: &SessionContext) -> Option<UpgradeSession> {
        let (session, _) = lock(&self.spare).session.take()?;
        (session.is_usable(context.dial.epoch()) && session.is_connected()).then_some(session)
    }
}
