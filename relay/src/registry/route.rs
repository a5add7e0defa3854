//! The ways to a cluster's agent.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_tunnel::proto::traffic::TrafficClass;

use super::tunnel::Tunnel;

/// What is known of one cluster's tunnels.
pub enum Presence {
    /// The best first: those of this relay, least loaded, then newest; then those of others.
    Connected(Vec<Route>),
    /// Its last tunnel ended this long ago.
    Gone(Duration),
    /// Not seen since this registry began.
    Unseen,
    /// The shared database has not answered for this long, so its last data is too old to use.
    Unknown(Duration),
}

/// A way to one agent.
#[derive(Clone)]
pub enum Route {
    /// Its carrier ends here.
    Here(Arc<Tunnel>),
    /// Its carrier ends at another relay.
    There(Remote),
}

/// An agent's carrier at another relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    pub relay: PeerRelay,
    /// The agent's own name for its process.
    pub agent_instance: String,
    pub since: SystemTime,
    /// The serial of the certificate that it proved there; empty if that relay does not state it.
    pub certificate: String,
    /// What the agent has dialled the carrier for.
    pub class: TrafficClass,
}

/// Another relay of the same set.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerRelay {
    /// As its certificate names it.
    pub instance: String,
    /// `HOST:PORT` of its listener for peers.
    pub address: String,
}

impl Route {
    /// The agent's own name for its process.
    pub fn agent_instance(&self) -> &str {
        match self {
            Self::Here(tunnel) => &tunnel.instance,
            Self::There(remote) => &remote.agent_instance,
        }
    }

    /// The serial of the agent's certificate; empty if it is not known.
    pub fn certificate(&self) -> &str {
        match self {
            Self::Here(tunnel) => &tunnel.certificate,
            Self::There(remote) => &remote.certificate,
        }
    }

    /// What the agent has dialled the carrier for.
    pub fn class(&self) -> TrafficClass {
        match self {
            Self::Here(tunnel) => tunnel.class,
            Self::There(remote) => remote.class,
        }
    }

    pub fn since(&self) -> SystemTime {
        match self {
            Self::Here(tunnel) => tunnel.since,
            Self::There(remote) => remote.since,
        }
    }

    /// Whether both are the same carrier, by the data that this relay has.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Here(tunnel), Self::Here(other)) => Arc::ptr_eq(tunnel, other),
            (Self::There(remote), Self::There(other)) => remote == other,
            _ => false,
        }
    }

    /// The tunnel, if it ends at this relay.
    pub fn here(&self) -> Option<&Arc<Tunnel>> {
        match self {
            Self::Here(tunnel) => Some(tunnel),
            Self::There(_) => None,
        }
    }
}
