//! The state that the registry and its database task share, and the configuration.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use throwline_database::Database;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::notice::Epoch;
use super::outbox::Outbox;
use super::remotes::{Beat, Remotes, Round};

/// What a relay is in the registry, and how long its data counts.
#[derive(Debug, Clone)]
pub struct Config {
    /// As the relay's certificate names it.
    pub instance: String,
    /// `HOST:PORT` by which other relays reach this one.
    pub address: String,
    /// How often this relay writes a heartbeat, and reads those of the others. Default 5 s. One
    /// small write and one small read each time.
    pub heartbeat: Duration,
    /// How old a heartbeat may be before its relay is dead. Default 15 s; the same at every
    /// relay. Shorter finds the dead sooner and takes the slow for dead.
    pub life: Duration,
    /// How long the last known tunnels of other relays are used while the database is away. Default
    /// 10 min. Worst case: lines to agents that have moved since fail when they are opened.
    pub max_staleness: Duration,
}

impl Config {
    pub fn new(instance: String, address: String) -> Self {
        Self {
            instance,
            address,
            heartbeat: Duration::from_secs(5),
            life: Duration::from_secs(15),
            max_staleness: Duration::from_secs(600),
        }
    }
}

/// What the registry and the task of its database connection share.
pub(super) struct SyncState {
    pub(super) database: Database,
    pub(super) config: Config,
    pub(super) epoch: Epoch,
    pub(super) state: Mutex<State>,
    /// See [`Registry::relays`](crate::registry::Registry::relays).
    pub(super) relays: watch::Sender<u32>,
    /// Something is owed.
    pub(super) work: Notify,
}

pub(super) struct State {
    pub(super) outbox: Outbox,
    pub(super) remotes: Remotes,
    pub(super) up: bool,
    /// Another process has this relay's name.
    pub(super) displaced: bool,
    /// The last time that all heartbeats were read; at first the start.
    pub(super) last_round: Instant,
}

impl SyncState {
    /// The state of a relay that starts now, under a new epoch.
    pub(super) fn new(database: Database, config: Config) -> Self {
        let epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let epoch = epoch.map_or(0, |since| {
            i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
        });
        Self {
            epoch,
            state: Mutex::new(State {
                outbox: Outbox::default(),
                remotes: Remotes::new(&config.instance, config.life),
                up: false,
                displaced: false,
                last_round: Instant::now(),
            }),
            relays: watch::Sender::new(0),
            work: Notify::new(),
            database,
            config,
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn good_round(&self, beats: Vec<Beat>) -> Round {
        let now = Instant::now();
        let mut state = self.lock();
        state.up = true;
        state.last_round = now;
        let round = state.remotes.beats(beats, now);
        self.count_relays(&state);
        round
    }

    pub(super) fn count_relays(&self, state: &State) {
        let count = state.remotes.taking_lines() + usize::from(!state.outbox.is_draining());
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.relays
            .send_if_modified(|known| std::mem::replace(known, count) != count);
    }

    /// Whether it was there before.
    pub(super) fn away(&self) -> bool {
        let mut state = self.lock();
        state.remotes.away();
        std::mem::replace(&mut state.up, false)
    }
}
