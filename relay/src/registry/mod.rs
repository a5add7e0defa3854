//! Which cluster's tunnels are where.

mod memory;
mod table;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use throwline_tunnel::carrier::Carrier;

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
    /// The best first: least loaded, then newest.
    Connected(Vec<Arc<Tunnel>>),
    /// Its last tunnel ended this long ago.
    Gone(Duration),
    /// Not seen since this registry began.
    Unseen,
}

/// The registry of tunnels. Asynchronous, because with several relays it is a database.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Makes a tunnel routable until the membership is dropped.
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership;

    async fn find(&self, cluster: &str) -> Presence;

    /// Returns when the cluster has a tunnel, at once if it has one now.
    async fn connected(&self, cluster: &str);
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
