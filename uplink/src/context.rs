//! What the supervisors of a pool share.

use std::sync::Arc;

use throwline_ops::network::Changes;
use throwline_ops::{ReadinessGuard, Shutdown};
use throwline_tunnel::carrier::{Carrier, RelayName};

use crate::carriers::{Carriers, Summary};
use crate::config::Config;
use crate::handler::UplinkHandler;
use crate::metrics::Metrics;

/// What the supervisors of a pool share.
pub(crate) struct Context<H> {
    pub(crate) handler: Arc<H>,
    pub(crate) carriers: Carriers,
    pub(crate) config: Config,
    pub(crate) shutdown: Shutdown,
    pub(crate) network: Changes,
    pub(crate) metrics: Metrics,
    pub(crate) ready: Option<Arc<ReadinessGuard>>,
}

impl<H: UplinkHandler> Context<H> {
    pub(crate) fn hold(&self, supervisor: usize, carrier: &Carrier, relay: &RelayName) -> u64 {
        let publish = |summary| self.publish(summary);
        let carriers = &self.carriers;
        let epoch = carriers.hold(supervisor, carrier.clone(), relay, publish);
        self.handler.connected(carrier, epoch);
        epoch
    }

    pub(crate) fn release(&self, supervisor: usize) {
        let publish = |summary| self.publish(summary);
        self.carriers.release(supervisor, publish);
    }

    fn publish(&self, summary: Summary) {
        if let Some(ready) = &self.ready {
            match summary.carriers {
                0 => ready.not_ready("no carrier to a relay"),
                _ => ready.ready(),
            }
        }
        let distinct = i64::try_from(summary.distinct_relays).unwrap_or(i64::MAX);
        self.metrics.relays.set(distinct);
    }
}
