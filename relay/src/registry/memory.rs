//! The registry of a relay that is alone.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use super::membership::{Membership, Registry};
use super::route::{Presence, Route};
use super::table::{Found, Table};
use super::tunnel::Tunnel;

/// All tunnels in this process.
pub struct Memory {
    table: Arc<Mutex<Table<Arc<Tunnel>>>>,
    relays: watch::Sender<u32>,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            table: Arc::default(),
            relays: watch::Sender::new(1),
        }
    }
}

fn lock(table: &Mutex<Table<Arc<Tunnel>>>) -> MutexGuard<'_, Table<Arc<Tunnel>>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[async_trait]
impl Registry for Memory {
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership {
        let cluster = tunnel.cluster.clone();
        let generation = lock(&self.table).insert(&cluster, tunnel);
        let table = Arc::clone(&self.table);
        Membership::new(generation, move || {
            lock(&table).remove(&cluster, generation, Instant::now());
        })
    }

    async fn find(&self, cluster: &str) -> Presence {
        let found = lock(&self.table).find(cluster);
        match found {
            Found::Here(mut tunnels) => {
                // A carrier can have died a moment before its owner notices and leaves.
                tunnels.retain(|tunnel| !tunnel.carrier.is_closed());
                if tunnels.is_empty() {
                    return Presence::Gone(std::time::Duration::ZERO);
                }
                // Stable, so the newest stays first among equals.
                tunnels.sort_by_key(|tunnel| tunnel.carrier.streams());
                Presence::Connected(tunnels.into_iter().map(Route::Here).collect())
            }
            Found::GoneAt(at) => Presence::Gone(at.elapsed()),
            Found::Unseen => Presence::Unseen,
        }
    }

    fn relays(&self) -> watch::Receiver<u32> {
        self.relays.subscribe()
    }

    async fn drain(&self) {
        self.relays.send_replace(0);
    }

    async fn connected(&self, cluster: &str) {
        loop {
            let arrivals = lock(&self.table).arrivals(cluster);
            let arrival = arrivals.notified();
            tokio::pin!(arrival);
            // Listen first, then look: an arrival in between is not missed.
            arrival.as_mut().enable();
            if let Presence::Connected(_) = self.find(cluster).await {
                return;
            }
            arrival.await;
        }
    }
}
