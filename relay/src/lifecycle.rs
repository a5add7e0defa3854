//! The phases in which a relay ends, and the work that each phase waits for.

use std::time::Duration;

use throwline_ops::Drain;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::config::Timing;

/// Beyond the spread, how long carriers have to move to other relays: a dial, and the end of the
/// requests that are under way.
const MOVE: Duration = Duration::from_secs(15);

/// Clones are of the same relay.
#[derive(Clone)]
pub(crate) struct Lifecycle {
    /// Cancelled when the relay takes no new work and peers should move to other relays.
    pub(crate) draining: CancellationToken,
    /// Cancelled when everything ends at once.
    pub(crate) closing: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) started: Instant,
    /// Held by each line.
    pub(crate) lines: Drain,
    /// Held by each line that would not outlive this relay.
    pub(crate) lines_to_wait_for: Drain,
    /// Held by each carrier but those of other relays.
    pub(crate) carriers: Drain,
}

impl Lifecycle {
    pub(crate) fn new() -> Self {
        Self {
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            started: Instant::now(),
            lines: Drain::new(),
            lines_to_wait_for: Drain::new(),
            carriers: Drain::new(),
        }
    }

    /// Waits for the lines that end with this relay, at most the drain's timeout.
    pub(crate) async fn lines_ended(&self, timing: &Timing) {
        let timeout = timing.drain_timeout;
        if let Err(lines) = self.lines_to_wait_for.drained_within(timeout).await {
            warn!(lines, "cut lines that did not end in time");
        }
    }

    /// Waits until no carrier and no line needs this relay any more, at most the drain's timeout.
    pub(crate) async fn emptied(&self, timing: &Timing, has_other_relays: bool) {
        let end = Instant::now() + timing.drain_timeout;
        // Without another relay a carrier has nowhere to move; one without lines is closed later.
        if has_other_relays {
            let to_move = (timing.drain_spread + MOVE).min(timing.drain_timeout);
            if let Err(carriers) = self.carriers.drained_within(to_move).await {
                info!(carriers, "some carriers have not moved yet");
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        if let Err(lines) = self.lines.drained_within(left).await {
            warn!(lines, "cut lines that did not end in time");
        }
    }
}
