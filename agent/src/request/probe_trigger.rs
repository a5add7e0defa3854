//! Failures of requests trigger a look at the API server before the next one is due, at a bounded rate.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// What a request has shown, and the agent's report may not show yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ProbeReason {
    /// A refusal was about the agent's own account.
    Rights,
    /// The API server did not answer, or does not accept the agent.
    Server,
}

impl ProbeReason {
    /// Triggers of a kind count at most this often, since each probe costs requests.
    fn every(self) -> Duration {
        match self {
            // Each may leave a refusal in the cluster's audit.
            Self::Rights => Duration::from_secs(10 * 60),
            Self::Server => Duration::from_secs(5),
        }
    }
}

#[derive(Default)]
pub(super) struct ProbeTrigger {
    last: Mutex<[Option<Instant>; 2]>,
    about_rights: AtomicBool,
    triggered: Notify,
}

impl ProbeTrigger {
    pub(super) fn trigger(&self, reason: ProbeReason) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let last = &mut last[usize::from(reason == ProbeReason::Rights)];
        if last.is_none_or(|at| at.elapsed() >= reason.every()) {
            *last = Some(Instant::now());
            if reason == ProbeReason::Rights {
                self.about_rights.store(true, Ordering::Release);
            }
            self.triggered.notify_one();
        }
    }

    pub(super) async fn triggered(&self) -> ProbeReason {
        self.triggered.notified().await;
        match self.about_rights.swap(false, Ordering::AcqRel) {
            true => ProbeReason::Rights,
            false => ProbeReason::Server,
        }
    }
}
