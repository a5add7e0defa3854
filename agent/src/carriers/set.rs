//! What the slots know of one another.

use std::sync::Arc;

use throwline_ops::{ReadinessGuard, Shutdown};
use throwline_tunnel::carrier::{Carrier, RelayName};
use tokio::sync::watch;

use super::{Config, Owner};
use crate::metrics::Metrics;

pub(super) struct Set {
    pub(super) owner: Arc<dyn Owner>,
    pub(super) config: Config,
    pub(super) shutdown: Shutdown,
    pub(super) ready: ReadinessGuard,
    pub(super) metrics: Metrics,
    /// Counts changes of the machine's network.
    pub(super) network: watch::Receiver<u64>,
    state: watch::Sender<State>,
    identity: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    held: Vec<Held>,
    /// How many relays there are, by the last one that said; 0 where it did not say how many.
    relays: Option<u32>,
}

/// A slot's present carrier.
struct Held {
    slot: usize,
    relay: String,
    carrier: Carrier,
}

impl State {
    fn others(&self, slot: usize) -> impl Iterator<Item = &Held> {
        let is_other = move |held: &&Held| held.slot != slot && !held.carrier.is_closed();
        self.held.iter().filter(is_other)
    }

    /// The first slot dials unless its relay would be the only one and is held already; the
    /// others when it is known that there is something to be had.
    fn wants(&self, slot: usize) -> bool {
        let has_sibling = self.others(slot).next().is_some();
        let is_alone = self.relays == Some(1);
        if slot == 0 {
            !(has_sibling && is_alone)
        } else {
            has_sibling && !is_alone && self.relays.is_some()
        }
    }

    /// Whether the slot holds a relay that one before it holds too, while there are more.
    fn is_double(&self, slot: usize) -> bool {
        let Some(own) = self.held.iter().find(|held| held.slot == slot) else {
            return false;
        };
        let distinct = self.distinct();
        let more = self.relays.is_some_and(|relays| relays as usize > distinct);
        let mut before = self.others(slot).filter(|held| held.slot < slot);
        more && !own.relay.is_empty() && before.any(|held| held.relay == own.relay)
    }

    fn distinct(&self) -> usize {
        let mut relays: Vec<&str> = self.held.iter().map(|held| held.relay.as_str()).collect();
        relays.sort_unstable();
        relays.dedup();
        relays.len()
    }
}

impl Set {
    pub(super) fn new(
        owner: Arc<dyn Owner>,
        config: Config,
        shutdown: Shutdown,
        ready: ReadinessGuard,
        metrics: Metrics,
    ) -> Self {
        ready.not_ready("no carrier to a relay yet");
        Self {
            owner,
            config,
            shutdown,
            ready,
            metrics,
            network: throwline_ops::network::changes(),
            state: watch::Sender::default(),
            identity: watch::Sender::new(0),
        }
    }

    pub(super) fn hold(&self, slot: usize, carrier: Carrier, relay: &RelayName) {
        self.change(|state| {
            state.held.retain(|held| held.slot != slot);
            state.held.push(Held {
                slot,
                relay: relay.instance.clone(),
                carrier,
            });
            state.relays = Some(relay.relays);
        });
    }

    pub(super) fn release(&self, slot: usize) {
        self.change(|state| state.held.retain(|held| held.slot != slot));
    }

    pub(super) fn told(&self, relays: u32) {
        self.change(|state| state.relays = Some(relays));
    }

    fn change(&self, how: impl FnOnce(&mut State)) {
        self.state.send_modify(|state| {
            how(state);
            let live = state.others(usize::MAX).count();
            if live == 0 {
                self.ready.not_ready("no carrier to a relay");
            } else {
                self.ready.ready();
            }
            let distinct = i64::try_from(state.distinct()).unwrap_or(i64::MAX);
            self.metrics.relays.set(distinct);
        });
    }

    /// Relays that the other slots hold.
    pub(super) fn relays_of_others(&self, slot: usize) -> Vec<String> {
        let state = self.state.borrow();
        let relays = state.others(slot).map(|held| held.relay.clone());
        let mut relays: Vec<String> = relays.filter(|relay| !relay.is_empty()).collect();
        relays.sort_unstable();
        relays.dedup();
        relays
    }

    pub(super) fn has_sibling(&self, slot: usize) -> bool {
        self.state.borrow().others(slot).next().is_some()
    }

    /// Ends when the slot, which has no carrier, should dial.
    pub(super) async fn wanted(&self, slot: usize) {
        self.until(|state| state.wants(slot)).await;
    }

    /// Ends when the slot should look for another relay than the one that it holds.
    pub(super) async fn double(&self, slot: usize) {
        self.until(|state| state.is_double(slot)).await;
    }

    pub(super) async fn any(&self) -> Carrier {
        let mut state = self.state.subscribe();
        loop {
            let found = {
                let state = state.borrow_and_update();
                state
                    .others(usize::MAX)
                    .next()
                    .map(|held| held.carrier.clone())
            };
            match found {
                Some(carrier) => return carrier,
                // `self` keeps the channel open.
                None => drop(state.changed().await),
            }
        }
    }

    pub(super) fn replace_all(&self) {
        self.identity.send_modify(|count| *count += 1);
    }

    pub(super) fn identity(&self) -> watch::Receiver<u64> {
        self.identity.subscribe()
    }

    async fn until(&self, holds: impl FnMut(&State) -> bool) {
        // `self` keeps the channel open.
        let _ = self.state.subscribe().wait_for(holds).await;
    }
}
