//! The registry of several relays: own tunnels in memory, all others' as the shared database
//! has them. One task does the I/O with the database; nothing else waits for it.
//!
//! **Invariant:** neither a carrier's arrival nor a search for a route awaits the database.

mod metrics;
mod notice;
mod outbox;
mod query;
mod read;
mod remotes;
mod state;
mod sync;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use throwline_certs::tls;
use throwline_database::Database;
use throwline_database::migrations::{File, Set};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::membership::{Membership, Registry};
use super::memory::Memory;
use super::route::{PeerRelay, Presence, Route};
use super::tunnel::Tunnel;
use crate::error::{ConfigError, Error};
use notice::Row;
use state::SyncState;

pub use state::Config;

/// The files of `migrations/`. One that databases have seen never changes.
const MIGRATIONS: &[File] = &[
    (
        1,
        "registry",
        include_str!("../../migrations/0001_registry.sql"),
    ),
    (
        2,
        "certificates",
        include_str!("../../migrations/0002_certificates.sql"),
    ),
    (3, "bulk", include_str!("../../migrations/0003_bulk.sql")),
];

/// How long a clean end may take.
const GOODBYE: Duration = Duration::from_secs(3);

/// A registry in PostgreSQL. Cheap to clone; its task ends with the last clone.
#[derive(Clone)]
pub struct Postgres {
    local: Arc<Memory>,
    shared: Arc<SyncState>,
    stop: CancellationToken,
    _stops: Arc<DropGuard>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// Makes the registry's tables, or brings them up to date; `false` when there was nothing to do. The
/// database's owner calls this where the relays' role may not.
///
/// # Errors
/// [`Error::Database`] when the database cannot be reached, or its tables cannot be used by this
/// version.
pub async fn migrate(database: &Database) -> Result<bool, Error> {
    tls::provide_to_libraries();
    let set = Set::new("relay_migrations", MIGRATIONS);
    Ok(set.migrate(database).await?)
}

impl Postgres {
    /// Starts; does not wait for the database, which may be away.
    ///
    /// # Errors
    /// [`Error::Config`] for names that cannot be, [`Error::Metrics`] for a second registry on
    /// the same metrics.
    pub fn start(
        database: Database,
        config: Config,
        metrics: &prometheus::Registry,
    ) -> Result<Self, Error> {
        throwline_certs::spiffe::check_relay_instance(&config.instance)
            .map_err(ConfigError::Instance)?;
        if !notice::is_address(&config.address) {
            return Err(ConfigError::PeerAddress(config.address).into());
        }
        if config.heartbeat.is_zero() || config.life < config.heartbeat * 2 {
            return Err(ConfigError::HeartbeatLife.into());
        }
        let shared = Arc::new(SyncState::new(database, config));
        metrics.register(Box::new(metrics::Seen::new(Arc::clone(&shared))?))?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(sync::run(Arc::clone(&shared), stop.clone()));
        Ok(Self {
            local: Arc::default(),
            shared,
            _stops: Arc::new(stop.clone().drop_guard()),
            stop,
            task: Arc::new(Mutex::new(Some(task))),
        })
    }

    /// Takes this relay out of the registry; bounded, for the database may be away.
    pub async fn close(&self) {
        self.stop.cancel();
        let task = self
            .task
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(task) = task {
            // Not in time: the others will find out by themselves.
            let _ = tokio::time::timeout(GOODBYE, task).await;
        }
    }
}

#[async_trait]
impl Registry for Postgres {
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership {
        let mut row = Row {
            carrier: 0,
            cluster: tunnel.cluster.clone(),
            // An unusable name is left out: lines that name no process still reach the agent.
            agent_instance: Some(tunnel.instance.clone())
                .filter(|name| notice::is_agent_instance(name))
                .unwrap_or_default(),
            since: remotes::millis(tunnel.since),
            certificate: tunnel.certificate.clone(),
            bulk: tunnel.class.is_bulk(),
        };
        // The local entry first and without the database: an agent's arrival must not depend on it.
        let here = self.local.join(tunnel).await;
        let generation = here.generation();
        // Generations count up from 1.
        row.carrier = i64::try_from(generation).unwrap_or(i64::MAX);
        let carrier = row.carrier;
        self.shared.lock().outbox.join(row);
        self.shared.work.notify_one();
        let shared = Arc::clone(&self.shared);
        Membership::new(generation, move || {
            // The local route goes first, so that no line takes it while the deletion waits for the
            // database.
            drop(here);
            shared.lock().outbox.leave(carrier);
            shared.work.notify_one();
        })
    }

    async fn find(&self, cluster: &str) -> Presence {
        let here = self.local.find(cluster).await;
        let now = Instant::now();
        let mut state = self.shared.lock();
        let unheard = now - state.last_round;
        // A short outage changes few routes; a route that is gone costs one failed attempt, no
        // route costs the line.
        let is_current = state.up || unheard < self.shared.config.max_staleness;
        let there = if is_current {
            state.remotes.find(cluster, now)
        } else {
            Vec::new()
        };
        let there = there.into_iter().map(Route::There);
        match here {
            Presence::Connected(mut routes) => {
                routes.extend(there);
                Presence::Connected(routes)
            }
            _ if there.len() > 0 => Presence::Connected(there.collect()),
            // Without current data, an absent cluster may be connected to another relay.
            _ if !is_current => Presence::Unknown(unheard),
            here => {
                let elsewhere = state.remotes.gone_at(cluster).map(|at| now - at);
                match (here, elsewhere) {
                    (Presence::Gone(here), Some(there)) => Presence::Gone(here.min(there)),
                    (Presence::Unseen, Some(there)) => Presence::Gone(there),
                    (here, _) => here,
                }
            }
        }
    }

    async fn connected(&self, cluster: &str) {
        let there = async {
            loop {
                let arrivals = self.shared.lock().remotes.arrivals(cluster);
                let arrival = arrivals.notified();
                tokio::pin!(arrival);
                // Listen first, then look: an arrival in between is not missed.
                arrival.as_mut().enable();
                if let Presence::Connected(_) = self.find(cluster).await {
                    return;
                }
                arrival.await;
            }
        };
        tokio::select! {
            () = self.local.connected(cluster) => {}
            () = there => {}
        }
    }

    fn relays(&self) -> watch::Receiver<u32> {
        self.shared.relays.subscribe()
    }

    async fn drain(&self) {
        {
            let mut state = self.shared.lock();
            state.outbox.drain();
            if state.up {
                self.shared.count_relays(&state);
            }
        }
        self.shared.work.notify_one();
    }

    async fn peers(&self) -> Vec<PeerRelay> {
        self.shared.lock().remotes.peers(Instant::now())
    }
}
