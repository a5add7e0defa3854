//! A carrier's life on the relay: from its proof to its end.

mod answer;
mod carrier;
mod control;
mod expiry;
mod list;
mod renewal;
mod revocations;
mod text;

use std::sync::Arc;

use throwline_certs::{Directory, SpiffeId};
use throwline_tunnel::carrier::Connection;
use throwline_tunnel::proto::messages::Proof;
use tokio::sync::{Semaphore, watch};

use crate::config::Config;
use crate::lifecycle::Lifecycle;
use crate::limits::admission::HandshakeAdmission;
use crate::limits::carriers::CarrierPermit;
use crate::live::LiveRegistry;
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::registry::Registry;
use crate::routing::Router;

pub(crate) use list::ClusterLister;
pub(crate) use renewal::Renewals;
pub(crate) use revocations::RevocationFeed;

/// Arrivals that are recorded at once: thousands come after an outage, and others need the database
/// too. Half of what the authority's pool has.
const RECORDED_AT_ONCE: usize = 4;

/// Serves carriers. It holds what all of them need.
pub(crate) struct Sessions {
    pub(crate) config: Config,
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) router: Router,
    pub(crate) clusters: ClusterLister,
    pub(crate) renewals: Renewals,
    pub(crate) revocations: Arc<RevocationFeed>,
    pub(crate) live: Arc<LiveRegistry>,
    pub(crate) admission: HandshakeAdmission,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Metrics,
    /// How many relays of the set take lines; 0 while that is not known.
    pub(crate) relays: watch::Receiver<u32>,
    pub(crate) recording: Semaphore,
}

/// A carrier whose peer has proved its identity.
pub(crate) struct Established {
    pub(crate) peer: Arc<Peer>,
    pub(crate) proof: Proof,
    pub(crate) connection: Connection,
    pub(crate) permit: CarrierPermit,
    /// The certificate may have expired: it is good for its renewal, and for nothing else.
    pub(crate) is_for_renewal: bool,
}

impl Established {
    pub(crate) fn id(&self) -> &SpiffeId {
        &self.peer.identity.id
    }
}

impl Sessions {
    /// Bounds the arrivals that are recorded at once.
    pub(crate) fn recording() -> Semaphore {
        Semaphore::new(RECORDED_AT_ONCE)
    }

    /// The peer's network is admitted before unknown ones from now on.
    pub(crate) fn authenticated(&self, peer: &Peer) {
        if peer.has_own_address {
            self.admission.authenticated(peer.client.ip());
        }
    }
}
