//! What a request holds of its session.

use std::sync::Arc;
use std::time::Duration;

use throwline_ops::DrainGuard;
use throwline_tunnel::line::Phase;
use tokio::sync::watch;

use crate::live::{EndReason, LiveSession};

/// How long a session and its requests may last. Clones are of the same session.
#[derive(Clone)]
pub struct Lifetime {
    /// The session in the registry.
    pub live: LiveSession,
    /// Held while anything of the session lives.
    pub guard: Arc<DrainGuard>,
    /// How long the line below, which detects the loss of its other end by itself, may be without a
    /// stream; zero: not at all.
    pub detached: Duration,
    /// The state of that line.
    pub phases: Option<watch::Receiver<Phase>>,
}

impl Lifetime {
    /// Waits until the session must end.
    pub(crate) async fn ended(&self) -> EndReason {
        let reason = self.live.ended().await;
        if reason != EndReason::AgentStopping {
            let why = reason.label();
            tracing::info!(why, "a session ended with its user's certificate");
        }
        reason
    }
}
