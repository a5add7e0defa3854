//! Which handshakes (TLS and proof) the relay takes on, and when.
//!
//! A handshake that was admitted must complete, and those that cannot be admitted soon must learn so
//! early, or thousands of peers that reconnect at once time out while the relay still works for them.
//! So the number of handshakes under way is bounded by what was measured: it grows while they take as
//! long as they must, and shrinks once they spend a second more than that waiting for a processor,
//! the relay's or the peers' own (additive increase, multiplicative decrease). A rate is the upper
//! bound of it all, for the sake of the lines that are open.
//!
//! Those that wait are served fairly: one network (an IPv4 address, an IPv6 /64) after the other, four
//! from networks of which a peer was authenticated lately for each one from a network that is not known.
//! Every step is O(1) or O(log n), and memory is bounded by the half-open connections.
//!
//! ```text
//! admission ─┬ queue ─┬ ring  (networks in turn)
//! one driver │ pure   ├ bound (how many at once)
//!            │        └ rates (the most that begin, how many end)
//!            └ known_networks
//! ```

mod bound;
mod known_networks;
mod queue;
mod rates;
mod ring;
#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::limits::half_open::network_of;
use known_networks::KnownNetworks;
use queue::{Arrived, MAX_QUEUE_DELAY, Queue, Verdict};

/// Admits handshakes. Clones are the same.
#[derive(Clone)]
pub(crate) struct HandshakeAdmission(Arc<Inner>);

struct Inner {
    queue: Mutex<Queue<oneshot::Sender<Verdict>>>,
    known: Mutex<KnownNetworks>,
    changed: Notify,
}

/// The right to shake hands, until it is dropped.
pub(crate) struct HandshakePermit {
    inner: Arc<Inner>,
    ticket: u64,
}

/// What becomes of a handshake.
pub(crate) enum Admitted {
    Now(HandshakePermit),
    /// Not soon: the peer should dial again after this long.
    RetryAfter(Duration),
}

impl HandshakeAdmission {
    /// At most `per_second`, once as many were admitted at once; at least 1.
    pub(crate) fn new(per_second: u32) -> Self {
        Self(Arc::new(Inner {
            queue: Mutex::new(Queue::new(per_second, Instant::now())),
            known: Mutex::default(),
            changed: Notify::new(),
        }))
    }

    /// Waits for a turn, if it is expected soon.
    pub(crate) async fn admit(&self, client: Option<IpAddr>) -> Admitted {
        let inner = &self.0;
        let network = client.map(network_of);
        let is_known =
            network.is_some_and(|network| inner.known().contains(network, Instant::now()));
        let (tell, verdict) = oneshot::channel();
        let arrived = inner.lock().arrive(Instant::now(), network, is_known, tell);
        let ticket = match arrived {
            Arrived::RetryAfter(wait) => return Admitted::RetryAfter(wait),
            Arrived::Admitted(ticket) | Arrived::Waits(ticket) => ticket,
        };
        let permit = HandshakePermit {
            inner: Arc::clone(inner),
            ticket,
        };
        if matches!(arrived, Arrived::Admitted(_)) {
            return Admitted::Now(permit);
        }
        inner.changed.notify_one();
        // The permit gives its place back where this future is dropped.
        match verdict.await {
            Ok(Verdict::Admitted) => Admitted::Now(permit),
            Ok(Verdict::RetryAfter(wait)) => Admitted::RetryAfter(wait),
            Err(_) => Admitted::RetryAfter(MAX_QUEUE_DELAY),
        }
    }

    /// Admits waiting peers in their turn. Never ends.
    pub(crate) async fn drive(&self) {
        loop {
            let next = {
                let mut queue = self.0.lock();
                let now = Instant::now();
                for (tell, verdict) in queue.advance(now) {
                    // A closed channel: the permit was dropped.
                    let _ = tell.send(verdict);
                }
                queue.next(now)
            };
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.0.changed.notified() => {}
            }
        }
    }

    /// A peer from here was authenticated now.
    pub(crate) fn authenticated(&self, client: IpAddr) {
        let network = network_of(client);
        self.0.known().insert(network, Instant::now());
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Queue<oneshot::Sender<Verdict>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, KnownNetworks> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HandshakePermit {
    /// The handshake has completed.
    pub(crate) fn completed(self) {
        let now = Instant::now();
        self.inner.lock().completed(self.ticket, now);
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        self.inner.lock().leave(self.ticket);
        self.inner.changed.notify_one();
    }
}
