//! The supervisors of one component, from start to the last carrier's close.

use std::sync::Arc;
use std::time::Duration;

use throwline_ops::network::Changes;
use throwline_ops::{ReadinessGuard, Shutdown};
use throwline_tunnel::proto::close::CloseCode;
use tokio::task::JoinSet;

use crate::carriers::Carriers;
use crate::config::Config;
use crate::context::Context;
use crate::handler::UplinkHandler;
use crate::metrics::Metrics;
use crate::supervisor::{Drained, Supervisor};

/// How long a close may take to reach the relay when the component stops.
const GOODBYE: Duration = Duration::from_secs(2);

/// What a pool has from the process around it.
pub struct Environment {
    /// Ends the pool.
    pub shutdown: Shutdown,
    /// Is ready while there is a carrier.
    pub ready: Option<ReadinessGuard>,
    /// Changes of the machine's network, by which a carrier may have to be replaced.
    pub network: Changes,
    /// Counts carriers and failures.
    pub metrics: Metrics,
}

/// Keeps the carriers of one component. Dropping it ends them without a goodbye.
pub struct Pool {
    supervisors: JoinSet<Drained>,
    ready: Option<Arc<ReadinessGuard>>,
}

impl Pool {
    /// Begins to dial when carriers are needed. They are in `carriers` while they are up.
    pub fn start<H: UplinkHandler>(
        handler: Arc<H>,
        carriers: Carriers,
        config: Config,
        environment: Environment,
    ) -> Self {
        let ready = environment.ready.map(Arc::new);
        if let Some(ready) = &ready {
            ready.not_ready("no carrier to a relay yet");
        }
        let count = config.count.max(1);
        let context = Arc::new(Context {
            handler,
            carriers,
            config,
            shutdown: environment.shutdown,
            network: environment.network,
            metrics: environment.metrics,
            ready: ready.clone(),
        });
        let mut supervisors = JoinSet::new();
        for number in 0..count {
            supervisors.spawn(Supervisor::new(number, context.clone()).run());
        }
        Self { supervisors, ready }
    }

    /// Ends with the shutdown only; returns the carriers that still have sessions.
    pub async fn ended(self) -> Remaining {
        let drained = self.supervisors.join_all().await;
        if let Some(ready) = &self.ready {
            ready.not_ready("the process is stopping");
        }
        Remaining(drained)
    }
}

/// The carriers that outlive their supervisors, while their sessions drain.
pub struct Remaining(Vec<Drained>);

impl Remaining {
    /// Closes them with this reason, and waits until the relays have received it.
    pub async fn close(self, reason: &str) {
        let closing = self.0.into_iter().map(|mut drained| async move {
            if let Some(carrier) = &drained.carrier {
                carrier.close(CloseCode::GoingAway, reason);
                let _ = tokio::time::timeout(GOODBYE, carrier.gone()).await;
            }
            drained.serving.shutdown().await;
        });
        futures::future::join_all(closing).await;
    }
}
