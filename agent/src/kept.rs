//! Lines that outlive their streams: by id, for the users who come back for them.
//!
//! A line that was cut waits for its local proxy, which proves by the line's own key that it may
//! have it. Who may speak on it is asked again then, as when it was opened.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use throwline_ops::Shutdown;
use throwline_tunnel::line::{Asked, Handle, LineError, Phase, ResumeError};
use throwline_tunnel::mux;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::metrics::Metrics;

/// How often the lines are looked at, for what rests in them.
const LOOK: Duration = Duration::from_secs(1);

/// Knobs of lines that are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// How long a line may be without a stream. Default 120 s; zero turns resumption off. Costs, for
    /// each such line, at most a window (1 MiB) each way, and its requests at the API server.
    pub detached: Duration,
    /// Lines of one user that may be without a stream at once. Default 100; the next one to be cut
    /// ends.
    pub per_user: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            detached: Duration::from_secs(120),
            per_user: 100,
        }
    }
}

type Stream = mux::Stream;
/// Why a user may no longer speak on a line, if so.
type Recheck = Arc<dyn Fn() -> Result<(), throwline_certs::CheckError> + Send + Sync>;

/// The lines that can be resumed.
pub(crate) struct Kept {
    limits: Limits,
    metrics: Metrics,
    lines: Mutex<HashMap<Vec<u8>, Entry>>,
}

struct Entry {
    handle: Handle<Stream>,
    user: String,
    recheck: Recheck,
}

impl Entry {
    /// Whether it waits for its stream.
    fn is_cut(&self) -> bool {
        let phase = self.handle.phase();
        !phase.attached && !phase.over
    }
}

/// Why a RESUME was not followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotResumed {
    #[error("there is no such line")]
    Unknown,
    #[error("the user's certificate is not accepted any more: {0}")]
    Certificate(#[from] throwline_certs::CheckError),
    #[error(transparent)]
    Resume(#[from] ResumeError),
}

impl Kept {
    pub(crate) fn new(limits: Limits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            limits,
            metrics,
            lines: Mutex::default(),
        })
    }

    pub(crate) fn detached(&self) -> Duration {
        self.limits.detached
    }

    /// Keeps a line until it is over. False: there is one of that id, and it stays the only one.
    pub(crate) fn keep(
        self: &Arc<Self>,
        handle: Handle<Stream>,
        user: String,
        recheck: Recheck,
    ) -> bool {
        let mut lines = self.lock();
        if lines.contains_key(handle.id()) {
            return false;
        }
        let entry = Entry {
            handle: handle.clone(),
            user,
            recheck,
        };
        lines.insert(handle.id().to_vec(), entry);
        drop(lines);
        let kept = self.clone();
        tokio::spawn(async move {
            kept.tend(&handle).await;
            kept.lock().remove(handle.id());
        });
        true
    }

    /// Gives a line the stream that somebody asks to resume it on; the epoch that it is in then.
    pub(crate) async fn resume(
        &self,
        asked: Asked<Stream>,
    ) -> Result<(Handle<Stream>, u64), NotResumed> {
        let found = self
            .lock()
            .get(asked.line_id())
            .map(|entry| (entry.handle.clone(), entry.recheck.clone()));
        let Some((handle, recheck)) = found else {
            asked.gone().await;
            return Err(NotResumed::Unknown);
        };
        if let Err(error) = recheck() {
            asked.gone().await;
            return Err(error.into());
        }
        let epoch = handle.resumed(asked).await?;
        Ok((handle, epoch))
    }

    /// Whether a line waits for its stream.
    pub(crate) fn is_awaited(&self) -> bool {
        self.lock().values().any(Entry::is_cut)
    }

    /// Asks the user's side to leave the way that `leaving` is about, if the line is still on it.
    pub(crate) async fn ask_when_leaving(
        handle: Handle<Stream>,
        epoch: u64,
        leaving: Shutdown,
        agent: Shutdown,
    ) {
        tokio::select! {
            // An agent that stops ends its lines as their requests end.
            () = leaving.requested() => if !agent.is_requested() {
                handle.ask_to_move(epoch);
            },
            _ = handle.until(|phase| phase.over || phase.epoch != epoch) => {}
        }
    }

    async fn tend(&self, handle: &Handle<Stream>) {
        let mut epoch = 0;
        loop {
            let is_cut = |phase: &Phase| phase.over || !phase.attached || phase.epoch != epoch;
            let mut phase = handle
                .keep_until(|phase| is_cut(phase) || phase.let_go)
                .await;
            if phase.let_go && !is_cut(&phase) {
                let seen_off = handle.keep_until(is_cut);
                let Ok(seen_off) = timeout(self.limits.detached, seen_off).await else {
                    self.give_up(handle, "expired", "its last bytes were not taken");
                    return;
                };
                phase = seen_off;
            }
            if phase.over {
                return;
            }
            let since = Instant::now();
            let replayed = handle.replayed();
            if !self.may_wait(handle) {
                self.give_up(handle, "limit", "the user has too many lines that were cut");
                return;
            }
            let back = handle.keep_until(|phase| phase.over || phase.attached);
            let Ok(phase) = timeout(self.limits.detached, back).await else {
                self.give_up(handle, "expired", "nobody came back for it");
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
                .inc_by(handle.replayed().saturating_sub(replayed));
            tracing::debug!(epoch, pause = ?since.elapsed(), "a line was resumed");
        }
    }

    fn give_up(&self, handle: &Handle<Stream>, label: &str, why: &str) {
        tracing::info!(why, "a line that was cut is given up");
        self.metrics
            .lines_given_up
            .with_label_values(&[label])
            .inc();
        handle.give_up(LineError::Expired {
            after: self.limits.detached,
            why: why.to_owned(),
        });
    }

    /// Whether the line, which was cut, is not one too many of its user's.
    fn may_wait(&self, handle: &Handle<Stream>) -> bool {
        let lines = self.lock();
        let Some(user) = lines.get(handle.id()).map(|entry| &entry.user) else {
            return false;
        };
        let cut = lines
            .values()
            .filter(|entry| entry.user == *user && entry.is_cut());
        cut.count() <= self.limits.per_user
    }

    /// Looks at all lines, now and then. Never ends.
    pub(crate) async fn look(&self) {
        let mut every = interval(LOOK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let handles: Vec<_> = self
                .lock()
                .values()
                .map(|entry| entry.handle.clone())
                .collect();
            let now = std::time::Instant::now();
            for handle in handles {
                // Another way is the user's side to find; a PING that fails is a cut that it sees.
                handle.look(now);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Entry>> {
        // Nothing under this lock can panic half-way through a change.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
