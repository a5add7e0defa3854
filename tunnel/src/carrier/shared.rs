//! What the driver of a carrier and all its handles share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;

use crate::mux::{self, StreamPermit};
use crate::proto::close::{CloseCode, CloseReason, ClosedBy};

/// What the driver and all handles share.
pub(super) struct Shared {
    id: String,
    outgoing: Arc<Semaphore>,
    outgoing_max: usize,
    incoming: Arc<Semaphore>,
    incoming_max: usize,
    /// Streams ever opened, in both directions.
    opened: AtomicU64,
    /// A stream was opened, or its permit released.
    changed: Arc<Notify>,
    /// Microseconds; 0 before the first pong.
    round_trip: AtomicU64,
    began: Instant,
    /// Milliseconds from `began` to the last byte that came in.
    last_received: AtomicU64,
    ended: watch::Sender<Option<CloseReason>>,
}

impl Shared {
    pub(super) fn new(id: String, config: &mux::Config) -> Self {
        let (outgoing_max, incoming_max) = (config.outgoing_permits(), config.incoming_permits());
        Self {
            id,
            outgoing: Arc::new(Semaphore::new(outgoing_max)),
            outgoing_max,
            incoming: Arc::new(Semaphore::new(incoming_max)),
            incoming_max,
            opened: AtomicU64::new(0),
            changed: Arc::new(Notify::new()),
            round_trip: AtomicU64::new(0),
            began: Instant::now(),
            last_received: AtomicU64::new(0),
            ended: watch::Sender::new(None),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn incoming_permit(&self) -> Option<StreamPermit> {
        self.permit(&self.incoming)
    }

    pub(super) fn outgoing_permit(&self) -> Option<StreamPermit> {
        self.permit(&self.outgoing)
    }

    fn permit(&self, of: &Arc<Semaphore>) -> Option<StreamPermit> {
        let permit = of.clone().try_acquire_owned().ok()?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.changed.notify_waiters();
        Some(StreamPermit::new(permit, self.changed.clone()))
    }

    pub(super) fn streams(&self) -> usize {
        let outgoing = self.outgoing_max - self.outgoing.available_permits();
        let incoming = self.incoming_max - self.incoming.available_permits();
        outgoing + incoming
    }

    /// Streams ever opened, in both directions.
    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// A stream was opened or its permit released, from now on.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    pub(super) fn round_trip(&self) -> Option<Duration> {
        match self.round_trip.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    pub(super) fn set_round_trip(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        self.round_trip.store(micros, Ordering::Relaxed);
    }

    pub(super) fn last_received(&self) -> Instant {
        let millis = self.last_received.load(Ordering::Relaxed);
        self.began + Duration::from_millis(millis)
    }

    pub(super) fn set_heard(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.began).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.last_received.store(millis, Ordering::Relaxed);
    }

    /// The reason why the carrier has ended, once it has.
    pub(super) fn ended(&self) -> watch::Receiver<Option<CloseReason>> {
        self.ended.subscribe()
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    pub(super) fn finish(&self, reason: CloseReason) {
        self.ended.send_replace(Some(reason));
    }

    pub(super) fn reason(&self) -> CloseReason {
        let ended = self.ended.borrow().clone();
        ended.unwrap_or_else(|| CloseReason::new(ClosedBy::Us, CloseCode::Internal, ""))
    }
}
