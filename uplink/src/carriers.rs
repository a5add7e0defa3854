//! The carriers of a pool: which supervisor holds which relay.

use std::sync::Arc;

use throwline_tunnel::carrier::{Carrier, RelayName};
use tokio::sync::watch;

/// The carriers of one pool, for those that use them. Clones are handles to the same carriers.
#[derive(Clone, Debug, Default)]
pub struct Carriers(Arc<Signals>);

#[derive(Debug, Default)]
struct Signals {
    state: watch::Sender<State>,
    /// Counts identities.
    identity: watch::Sender<u64>,
    /// The carrier of this epoch, and any before it, is to be replaced.
    replace: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    /// How many relays there are, by the newest announcement; 0 where the relay did not say how many.
    relays: Option<u32>,
    /// Of the newest carrier; 0 before the first.
    epoch: u64,
}

/// A supervisor's present carrier.
#[derive(Debug)]
struct Held {
    supervisor: usize,
    relay: String,
    carrier: Carrier,
}

/// What readiness and metrics are derived from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    pub(crate) carriers: usize,
    pub(crate) distinct_relays: usize,
}

impl State {
    fn others(&self, supervisor: usize) -> impl Iterator<Item = &Held> {
        let is_other =
            move |held: &&Held| held.supervisor != supervisor && !held.carrier.is_closed();
        self.held.iter().filter(is_other)
    }

    fn all(&self) -> impl Iterator<Item = &Held> {
        self.others(usize::MAX)
    }

    /// The first supervisor dials unless its relay would be the only one and is held already. The
    /// others dial when more than one relay is known to exist.
    fn wants(&self, supervisor: usize) -> bool {
        let has_sibling = self.others(supervisor).next().is_some();
        let is_alone = self.relays == Some(1);
        if supervisor == 0 {
            !(has_sibling && is_alone)
        } else {
            has_sibling && !is_alone && self.relays.is_some()
        }
    }

    /// Whether the supervisor holds a relay that one before it holds too, while there are more.
    fn is_duplicate(&self, supervisor: usize) -> bool {
        let own = self.held.iter().find(|held| held.supervisor == supervisor);
        let Some(own) = own else {
            return false;
        };
        let distinct = self.distinct();
        let more = self.relays.is_some_and(|relays| relays as usize > distinct);
        let mut before = self
            .others(supervisor)
            .filter(|held| held.supervisor < supervisor);
        more && !own.relay.is_empty() && before.any(|held| held.relay == own.relay)
    }

    fn distinct(&self) -> usize {
        let mut relays: Vec<&str> = self.held.iter().map(|held| held.relay.as_str()).collect();
        relays.sort_unstable();
        relays.dedup();
        relays.len()
    }

    fn summary(&self) -> Summary {
        Summary {
            carriers: self.all().count(),
            distinct_relays: self.distinct(),
        }
    }
}

impl Carriers {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One that is up, as soon as there is one.
    pub async fn carrier(&self) -> Carrier {
        let mut state = self.0.state.subscribe();
        loop {
            let found = {
                let state = state.borrow_and_update();
                state.all().next().map(|held| held.carrier.clone())
            };
            match found {
                Some(carrier) => return carrier,
                // `self` keeps the channel open.
                None => drop(state.changed().await),
            }
        }
    }

    /// The epoch of the newest carrier, which [`UplinkHandler::connected`](crate::UplinkHandler::connected)
    /// has received; 0 before the first.
    pub fn epoch(&self) -> u64 {
        self.0.state.borrow().epoch
    }

    /// The carrier of this epoch, and any before it, is to be replaced. Many such requests in a row
    /// are paced.
    pub fn replace(&self, epoch: u64) {
        let replace = &self.0.replace;
        replace.send_if_modified(|asked| std::mem::replace(asked, epoch.max(*asked)) < epoch);
    }

    /// The identity has changed: each carrier is replaced by one that proves the new one.
    pub fn replace_all(&self) {
        self.0.identity.send_modify(|count| *count += 1);
    }

    /// Enters a supervisor's carrier; its epoch. `publish` sees each change in order.
    pub(crate) fn hold(
        &self,
        supervisor: usize,
        carrier: Carrier,
        relay: &RelayName,
        publish: impl FnOnce(Summary),
    ) -> u64 {
        let mut epoch = 0;
        self.0.state.send_modify(|state| {
            state.epoch += 1;
            epoch = state.epoch;
            state.held.retain(|held| held.supervisor != supervisor);
            state.held.push(Held {
                supervisor,
                relay: relay.instance.clone(),
                carrier,
            });
            state.relays = Some(relay.relays);
            publish(state.summary());
        });
        epoch
    }

    pub(crate) fn release(&self, supervisor: usize, publish: impl FnOnce(Summary)) {
        self.0.state.send_modify(|state| {
            state.held.retain(|held| held.supervisor != supervisor);
            publish(state.summary());
        });
    }

    /// A relay has announced how many relays there are.
    pub(crate) fn announce(&self, relays: u32) {
        self.0
            .state
            .send_modify(|state| state.relays = Some(relays));
    }

    /// Relays that the other supervisors hold.
    pub(crate) fn relays_of_others(&self, supervisor: usize) -> Vec<String> {
        let state = self.0.state.borrow();
        let relays = state.others(supervisor).map(|held| held.relay.clone());
        let mut relays: Vec<String> = relays.filter(|relay| !relay.is_empty()).collect();
        relays.sort_unstable();
        relays.dedup();
        relays
    }

    pub(crate) fn has_sibling(&self, supervisor: usize) -> bool {
        self.0.state.borrow().others(supervisor).next().is_some()
    }

    /// Ends when the supervisor, which has no carrier, should dial.
    pub(crate) async fn wanted(&self, supervisor: usize) {
        self.until(|state| state.wants(supervisor)).await;
    }

    /// Ends when the supervisor should look for another relay than the one that it holds.
    pub(crate) async fn duplicate(&self, supervisor: usize) {
        self.until(|state| state.is_duplicate(supervisor)).await;
    }

    /// Ends when the carrier of this epoch is to be replaced.
    pub(crate) async fn replace_requested(&self, epoch: u64) {
        let mut replace = self.0.replace.subscribe();
        // `self` keeps the channel open.
        let _ = replace.wait_for(|asked| *asked >= epoch).await;
    }

    pub(crate) fn identity(&self) -> watch::Receiver<u64> {
        self.0.identity.subscribe()
    }

    async fn until(&self, holds: impl FnMut(&State) -> bool) {
        // `self` keeps the channel open.
        let _ = self.0.state.subscribe().wait_for(holds).await;
    }
}
