//! What a registry does, and the guard by which an entry leaves it.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::watch;

use super::route::{PeerRelay, Presence};
use super::tunnel::Tunnel;

/// The registry of tunnels. Asynchronous, because with several relays it is a database.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Makes a tunnel routable until the membership is dropped.
    async fn join(&self, tunnel: Arc<Tunnel>) -> Membership;

    async fn find(&self, cluster: &str) -> Presence;

    /// Returns when the cluster has a tunnel, at once if it has one now.
    async fn connected(&self, cluster: &str);

    /// Announces to the other relays, if there are any, that this one takes no new lines.
    async fn drain(&self);

    /// How many relays of the set take lines, this one among them, as it changes; 0 until that is
    /// known.
    fn relays(&self) -> watch::Receiver<u32>;

    /// The other relays; none where they cannot be known.
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
