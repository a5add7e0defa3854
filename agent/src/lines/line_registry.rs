//! Lines that outlive their streams, by id.
//!
//! A line without a stream waits for its local proxy, which resumes it by a proof with the line's key.
//! The certificate of its session is checked again then, as when the line was opened.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use throwline_certs::PeerIdentity;
use throwline_ops::Shutdown;
use throwline_tunnel::line::{
    self, Handle, LineBudgets, LineError, Phase, ResumeError, ResumeRequest,
};
use throwline_tunnel::mux;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::live::{LiveRegistry, LiveSession};
use crate::metrics::Metrics;

/// How often the lines are polled for bytes that rest in them.
const TICK: Duration = Duration::from_secs(1);

/// Between two attempts to move a line to the carrier for bulk.
const BULK_MOVES: Duration = Duration::from_secs(60);

/// Knobs of lines without a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a line may be without a stream. Default 120 s; zero turns resumption off. Costs, for
    /// each such line, at most a window (1 MiB) each way, and its requests at the API server.
    pub detached: Duration,
    /// Lines of one user that may be without a stream at once. Default 100; the next one to be cut
    /// ends.
    pub per_user: usize,
    /// Bytes by which the windows of all lines together may outgrow 1 MiB each. Default 64 MiB; lines
    /// whose users stopped reading may keep so much more.
    pub window_growth: u64,
    /// Bytes received that all lines together may buffer beyond 1 MiB each, before their user is
    /// known and charged for them. Default 64 MiB.
    pub unread: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            detached: Duration::from_secs(120),
            per_user: 100,
            window_growth: line::WINDOW_GROWTH,
            unread: line::UNREAD,
        }
    }
}

type Stream = mux::Stream;

/// The lines that can be resumed.
pub(crate) struct LineRegistry {
    limits: Limits,
    budgets: LineBudgets,
    live: Arc<LiveRegistry>,
    metrics: Metrics,
    lines: Mutex<HashMap<Vec<u8>, Entry>>,
}

struct Entry {
    handle: Handle<Stream>,
    user: String,
    session: LiveSession,
    /// When it was last to move to the carrier for bulk.
    moved_to_bulk: Option<Instant>,
}

impl Entry {
    /// Whether it is without a stream.
    fn is_cut(&self) -> bool {
        let phase = self.handle.phase();
        !phase.attached && !phase.over
    }
}

/// Why a RESUME was rejected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotResumed {
    #[error("there is no such line")]
    Unknown,
    #[error("the user's certificate is not accepted any more: {0}")]
    Certificate(#[from] throwline_certs::CheckError),
    #[error(transparent)]
    Resume(#[from] ResumeError),
}

impl LineRegistry {
    pub(crate) fn new(limits: Limits, live: Arc<LiveRegistry>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            limits,
            budgets: LineBudgets::new(limits.window_growth, limits.unread),
            live,
            metrics,
            lines: Mutex::default(),
        })
    }

    pub(crate) fn detached(&self) -> Duration {
        self.limits.detached
    }

    /// What all lines may hold together.
    pub(crate) fn budgets(&self) -> LineBudgets {
        self.budgets.clone()
    }

    /// Holds a line until it is over. False: there is one of that id, which remains.
    pub(crate) fn insert(
        self: &Arc<Self>,
        handle: Handle<Stream>,
        user: String,
        session: LiveSession,
    ) -> bool {
        let mut lines = self.lock();
        if lines.contains_key(handle.id()) {
            return false;
        }
        let entry = Entry {
            handle: handle.clone(),
            user,
            session,
            moved_to_bulk: None,
        };
        lines.insert(handle.id().to_vec(), entry);
        drop(lines);
        let registry = self.clone();
        tokio::spawn(async move {
            registry.drive(&handle).await;
            registry.lock().remove(handle.id());
        });
        true
    }

    /// Puts a renewed certificate under a line, by a proof that its holder has the line's other end.
    /// `peer` is the certificate that was verified in the session with the proof.
    pub(crate) fn renew(&self, line_id: &[u8], mac: &[u8], peer: &PeerIdentity) -> bool {
        let found = self
            .lock()
            .get(line_id)
            .map(|entry| (entry.handle.clone(), entry.session.clone()));
        found.is_some_and(|(handle, session)| {
            handle.verify_credential(&peer.fingerprint, mac) && self.live.renew(&session, peer)
        })
    }

    /// Whether a line may be asked to move to the carrier for bulk. Once a while: the relay of its local proxy
    /// may find no way there.
    pub(super) fn may_move_to_bulk(&self, line_id: &[u8]) -> bool {
        let now = Instant::now();
        let mut lines = self.lock();
        let Some(entry) = lines.get_mut(line_id) else {
            return false;
        };
        let last = entry.moved_to_bulk;
        let is_due = last.is_none_or(|last| now.duration_since(last) >= BULK_MOVES);
        if is_due {
            entry.moved_to_bulk = Some(now);
        }
        is_due
    }

    /// Gives a line the stream of a RESUME; returns its new epoch.
    pub(crate) async fn resume(
        &self,
        request: ResumeRequest<Stream>,
    ) -> Result<(Handle<Stream>, u64), NotResumed> {
        let found = self
            .lock()
            .get(request.line_id())
            .map(|entry| (entry.handle.clone(), entry.session.clone()));
        let Some((handle, session)) = found else {
            request.reject().await;
            return Err(NotResumed::Unknown);
        };
        if let Err(error) = self.live.check(&session) {
            request.reject().await;
            return Err(error.into());
        }
        let epoch = handle.accept_resume(request).await?;
        Ok((handle, epoch))
    }

    /// Ends all lines because the agent stops, with that as the reason.
    pub(crate) fn stop(&self) {
        let handles: Vec<_> = self
            .lock()
            .values()
            .map(|entry| entry.handle.clone())
            .collect();
        // Not under the lock: the end of a line removes it from the map.
        for handle in handles {
            handle.stop();
        }
    }

    /// Whether a line is without a stream.
    pub(crate) fn has_detached(&self) -> bool {
        self.lock().values().any(Entry::is_cut)
    }

    /// Requests that the user's side moves the line when `leaving` is requested, if it is still in that
    /// epoch.
    pub(crate) async fn request_move_when_leaving(
        handle: Handle<Stream>,
        epoch: u64,
        leaving: Shutdown,
        agent: Shutdown,
    ) {
        tokio::select! {
            // An agent that stops ends its lines as their requests end.
            () = leaving.requested() => if !agent.is_requested() {
                handle.request_move(epoch);
            },
            _ = handle.wait_until(|phase| phase.over || phase.epoch != epoch) => {}
        }
    }

    async fn drive(&self, handle: &Handle<Stream>) {
        let mut epoch = 0;
        loop {
            let is_cut = |phase: &Phase| phase.over || !phase.attached || phase.epoch != epoch;
            let mut phase = handle
                .drive_until(|phase| is_cut(phase) || phase.released)
                .await;
            // The session is over, and its last bytes are not acknowledged: without this task no
            // other would retransmit them.
            if phase.released && !is_cut(&phase) {
                let drained = handle.drive_until(is_cut);
                let Ok(drained) = timeout(self.limits.detached, drained).await else {
                    self.give_up(handle, "expired", "its last bytes were not acknowledged");
                    return;
                };
                phase = drained;
            }
            if phase.over {
                return;
            }
            let since = Instant::now();
            let retransmitted = handle.retransmitted();
            // A line without a stream holds up to a window of memory, so their number is limited
            // for each user.
            if !self.is_within_limit(handle) {
                self.give_up(
                    handle,
                    "limit",
                    "the user has too many lines without a stream",
                );
                return;
            }
            let resumed = handle.drive_until(|phase| phase.over || phase.attached);
            let Ok(phase) = timeout(self.limits.detached, resumed).await else {
                self.give_up(handle, "expired", "it was not resumed in time");
                return;
            };
            if phase.over {
                return;
            }
            epoch = phase.epoch;
            self.metrics.resumptions.inc();
            self.metrics
                .line_pause_seconds
                .observe(since.elapsed().as_secs_f64());
            self.metrics
                .replayed_bytes
                .inc_by(handle.retransmitted().saturating_sub(retransmitted));
            tracing::debug!(epoch, pause = ?since.elapsed(), "a line was resumed");
        }
    }

    fn give_up(&self, handle: &Handle<Stream>, label: &str, why: &str) {
        tracing::info!(why, "a line without a stream is given up");
        self.metrics
            .lines_given_up
            .with_label_values(&[label])
            .inc();
        handle.give_up(LineError::Expired {
            after: self.limits.detached,
            why: why.to_owned(),
        });
    }

    /// Whether the user's lines without a stream, this one among them, are within the limit.
    fn is_within_limit(&self, handle: &Handle<Stream>) -> bool {
        let lines = self.lock();
        let Some(user) = lines.get(handle.id()).map(|entry| &entry.user) else {
            return false;
        };
        let cut = lines
            .values()
            .filter(|entry| entry.user == *user && entry.is_cut());
        cut.count() <= self.limits.per_user
    }

    /// Polls all lines at an interval, and calls `also` as often. Never ends.
    pub(crate) async fn tick(&self, also: impl Fn()) {
        let mut every = interval(TICK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            also();
            let handles: Vec<_> = self
                .lock()
                .values()
                .map(|entry| entry.handle.clone())
                .collect();
            let now = std::time::Instant::now();
            for handle in handles {
                // The user's side finds another route; it detects the loss by a PING without an answer.
                handle.tick(now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Entry>> {
        // Nothing under this lock can panic half-way through a change.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
