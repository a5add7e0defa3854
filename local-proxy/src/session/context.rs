//! The dependencies of all sessions.

use std::sync::Arc;

use throwline_ops::GaugeGuard;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{SessionLimits, Timing};
use crate::metrics::Metrics;
use crate::session::dial::Dial;

/// Dependencies of all sessions.
pub(crate) struct SessionContext {
    pub(crate) dial: Arc<dyn Dial>,
    pub(crate) timing: Timing,
    pub(crate) limits: SessionLimits,
    pub(crate) metrics: Metrics,
    pub(crate) tasks: TaskTracker,
    /// Ends every session at once.
    pub(crate) kill: CancellationToken,
}

impl SessionContext {
    /// Runs `work` until it ends or everything is ended.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let held = GaugeGuard::new(&self.metrics.tasks);
        let kill = self.kill.clone();
        self.tasks.spawn(async move {
            let _held = held;
            kill.run_until_cancelled_owned(work).await;
        });
    }
}
