//! The registry of several relays: own tunnels in memory, all others' as the shared database
//! tells. A task of its own speaks with the database; nothing else waits for it.
//!
//! **Invariant:** neither a carrier's arrival nor a search for a route awaits the database.

mod ledger;
mod link;
mod metrics;
mod notice;
mod read;
mod remotes;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use throwline_certs::Database;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{Membership, Memory, PeerRelay, Presence, Registry, Route, Tunnel};
use crate::error::Error;
use ledger::Ledger;
use notice::Row;
use remotes::{Beat, Remotes, Round};

/// How long a clean end may take.
const GOODBYE: Duration = Duration::from_secs(3);

/// What a relay is in the registry, and how long it believes what.
#[derive(Debug, Clone)]
pub struct Config {
    /// As the relay's certificate names it.
    pub instance: String,
    /// `HOST:PORT` by which other relays reach this one.
    pub address: String,
    /// How often this relay says that it lives, and reads who else does. Default 5 s. One
    /// small write and one small read each time.
    pub heartbeat: Duration,
    /// How old a heartbeat may be before its relay is dead. Default 15 s; the same at every
    /// relay. Shorter finds the dead sooner and takes the slow for dead.
    pub life: Duration,
    /// How long the tunnels of other relays are believed while the database is away. Default
    /// 10 min. Worst case: lines to agents that have moved since fail when they are opened.
    pub belief: Duration,
}

impl Config {
    pub fn new(instance: String, address: String) -> Self {
        Self {
            instance,
            address,
            heartbeat: Duration::from_secs(5),
            life: Duration::from_secs(15),
            belief: Duration::from_secs(600),
        }
    }
}

/// A registry in PostgreSQL. Cheap to clone; its task ends with the last clone.
#[derive(Clone)]
pub struct Postgres {
    local: Arc<Memory>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    _stops: Arc<DropGuard>,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

pub(super) struct Shared {
    database: Database,
    config: Config,
    epoch: notice::Epoch,
    state: Mutex<State>,
    /// See [`Registry::relays`].
    relays: watch::Sender<u32>,
    /// Something is owed.
    work: Notify,
}

struct State {
    ledger: Ledger,
    remotes: Remotes,
    up: bool,
    /// Another process has this relay's name.
    displaced: bool,
    /// The last time that all heartbeats were read; at first the start.
    last_round: Instant,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn good_round(&self, beats: Vec<Beat>) -> Round {
        let now = Instant::now();
        let mut state = self.lock();
        state.up = true;
        state.last_round = now;
        let round = state.remotes.beats(beats, now);
        self.count_relays(&state);
        round
    }

    fn count_relays(&self, state: &State) {
        let count = state.remotes.taking_lines() + usize::from(!state.ledger.is_draining());
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.relays
            .send_if_modified(|known| std::mem::replace(known, count) != count);
    }

    /// Whether it was there before.
    fn away(&self) -> bool {
        let mut state = self.lock();
        state.remotes.away();
        std::mem::replace(&mut state.up, false)
    }
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
            .map_err(|error| Error::Config(error.to_string()))?;
        if !notice::is_address(&config.address) {
            return Err(Error::Config(format!(
                "{:?} is not HOST:PORT, by which other relays could reach this one",
                config.address
            )));
        }
        if config.heartbeat.is_zero() || config.life < config.heartbeat * 2 {
            return Err(Error::Config(
                "a heartbeat's life must be at least twice its interval".into(),
            ));
        }
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let epoch = epoch.map_or(0, |since| {
            i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
        });
        let shared = Arc::new(Shared {
            epoch,
            state: Mutex::new(State {
                ledger: Ledger::default(),
                remotes: Remotes::new(&config.instance, config.life),
                up: false,
                displaced: false,
                last_round: Instant::now(),
            }),
            relays: watch::Sender::new(0),
            work: Notify::new(),
            database,
            config,
        });
        metrics.register(Box::new(metrics::Seen::new(Arc::clone(&shared))?))?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(link::run(Arc::clone(&shared), stop.clone()));
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
            // One that cannot be told is still reached by whoever does not ask for it.
            agent_instance: Some(tunnel.instance.clone())
                .filter(|name| notice::is_agent_instance(name))
                .unwrap_or_default(),
            since: remotes::millis(tunnel.since),
        };
        let here = self.local.join(tunnel).await;
        let generation = here.generation();
        // Generations count up from 1.
        row.carrier = i64::try_from(generation).unwrap_or(i64::MAX);
        let carrier = row.carrier;
        self.shared.lock().ledger.join(row);
        self.shared.work.notify_one();
        let shared = Arc::clone(&self.shared);
        Membership::new(generation, move || {
            drop(here);
            shared.lock().ledger.leave(carrier);
            shared.work.notify_one();
        })
    }

    async fn find(&self, cluster: &str) -> Presence {
        let here = self.local.find(cluster).await;
        let now = Instant::now();
        let mut state = self.shared.lock();
        let unheard = now - state.last_round;
        let believed = state.up || unheard < self.shared.config.belief;
        let there = if believed {
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
            _ if !believed => Presence::Unknown(unheard),
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
                // Listen first, then look: who comes in between is not missed.
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
            state.ledger.drain();
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
