//! Keeps carriers to relays, for ever: two as a rule, to two relays where there are two.
//!
//! ```text
//! slot ─┐  each keeps one carrier: dials, serves, dials anew when it is lost or due
//! slot ─┴─ set: who holds which relay, and how many relays there are
//! ```
//!
//! **Invariant:** a carrier that still works has a successor, or a sibling, before it is let go;
//! only then are the sessions on it asked to move.

mod control;
mod failure;
mod set;
mod slot;

use std::sync::Arc;
use std::time::Duration;

use throwline_ops::{ReadinessGuard, Shutdown};
use throwline_tunnel::carrier::{Carrier, DialConfig, IncomingStream};
use throwline_tunnel::proto::backoff;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::AgentStatus;
use tokio::sync::watch;
use tokio::task::JoinSet;

pub use failure::Failure;

use crate::metrics::Metrics;
use set::Set;
use slot::{Left, Slot};

/// How long the relay may take to hear that this agent goes away.
const GOODBYE: Duration = Duration::from_secs(2);

/// Whose carriers they are.
pub trait Owner: Send + Sync + 'static {
    /// How to dial now, with the newest identity; which relays to avoid is decided here.
    fn dialling(&self) -> Result<DialConfig, Failure>;

    /// Takes a stream that a relay has opened. `leaving` is requested when no more sessions
    /// should begin on its carrier, and those that it has should end as their requests do.
    fn take(&self, stream: IncomingStream, leaving: &Shutdown);

    /// What relays are told of the cluster.
    fn status(&self) -> watch::Receiver<AgentStatus>;

    /// Whether somebody waits for a carrier, with a line that was cut: the back-off is shorter then.
    fn is_awaited(&self) -> bool {
        false
    }

    /// A dial has failed; the next one asks [`Owner::dialling`] again.
    fn failed(&self, failure: &Failure);
}

#[derive(Debug, Clone)]
pub struct Config {
    /// Carriers to keep where there is more than one relay. Default 2; a relay that is alone
    /// gets one.
    pub count: usize,
    pub backoff: backoff::Config,
    /// A carrier is replaced after this ± 20 %. Default 2 h: balancers cut what is older (Azure
    /// Front Door 4 h), and the load spreads over new relays.
    pub rotate: Duration,
    /// From a successor's welcome to the request that the old carrier's sessions move. Default
    /// 1 s, in which the relays tell one another of the new way.
    pub settle: Duration,
    /// Over how long agents spread their move when the set of relays grows. Default 10 s.
    pub spread: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            count: 2,
            backoff: backoff::Config::default(),
            rotate: Duration::from_secs(2 * 60 * 60),
            settle: Duration::from_secs(1),
            spread: Duration::from_secs(10),
        }
    }
}

/// The carriers of one agent.
pub struct Carriers {
    set: Arc<Set>,
    slots: JoinSet<Left>,
}

impl Carriers {
    /// Begins to dial. `ready` says whether there is a carrier.
    pub fn start(
        owner: Arc<dyn Owner>,
        config: Config,
        shutdown: Shutdown,
        ready: ReadinessGuard,
        metrics: Metrics,
    ) -> Self {
        let count = config.count.max(1);
        let set = Arc::new(Set::new(owner, config, shutdown, ready, metrics));
        let mut slots = JoinSet::new();
        for number in 0..count {
            slots.spawn(Slot::new(number, set.clone()).run());
        }
        Self { set, slots }
    }

    /// A handle for whoever needs some carrier.
    pub fn any(&self) -> Any {
        Any(self.set.clone())
    }

    /// Ends with the shutdown only; gives back what still carries sessions.
    pub async fn ended(self) -> Leftover {
        let left = self.slots.join_all().await;
        self.set.ready.not_ready("the agent is stopping");
        Leftover(left)
    }
}

/// Any of the carriers.
#[derive(Clone)]
pub struct Any(Arc<Set>);

impl Any {
    /// One that is up, as soon as there is one.
    pub async fn carrier(&self) -> Carrier {
        self.0.any().await
    }

    /// The identity has changed: each carrier is to be replaced by one that proves the new one.
    pub fn replace_all(&self) {
        self.0.replace_all();
    }
}

/// The carriers that outlive the slots, while their sessions drain.
pub struct Leftover(Vec<Left>);

impl Leftover {
    /// Tells the relays that this agent goes away, and waits until that has been said.
    pub async fn close(self) {
        let closing = self.0.into_iter().map(|mut left| async move {
            if let Some(carrier) = &left.carrier {
                carrier.close(CloseCode::GoingAway, "the agent stops");
                let _ = tokio::time::timeout(GOODBYE, carrier.gone()).await;
            }
            left.serving.shutdown().await;
        });
        futures::future::join_all(closing).await;
    }
}
