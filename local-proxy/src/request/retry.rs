//! Repetition of safe requests after a lost session.

use std::time::Duration;

use throwline_tunnel::proto::messages::RefusalCode;
use tokio::time::Instant;

use crate::failure::Failure;

/// Between attempts; doubles up to the maximum.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Further attempts of one request, before any part of its answer has arrived. GET and HEAD without a
/// body may be repeated (RFC 9110, section 9.2.2): another agent of the cluster, or the reconnected
/// one, answers. Any other request may have had an effect, and fails.
pub(crate) struct Retry {
    is_safe: bool,
    /// How long attempts go on after the first loss.
    budget: Duration,
    deadline: Option<Instant>,
    backoff: Duration,
}

impl Retry {
    pub(crate) fn new(is_safe: bool, budget: Duration) -> Self {
        Self {
            is_safe,
            budget,
            deadline: None,
            backoff: BACKOFF,
        }
    }

    /// Whether an attempt has failed.
    pub(crate) fn has_begun(&self) -> bool {
        self.deadline.is_some()
    }

    /// Waits before the next attempt, or returns the failure where there is none.
    pub(crate) async fn after(&mut self, failure: Failure) -> Result<(), Failure> {
        let now = Instant::now();
        let deadline = *self.deadline.get_or_insert(now + self.budget);
        if !self.is_safe || !is_transient(&failure) || now + self.backoff >= deadline {
            return Err(failure);
        }
        tracing::debug!(%failure, "a request is sent again");
        tokio::time::sleep(self.backoff).await;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
        Ok(())
    }
}

/// Whether another attempt can reach the agent.
fn is_transient(failure: &Failure) -> bool {
    match failure {
        Failure::Refused { refusal, .. } => matches!(
            refusal.code(),
            RefusalCode::Offline
                | RefusalCode::Draining
                | RefusalCode::InstanceGone
                | RefusalCode::Timeout
        ),
        failure => failure.may_pass(),
    }
}
