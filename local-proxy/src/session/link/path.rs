//! One carrier of the link: dialled on demand, closed when it is idle. There is one for each class of traffic.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use throwline_tunnel::carrier::Carrier;
use throwline_uplink::Carriers;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

use crate::failure::Failure;

/// The way to the relay for one class of traffic.
pub(super) struct Path {
    state: watch::Sender<State>,
    /// The one carrier, which a successor replaces.
    pub(super) carriers: Carriers,
    /// A task waits for a carrier.
    demand: Notify,
    last_use: Mutex<Option<Instant>>,
}

#[derive(Clone)]
pub(super) enum State {
    Down { last: Option<Failure> },
    Up { carrier: Carrier, epoch: u64 },
}

/// Why there is no carrier.
pub(super) enum NoCarrier {
    Failed(Failure),
    /// None in time, and why, if that is known.
    Timeout(Option<Failure>),
}

impl Path {
    pub(super) fn new() -> Self {
        Self {
            state: watch::Sender::new(State::Down { last: None }),
            carriers: Carriers::new(),
            demand: Notify::new(),
            last_use: Mutex::default(),
        }
    }

    /// A live carrier, waiting a bounded time for one. A failure that waiting cannot change is
    /// returned at once.
    pub(super) async fn carrier(&self, wait: Duration) -> Result<(Carrier, u64), NoCarrier> {
        self.touch();
        let mut state = self.state.subscribe();
        let mut last = match &*state.borrow_and_update() {
            State::Up { carrier, epoch } if !carrier.is_closed() => {
                return Ok((carrier.clone(), *epoch));
            }
            State::Up { .. } => None,
            State::Down { last } => last.clone(),
        };
        // After the subscription: the driver may connect at once, and its change must not be
        // missed.
        self.demand.notify_one();
        let waited = timeout(wait, async {
            while state.changed().await.is_ok() {
                match &*state.borrow_and_update() {
                    State::Up { carrier, epoch } => return Some(Ok((carrier.clone(), *epoch))),
                    State::Down {
                        last: Some(failure),
                    } if !failure.may_pass() => {
                        // No dial helps against a revoked certificate: the request fails now
                        // instead of at its deadline.
                        return Some(Err(failure.clone()));
                    }
                    State::Down { last: failure } => last = failure.clone().or(last.take()),
                }
                // The driver dials on demand only, so a request that still waits renews it.
                self.demand.notify_one();
            }
            None
        })
        .await;
        match waited {
            Ok(Some(result)) => result.map_err(NoCarrier::Failed),
            Ok(None) => Err(NoCarrier::Failed(Failure::Stopping)),
            Err(_) => Err(NoCarrier::Timeout(last)),
        }
    }

    /// The carrier that is up now.
    pub(super) fn present(&self) -> Option<Carrier> {
        match &*self.state.borrow() {
            State::Up { carrier, .. } if !carrier.is_closed() => Some(carrier.clone()),
            _ => None,
        }
    }

    pub(super) fn set(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Ends when there is a carrier that came after the one of this epoch.
    pub(super) async fn has_newer(&self, epoch: u64) {
        let mut state = self.state.subscribe();
        let is_newer = |state: &State| match state {
            State::Up { epoch: up, .. } => *up > epoch,
            State::Down { .. } => false,
        };
        // `self` keeps the channel open.
        let _ = state.wait_for(is_newer).await;
    }

    /// Ends when a task waits for a carrier.
    pub(super) async fn demanded(&self) {
        self.demand.notified().await;
    }

    fn touch(&self) {
        *self.last_use.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// When the carrier is unused, unless it is needed again before; `None` before the first use.
    pub(super) fn used_until(&self, idle: Duration) -> Option<Instant> {
        let last = *self.last_use.lock().unwrap_or_else(PoisonError::into_inner);
        last.map(|last| last + idle)
    }
}
