//! The registry's metrics, computed when they are collected.

use std::sync::Arc;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Gauge, IntGauge};

use super::state::SyncState;

pub(super) struct Seen {
    shared: Arc<SyncState>,
    up: IntGauge,
    age: Gauge,
    displaced: IntGauge,
    owed: IntGauge,
    relays: IntGauge,
    tunnels: IntGauge,
}

impl Seen {
    pub(super) fn new(shared: Arc<SyncState>) -> Result<Self, prometheus::Error> {
        Ok(Self {
            shared,
            up: IntGauge::new(
                "throwline_relay_database_up",
                "Whether the last round with the database succeeded",
            )?,
            age: Gauge::new(
                "throwline_relay_database_round_age_seconds",
                "How long ago the last good round with the database was",
            )?,
            displaced: IntGauge::new(
                "throwline_relay_displaced",
                "Whether another process is registered under this relay's name",
            )?,
            owed: IntGauge::new(
                "throwline_relay_database_owed_writes",
                "Changes of this relay's tunnels that the database does not know yet",
            )?,
            relays: IntGauge::new(
                "throwline_relay_known_relays",
                "Other relays that are known to live",
            )?,
            tunnels: IntGauge::new(
                "throwline_relay_remote_tunnels",
                "Agents' carriers known at other relays",
            )?,
        })
    }

    /// All but the age.
    fn whole(&self) -> [&IntGauge; 5] {
        [
            &self.up,
            &self.displaced,
            &self.owed,
            &self.relays,
            &self.tunnels,
        ]
    }
}

impl Collector for Seen {
    fn desc(&self) -> Vec<&Desc> {
        let mut all: Vec<&Desc> = self.whole().iter().flat_map(|gauge| gauge.desc()).collect();
        all.extend(self.age.desc());
        all
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        {
            let state = self.shared.lock();
            let (relays, tunnels) = state.remotes.counts();
            self.up.set(i64::from(state.up));
            self.age.set(state.last_round.elapsed().as_secs_f64());
            self.displaced.set(i64::from(state.displaced));
            self.owed.set(count(state.outbox.owed()));
            self.relays.set(count(relays));
            self.tunnels.set(count(tunnels));
        }
        let whole = self.whole();
        let mut all: Vec<_> = whole.iter().flat_map(|gauge| gauge.collect()).collect();
        all.extend(self.age.collect());
        all
    }
}
