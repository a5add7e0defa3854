//! Networks from which a peer was authenticated lately.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long a network is known after a peer from it was authenticated, and how many are.
const KNOWN_FOR: Duration = Duration::from_secs(15 * 60);
const KNOWN: usize = 16 * 1024;

/// When a peer from each network was last authenticated.
#[derive(Default)]
pub(super) struct KnownNetworks(HashMap<IpAddr, Instant>);

impl KnownNetworks {
    pub(super) fn insert(&mut self, network: IpAddr, now: Instant) {
        let known = &mut self.0;
        if known.len() >= KNOWN && !known.contains_key(&network) {
            known.retain(|_, since| now.duration_since(*since) < KNOWN_FOR);
        }
        if known.len() < KNOWN || known.contains_key(&network) {
            known.insert(network, now);
        }
    }

    pub(super) fn contains(&self, network: IpAddr, now: Instant) -> bool {
        let since = self.0.get(&network);
        since.is_some_and(|since| now.duration_since(*since) < KNOWN_FOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_known_for_a_time_and_no_flood_displaces_it() {
        let now = Instant::now();
        let mut known = KnownNetworks::default();
        let network = |number: u32| IpAddr::from(number.to_be_bytes());
        for number in 0..2 * u32::try_from(KNOWN).unwrap() {
            known.insert(network(number), now);
        }
        assert_eq!(known.0.len(), KNOWN);
        assert!(known.contains(network(0), now));
        let later = now + KNOWN_FOR;
        assert!(!known.contains(network(0), later));
        known.insert(network(u32::MAX), later);
        assert!(known.contains(network(u32::MAX), later) && known.0.len() == 1);
    }
}
