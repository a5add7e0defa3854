//! Which cluster's tunnels are where.

mod memory;
pub mod postgres;
mod table;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use throwline_tunnel::carrier::Carrier;
use tokio::sync::watch;

pub use memory::Memory;

/// One agent's carrier, as routing sees it.
pub struct Tunnel {
    /// From the agent's certificate, never from what it says.
    pub cluster: String,
    /// The agent's own name for its process, as it said.
    pub instance: String,
    pub carrier: Carrier,
    pub since: SystemTime,
    status: Mutex<Option<Status>>,
}

/// What an agent last told of its cluster; its word, for people to read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    pub kubernetes_version: String,
    pub agent_version: String,
    pub api_server_reachable: bool,
    pub message: String,
}

impl Tunnel {
    pub fn new(cluster: String, instance: String, carrier: Carrier) -> Self {
        Self {
            cluster,
            instance,
            carrier,
            since: SystemTime::now(),
            status: Mutex::new(None),
        }
    }

    pub fn status(&self) -> Option<Status> {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Gives back what was known before.
    pub fn set_status(&self, status: Status) -> Option<Status> {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(status)
    }
}

impl Status {
    pub(crate) fn same_versions(&self, other: &Self) -> bool {
        self.kubernetes_version == other.kubernetes_version
            && self.agent_version == other.agent_version
    }
}

/// What is known of one cluster's tunnels.
pub enum Presence {
    /// The best first: those of this relay, least loaded, then newest; then those of others.
    Connected(Vec<Route>),
    /// Its last tunnel ended this long ago.
    Gone(Duration),
    /// Not seen since this registry began.
    Unseen,
    /// The database that relays share has not answered for this long, which is longer than what
    /// was learned from it may be believed.
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
    /// The agent's own name for its process, as it told that relay.
    pub agent_instance: String,
    pub since: SystemTime,
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

    pub fn since(&self) -> SystemTime {
        match self {
            Self::Here(tunnel) => tunnel.since,
            Self::There(remote) => remote.since,
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

/// The registry of tunnels. Asynchronous, because with several relays it is a database.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Makes a tunnel routable until the membership is dropped.
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership;

    async fn find(&self, cluster: &str) -> Presence;

    /// Returns when the cluster has a tunnel, at once if it has one now.
    async fn connected(&self, cluster: &str);

    /// This relay takes no new lines from now on; tells the others, if there are any.
    async fn drain(&self);

    /// How many relays of the set take lines, this one among them, as it changes; 0 until that is
    /// known.
    fn relays(&self) -> watch::Receiver<u32>;

    /// What the other relays are known to be; none where there is no way to know any.
    async fn peers(&self) -> Vec<PeerRelay> {
        Vec::new()
    }
}

/// An entry of the registry. Dropping it takes out the entry that it was given for, by
/// generation, and no successor of it.
pub struct Membership {
    generation: u64,
    leave: Option<Box<dyn FnOnce() + Send>>,
}

impl Membership {
    pub fn new(generation: u64, leave: impl FnOnce() + Send + 'static) -> Self {
        Self {
            generation,
            leave: Some(Box::new(leave)),
        }
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        if let Some(leave) = self.leave.take() {
            leave();
        }
    }
}
