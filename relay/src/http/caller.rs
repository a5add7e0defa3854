//! A connection that is not authenticated yet: its client's address, and what is counted for that.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::HeaderMap;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::client_addr::TrustedProxies;
use super::proxy_header;
use crate::limits::admission::{Admitted, HandshakeAdmission, HandshakePermit};
use crate::limits::half_open::{HalfOpen, Place};
use crate::metrics::Metrics;

/// Which listener a connection came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListenerKind {
    Public,
    /// For the other relays of the set.
    Peers,
}

/// What both listeners count by client address.
pub(crate) struct Callers {
    pub(crate) trusted: TrustedProxies,
    pub(crate) half_open: HalfOpen,
    pub(crate) admission: HandshakeAdmission,
    pub(crate) metrics: Metrics,
    /// Whether connections of trusted proxies begin with a PROXY header.
    pub(crate) proxy_protocol: bool,
}

/// One connection, with its place among the half-open ones. Clones are of the same connection.
#[derive(Clone)]
pub(super) struct Caller {
    callers: Arc<Callers>,
    pub(super) kind: ListenerKind,
    /// The TCP peer's, or that of the client in the PROXY header.
    pub(super) address: SocketAddr,
    place: Arc<Place>,
    handshake: Arc<Mutex<Handshake>>,
}

/// Whether a caller's handshake is admitted.
enum Handshake {
    NotAdmitted,
    /// Not limited: another relay, or a balancer's health check.
    Exempt,
    UnderWay(HandshakePermit),
}

impl Callers {
    pub(super) fn enter(self: &Arc<Self>, kind: ListenerKind, peer: SocketAddr) -> Caller {
        let address = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        let (holder, handshake) = match kind {
            // By a balancer's own address, the client that fills the set cannot be identified.
            ListenerKind::Public if self.trusted.contains(address.ip()) => {
                (None, Handshake::NotAdmitted)
            }
            ListenerKind::Public => (Some(address.ip()), Handshake::NotAdmitted),
            ListenerKind::Peers => (Some(address.ip()), Handshake::Exempt),
        };
        Caller {
            kind,
            address,
            place: Arc::new(self.half_open.enter(holder)),
            handshake: Arc::new(Mutex::new(handshake)),
            callers: Arc::clone(self),
        }
    }
}

impl Caller {
    /// The address to limit, to log and to pass to the agent, now that the request's head is read.
    pub(super) fn client(&self, headers: &HeaderMap) -> SocketAddr {
        match self.kind {
            ListenerKind::Public => {
                let client = self.callers.trusted.client(self.address, headers);
                self.attribute_to(client);
                client
            }
            ListenerKind::Peers => self.address,
        }
    }

    /// Whether an address is the client's own, and not one of a balancer that stands for many.
    pub(super) fn is_own_address(&self, client: SocketAddr) -> bool {
        !self.callers.trusted.contains(client.ip())
    }

    fn attribute_to(&self, client: SocketAddr) {
        if self.is_own_address(client) {
            self.place.belongs_to(client.ip());
        }
    }

    /// Waits until its handshake is admitted, counted for the network of `client`, unless that is a
    /// balancer.
    ///
    /// # Errors
    /// How long to stay away.
    pub(super) async fn admit(&self, client: SocketAddr) -> Result<(), Duration> {
        if !matches!(*self.lock(), Handshake::NotAdmitted) {
            return Ok(());
        }
        let network = Some(client.ip()).filter(|_| self.is_own_address(client));
        match self.callers.admission.admit(network).await {
            Admitted::Now(permit) => {
                *self.lock() = Handshake::UnderWay(permit);
                Ok(())
            }
            Admitted::RetryAfter(wait) => {
                self.callers.metrics.limited("handshakes");
                self.callers.metrics.handshake("busy");
                Err(wait)
            }
        }
    }

    /// The handshake has completed: its duration adjusts how many the relay admits at once.
    pub(super) fn completed(&self) {
        let handshake = std::mem::replace(&mut *self.lock(), Handshake::Exempt);
        if let Handshake::UnderWay(permit) = handshake {
            permit.completed();
        }
    }

    /// Ends when this connection has to make room for newer ones.
    pub(super) async fn shed(&self) {
        self.place.shed().await;
    }

    pub(super) fn expects_proxy_header(&self) -> bool {
        self.kind == ListenerKind::Public
            && self.callers.proxy_protocol
            && self.callers.trusted.contains(self.address.ip())
    }

    /// Takes the client's address from the balancer's PROXY header. `None`: the connection is not
    /// served.
    pub(super) async fn read_proxy_header(
        &mut self,
        tcp: &mut TcpStream,
        deadline: Instant,
    ) -> Option<()> {
        let balancer = self.address;
        match timeout_at(deadline, proxy_header::read(tcp)).await {
            Ok(Ok(Some(client))) => {
                self.address = client;
                self.attribute_to(client);
                return Some(());
            }
            // The balancer's own connection: a health check. A relay that is busy is not down.
            Ok(Ok(None)) => {
                *self.lock() = Handshake::Exempt;
                return Some(());
            }
            Ok(Err(error @ proxy_header::Error::Silent)) => {
                debug!(%balancer, %error, "a balancer checked whether the port is open");
                return None;
            }
            Ok(Err(error)) => warn!(%balancer, %error, "refused a connection"),
            Err(_) => warn!(%balancer, "the PROXY header did not come in time"),
        }
        self.callers.metrics.handshake("proxy-header");
        None
    }

    fn lock(&self) -> MutexGuard<'_, Handshake> {
        // Nothing under this lock can panic.
        self.handshake
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
