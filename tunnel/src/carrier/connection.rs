//! What both ends get of a carrier whose handshake is done.

use std::net::SocketAddr;

use crate::proto::messages::{Challenge, Welcome};

use super::{Carrier, Incoming};

/// A live carrier, as both ends get it.
#[derive(Debug)]
pub struct Connection {
    /// Opens streams and closes the carrier.
    pub carrier: Carrier,
    /// The streams that the peer opens.
    pub incoming: Incoming,
    /// What the relay granted. On the accepting side: what was sent.
    pub welcome: Welcome,
    /// The relay that has accepted. On the accepting side: ourselves.
    pub relay: RelayName,
    /// This end's address and the other's, a proxy's where there is one. None on the accepting side,
    /// and of a connection that [`dial`](super::dial()) has not made.
    pub ends: Option<(SocketAddr, SocketAddr)>,
}

/// What a relay sends about itself before the dialer has authenticated itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayName {
    /// Its own among the relays of its set; at most [`RelayName::MAX`] bytes, of letters, digits,
    /// `-`, `.` and `_`. Empty where it sent none, or an invalid one.
    pub instance: String,
    /// Relays of the set that take lines, itself among them; 0: not sent.
    pub relays: u32,
}

impl RelayName {
    /// As many as a DNS label has; a relay's certificate allows no more.
    pub const MAX: usize = 63;

    pub(super) fn of(challenge: &Challenge) -> Self {
        let instance = &challenge.relay_instance;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_name = instance.len() <= Self::MAX && instance.bytes().all(plain);
        Self {
            instance: if is_name {
                instance.clone()
            } else {
                String::new()
            },
            relays: challenge.relays,
        }
    }
}
