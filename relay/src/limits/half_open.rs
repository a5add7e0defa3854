//! Connections that have not proved anything yet.
//!
//! An attacker can always open more of them than a relay may hold. To refuse the newcomer then
//! would let 5,000 silent sockets lock every agent out; so an overfull set sheds its oldest
//! member instead. An honest peer finishes its handshake in a few round trips and is gone from
//! the set long before it is the oldest.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus::{IntCounter, IntGauge};
use tokio_util::sync::CancellationToken;

/// The set, shared by all connections of one listener.
#[derive(Clone)]
pub(crate) struct HalfOpen {
    shared: Arc<Shared>,
}

struct Shared {
    cap: usize,
    cap_per_address: Option<usize>,
    gauge: IntGauge,
    shed: IntCounter,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    /// In order of arrival.
    members: BTreeMap<u64, Member>,
    by_address: HashMap<IpAddr, BTreeSet<u64>>,
}

struct Member {
    /// `None` while the client behind a balancer is not known.
    address: Option<IpAddr>,
    shed: CancellationToken,
}

/// A place in the set; dropping it leaves the set.
pub(crate) struct Place {
    shared: Arc<Shared>,
    number: u64,
    shed: CancellationToken,
}

impl HalfOpen {
    /// `cap_per_address` is `None` where no client's address is known.
    pub(crate) fn new(
        cap: usize,
        cap_per_address: Option<usize>,
        gauge: IntGauge,
        shed: IntCounter,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                cap: cap.max(1),
                cap_per_address: cap_per_address.map(|cap| cap.max(1)),
                gauge,
                shed,
                state: Mutex::default(),
            }),
        }
    }

    /// `address` is `None` for a connection of a balancer whose client is not known yet; see
    /// [`Place::belongs_to`].
    pub(crate) fn enter(&self, address: Option<IpAddr>) -> Place {
        let shed = CancellationToken::new();
        let mut state = self.shared.lock();
        let number = state.next;
        state.next += 1;
        state.members.insert(
            number,
            Member {
                address: None,
                shed: shed.clone(),
            },
        );
        let crowded =
            address.is_some_and(|address| self.shared.attribute(&mut state, number, address));
        if !crowded && state.members.len() > self.shared.cap {
            let oldest = state.oldest();
            self.shared.shed(&mut state, oldest);
        }
        self.shared.gauge.set(state.len());
        drop(state);
        Place {
            shared: Arc::clone(&self.shared),
            number,
            shed,
        }
    }

    /// Makes room when the whole process is short of something.
    pub(crate) fn shed_oldest(&self) {
        let mut state = self.shared.lock();
        let oldest = state.oldest();
        self.shared.shed(&mut state, oldest);
        self.shared.gauge.set(state.len());
    }
}

impl Place {
    /// Counts this connection as this client's from now on.
    pub(crate) fn belongs_to(&self, address: IpAddr) {
        let mut state = self.shared.lock();
        self.shared.attribute(&mut state, self.number, address);
        self.shared.gauge.set(state.len());
    }

    /// Ends when this connection has to make room.
    pub(crate) async fn shed(&self) {
        self.shed.cancelled().await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.remove(self.number);
        self.shared.gauge.set(state.len());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic between two of these short updates cannot happen; if it did, a slightly wrong
        // count is better than a listener that accepts no connection.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a member under an address. Whether that made one too many there, of which the
    /// oldest then was shed.
    fn attribute(&self, state: &mut State, number: u64, address: IpAddr) -> bool {
        let address = network_of(address);
        let Some(member) = state.members.get_mut(&number) else {
            return false;
        };
        let before = member.address.replace(address);
        if before == Some(address) {
            return false;
        }
        if let Some(before) = before {
            state.forget(before, number);
        }
        let same = state.by_address.entry(address).or_default();
        same.insert(number);
        if self.cap_per_address.is_none_or(|cap| same.len() <= cap) {
            return false;
        }
        let oldest = same.first().copied();
        self.shed(state, oldest);
        true
    }

    fn shed(&self, state: &mut State, number: Option<u64>) {
        if let Some(member) = number.and_then(|number| state.remove(number)) {
            member.shed.cancel();
            self.shed.inc();
        }
    }
}

impl State {
    fn remove(&mut self, number: u64) -> Option<Member> {
        let member = self.members.remove(&number)?;
        if let Some(address) = member.address {
            self.forget(address, number);
        }
        Some(member)
    }

    fn forget(&mut self, address: IpAddr, number: u64) {
        if let Some(same) = self.by_address.get_mut(&address) {
            same.remove(&number);
            if same.is_empty() {
                self.by_address.remove(&address);
            }
        }
    }

    fn oldest(&self) -> Option<u64> {
        self.members.first_key_value().map(|(number, _)| *number)
    }

    fn len(&self) -> i64 {
        i64::try_from(self.members.len()).unwrap_or(i64::MAX)
    }
}

/// What one holder of addresses is: an IPv4 address, or the /64 that any IPv6 host owns whole.
pub(crate) fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let network = u128::from(address) & !u128::from(u64::MAX);
            IpAddr::V6(network.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cap: usize, per_address: Option<usize>) -> HalfOpen {
        HalfOpen::new(
            cap,
            per_address,
            IntGauge::new("gauge", "test").unwrap(),
            IntCounter::new("shed", "test").unwrap(),
        )
    }

    fn address(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([127, 0, 0, last]))
    }

    #[test]
    fn an_overfull_set_sheds_its_oldest_and_keeps_the_newcomer() {
        let set = set(2, None);
        let first = set.enter(address(1));
        let second = set.enter(address(2));
        let third = set.enter(address(3));
        assert!(first.shed.is_cancelled());
        assert!(!second.shed.is_cancelled());
        assert!(!third.shed.is_cancelled());
        assert_eq!(set.shared.shed.get(), 1);
    }

    #[test]
    fn one_address_sheds_its_own_and_nobody_else() {
        let set = set(100, Some(2));
        let other = set.enter(address(9));
        let places: Vec<_> = (0..5).map(|_| set.enter(address(1))).collect();
        let shed: Vec<_> = places.iter().map(|p| p.shed.is_cancelled()).collect();
        assert_eq!(shed, [true, true, true, false, false]);
        assert!(!other.shed.is_cancelled());
    }

    #[test]
    fn what_a_balancer_brings_counts_for_its_client_once_that_is_known() {
        let set = set(100, Some(2));
        let unknown: Vec<_> = (0..10).map(|_| set.enter(None)).collect();
        assert!(unknown.iter().all(|place| !place.shed.is_cancelled()));
        let client = IpAddr::from([192, 0, 2, 7]);
        for place in &unknown[..4] {
            place.belongs_to(client);
        }
        // The second call changes nothing.
        unknown[3].belongs_to(client);
        let shed: Vec<_> = unknown.iter().map(|p| p.shed.is_cancelled()).collect();
        assert_eq!(shed[..5], [true, true, false, false, false]);
        // A second balancer in front of the first knew better.
        unknown[2].belongs_to(IpAddr::from([192, 0, 2, 8]));
        unknown[5].belongs_to(client);
        assert!(!unknown[3].shed.is_cancelled());
        assert_eq!(set.shared.gauge.get(), 8);
        // One that was shed stays out, also when its client becomes known.
        unknown[0].belongs_to(client);
        assert_eq!(set.shared.shed.get(), 2);
        drop(unknown);
        assert!(set.shared.lock().by_address.is_empty());
    }

    #[test]
    fn leaving_gives_the_place_back() {
        let set = set(2, Some(2));
        for _ in 0..10 {
            let place = set.enter(address(1));
            assert!(!place.shed.is_cancelled());
        }
        assert_eq!(set.shared.gauge.get(), 0);
        assert!(set.shared.lock().by_address.is_empty());
    }

    #[test]
    fn a_shed_member_that_leaves_late_takes_nobody_along() {
        let set = set(1, None);
        let first = set.enter(address(1));
        let second = set.enter(address(1));
        drop(first);
        assert_eq!(set.shared.gauge.get(), 1);
        drop(second);
        assert_eq!(set.shared.gauge.get(), 0);
    }

    #[test]
    fn an_ipv6_host_cannot_walk_through_its_own_network() {
        let one = network_of("2001:db8::1".parse().unwrap());
        let two = network_of("2001:db8::ffff:2".parse().unwrap());
        let other = network_of("2001:db8:0:1::1".parse().unwrap());
        assert_eq!(one, two);
        assert_ne!(one, other);
        assert_eq!(network_of("::ffff:10.0.0.1".parse().unwrap()), address_v4());
    }

    fn address_v4() -> IpAddr {
        IpAddr::from([10, 0, 0, 1])
    }
}
