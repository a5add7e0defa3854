//! Tickets of waiting handshakes, served fairly: one network after the other.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;

/// One holder of addresses; `None` where the client's is not known.
pub(super) type Network = Option<IpAddr>;

/// Tickets by network, and the networks in turn.
#[derive(Default)]
pub(super) struct Ring {
    pub(super) turns: VecDeque<Network>,
    pub(super) by_network: HashMap<Network, VecDeque<u64>>,
    pub(super) len: usize,
}

impl Ring {
    pub(super) fn push(&mut self, network: Network, ticket: u64) {
        let of_network = self.by_network.entry(network).or_default();
        if of_network.is_empty() {
            self.turns.push_back(network);
        }
        of_network.push_back(ticket);
        self.len += 1;
    }

    /// The first of the network whose turn it is.
    pub(super) fn pop(&mut self) -> Option<u64> {
        let network = self.turns.pop_front()?;
        let of_network = self.by_network.get_mut(&network)?;
        let ticket = of_network.pop_front();
        match of_network.is_empty() {
            true => {
                self.by_network.remove(&network);
            }
            false => self.turns.push_back(network),
        }
        self.len -= usize::from(ticket.is_some());
        ticket
    }

    pub(super) fn remove(&mut self, network: Network, ticket: u64) {
        let Some(of_network) = self.by_network.get_mut(&network) else {
            return;
        };
        let before = of_network.len();
        of_network.retain(|other| *other != ticket);
        self.len -= before - of_network.len();
        if of_network.is_empty() {
            self.by_network.remove(&network);
            self.turns.retain(|other| *other != network);
        }
    }

    pub(super) fn waiting_of(&self, network: Network) -> usize {
        self.by_network.get(&network).map_or(0, VecDeque::len)
    }

    /// Tickets before the next one of a network that has `own`, at most.
    pub(super) fn ahead_of(&self, own: usize) -> usize {
        self.len.min((own + 1) * self.turns.len())
    }
}
