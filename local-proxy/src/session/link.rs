//! The carriers to the relay: one for all clusters, and one for bulk, dialled on demand, replaced before
//! their end where that is known, and the lines on them.

mod dial;
mod line_supervisor;
mod open;
mod path;
mod prove;
mod renewal;
mod revocations;
mod uplink_handler;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use throwline_certs::revocation::Keeper;
use throwline_certs::{PeerIdentity, Validator};
use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::line::{Handle, LineBudgets, LineError};
use throwline_tunnel::mux;
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_uplink::Successor;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::config::{Outbound, Timing};
use crate::failure::{Failure, Unreachable};
use crate::metrics::Metrics;
use crate::store::{Credentials, Store};
use path::{NoCarrier, Path};

/// Why a line to an agent was ended.
const AGENT_REVOKED: &str =
    "the certificate of its agent was revoked; the agent must be enrolled again with a new token";

/// The link to the relay. Clones are the same link.
#[derive(Clone)]
pub(crate) struct Link(Arc<Inner>);

struct Inner {
    store: Store,
    outbound: Outbound,
    timing: Timing,
    /// What all lines may hold together.
    line_budgets: LineBudgets,
    metrics: Metrics,
    /// Tells two local proxies of one user apart.
    instance: String,
    held: RwLock<Held>,
    /// Held while they are renewed.
    successor: tokio::sync::Mutex<Successor>,
    interactive: Path,
    bulk: Path,
    /// Rises with the identity, and when sessions must leave a carrier that has no successor.
    generation: AtomicU64,
    lines: Mutex<Lines>,
    /// There is a line.
    kept: Notify,
    /// There is another identity.
    renewed: Notify,
}

/// The user's identity, and what its authority has revoked.
#[derive(Clone)]
struct Held {
    credentials: Arc<Credentials>,
    revocations: Arc<Keeper>,
}

/// The resumable lines and their supervisors, and the other lines.
#[derive(Default)]
struct Lines {
    next: u64,
    held: HashMap<u64, HeldLine>,
    /// Those that end with their stream.
    plain: HashMap<u64, PlainLine>,
    supervisors: JoinSet<()>,
}

/// A line without a supervisor, with its handle for ending it.
struct PlainLine {
    handle: Handle<mux::Stream>,
    agent: PeerIdentity,
}

#[derive(Clone)]
struct HeldLine {
    handle: Handle<mux::Stream>,
    suspect: Arc<Notify>,
    cluster: String,
    /// As it has proved in the session's handshake.
    agent: PeerIdentity,
    /// Of the certificate that stands for the line at its agent.
    fingerprint: [u8; 32],
}

impl Link {
    /// A link without a carrier, until one is requested and [`Link::drive`] runs.
    pub(crate) fn new(
        store: Store,
        credentials: Credentials,
        outbound: Outbound,
        timing: Timing,
        metrics: Metrics,
    ) -> Self {
        let held = Held {
            revocations: Arc::new(keeper(&credentials, &store)),
            credentials: Arc::new(credentials),
        };
        Self(Arc::new(Inner {
            store,
            outbound,
            timing,
            line_budgets: LineBudgets::default(),
            metrics,
            instance: format!("{:016x}", rand::random::<u64>()),
            held: RwLock::new(held),
            successor: tokio::sync::Mutex::default(),
            interactive: Path::new(),
            bulk: Path::new(),
            generation: AtomicU64::new(0),
            lines: Mutex::default(),
            kept: Notify::new(),
            renewed: Notify::new(),
        }))
    }

    /// A live carrier for that class of traffic, waiting a bounded time for one. A failure that waiting
    /// cannot change is returned at once.
    pub(crate) async fn carrier(&self, class: TrafficClass) -> Result<(Carrier, u64), Failure> {
        let wait = self.0.timing.wait_for_relay;
        match self.path(class).carrier(wait).await {
            Ok(found) => Ok(found),
            Err(NoCarrier::Failed(failure) | NoCarrier::Timeout(Some(failure))) => Err(failure),
            Err(NoCarrier::Timeout(None)) => Err(Failure::RelayUnreachable {
                relay: self.credentials().relay.url.to_string(),
                source: Unreachable::Timeout { after: wait },
            }),
        }
    }

    fn path(&self, class: TrafficClass) -> &Path {
        match class {
            TrafficClass::Interactive => &self.0.interactive,
            TrafficClass::Bulk => &self.0.bulk,
        }
    }

    pub(crate) fn credentials(&self) -> Arc<Credentials> {
        self.0.held().credentials
    }

    /// The list of what is revoked, of the present authority.
    fn revocations(&self) -> Arc<Keeper> {
        self.0.held().revocations
    }

    /// Uses another identity from now on, and moves to a carrier that proves it.
    pub(crate) fn set_credentials(&self, credentials: Credentials) {
        self.0.hold(credentials);
        for class in TrafficClass::ALL {
            self.path(class).carriers.replace_all();
        }
    }

    /// The carrier of this class and epoch is lost, or its relay accepts no new lines.
    fn replace(&self, class: TrafficClass, epoch: u64) {
        self.path(class).carriers.replace(epoch);
    }

    /// Ends the lines to agents whose certificates are revoked.
    fn end_revoked(&self, revocations: &Keeper) {
        let list = revocations.validator().revocations();
        let lines = self.lock_lines();
        let kept = lines.held.values().map(|line| (&line.agent, &line.handle));
        let plain = lines.plain.values();
        let plain = plain.map(|line| (&line.agent, &line.handle));
        let ended: Vec<_> = kept
            .chain(plain)
            .filter(|(agent, _)| list.covers(agent))
            .map(|(agent, handle)| (agent.id.name().to_owned(), handle.clone()))
            .collect();
        drop(lines);
        for (cluster, line) in ended {
            tracing::warn!(
                cluster,
                "a line is ended, because its agent's certificate was revoked"
            );
            line.give_up(LineError::Gone(AGENT_REVOKED.to_owned()));
        }
    }

    fn lines(&self) -> Vec<HeldLine> {
        self.lock_lines().held.values().cloned().collect()
    }

    /// Nothing is kept any more, and no agent is to wait for us.
    fn forget_lines(&self) {
        let lines = std::mem::take(&mut *self.lock_lines());
        for line in lines.held.values() {
            line.handle.abandon();
        }
    }

    fn lock_lines(&self) -> MutexGuard<'_, Lines> {
        // Nothing under this lock can panic half-way through a change.
        self.0.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn held(&self) -> Held {
        let held = self.held.read();
        held.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses these from now on. What another authority has revoked is another list.
    fn hold(&self, credentials: Credentials) -> Arc<Credentials> {
        let mut revocations = self.held().revocations;
        if *revocations.validator().roots() != credentials.roots {
            revocations = Arc::new(keeper(&credentials, &self.store));
        }
        let credentials = Arc::new(credentials);
        let mut held = (self.held.write()).unwrap_or_else(PoisonError::into_inner);
        *held = Held {
            credentials: credentials.clone(),
            revocations,
        };
        drop(held);
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.renewed.notify_one();
        credentials
    }
}

/// What `credentials`' authority has revoked, as it was known in the last run.
fn keeper(credentials: &Credentials, store: &Store) -> Keeper {
    let domain = credentials.roots.trust_domain().clone();
    let validator = Validator::new(credentials.roots.clone(), domain);
    let keeper = Keeper::new(validator, store.dir());
    keeper.load();
    keeper
}
