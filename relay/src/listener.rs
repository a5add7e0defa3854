//! The listeners, for the public and for peers: accept, bound, end TLS, read one request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use rustls::ServerConfig;
use rustls::server::Acceptor;
use throwline_certs::tls::peer_of;
use throwline_tunnel::read_ahead::ReadAhead;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::LazyConfigAcceptor;
use tracing::{debug, warn};

use crate::accept::Gate;
use crate::half_open::Place;
use crate::pace::{Turn, in_turn};
use crate::peers::Peers;
use crate::proxy_header;
use crate::public::{self, Outcome};
use crate::relay::Shared;
use crate::session;

/// The first and the longest pause after a failed `accept`.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Which listener a connection came by.
#[derive(Clone)]
pub(crate) enum Door {
    Public,
    Peers(Arc<Peers>),
}

impl Door {
    pub(crate) fn gate<'a>(&'a self, shared: &'a Shared) -> &'a Gate {
        match self {
            Self::Public => &shared.gate,
            Self::Peers(peers) => &peers.gate,
        }
    }

    fn tls(&self, shared: &Shared) -> Option<Arc<ServerConfig>> {
        match self {
            Self::Public => shared.tls.clone(),
            Self::Peers(peers) => Some(Arc::clone(&peers.tls)),
        }
    }

    /// When nobody new is let in. Peers bring lines to agents that have not moved yet, so they are
    /// let in to the end.
    async fn closed(&self, shared: &Shared) {
        match self {
            Self::Public => shared.draining.cancelled().await,
            Self::Peers(_) => shared.closing.cancelled().await,
        }
    }
}

/// From where a connection came and by which door, and its place among the half-open ones.
#[derive(Clone)]
pub(crate) struct Caller {
    pub(crate) door: Door,
    /// The TCP peer's, or that of the client that its PROXY header named.
    pub(crate) address: SocketAddr,
    place: Arc<Place>,
    /// Of its handshake; `None` until it is taken.
    pub(crate) turn: Option<Turn>,
}

impl Caller {
    fn new(shared: &Shared, door: Door, peer: SocketAddr) -> Self {
        let address = SocketAddr::new(peer.ip().to_canonical(), peer.port());
        // A balancer's own address says nothing about who fills the set.
        let holder = match &door {
            Door::Public if shared.trusted.contains(address.ip()) => None,
            Door::Public | Door::Peers(_) => Some(address.ip()),
        };
        let place = Arc::new(shared.half_open.enter(holder));
        Self {
            door,
            address,
            place,
            turn: None,
        }
    }

    /// The address to limit, to log and to tell the agent, now that the request's head is read.
    pub(crate) fn client(&self, shared: &Shared, headers: &HeaderMap) -> SocketAddr {
        match self.door {
            Door::Public => {
                let client = shared.trusted.client(self.address, headers);
                self.is_of(shared, client);
                client
            }
            Door::Peers(_) => self.address,
        }
    }

    fn is_of(&self, shared: &Shared, client: SocketAddr) {
        if !shared.trusted.contains(client.ip()) {
            self.place.belongs_to(client.ip());
        }
    }

    fn owes_a_proxy_header(&self, shared: &Shared) -> bool {
        matches!(self.door, Door::Public)
            && shared.config.proxy_protocol
            && shared.trusted.contains(self.address.ip())
    }
}

/// Accepts until the door closes. Never fails: what stops one `accept` passes.
pub(crate) async fn run(listener: TcpListener, shared: Arc<Shared>, door: Door) {
    let mut pause = BACK_OFF.0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = door.closed(&shared) => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                pause = BACK_OFF.0;
                let connection = serve(Arc::clone(&shared), tcp, address, door.clone());
                shared.tasks.spawn(connection);
            }
            Err(error) if is_about_that_connection(&error) => {
                debug!(%error, "a connection ended before it was accepted");
            }
            Err(error) => {
                // Descriptors or memory are short. Whoever has not proved anything gives way.
                shared.metrics.accept_errors.inc();
                shared.half_open.shed_oldest();
                warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(BACK_OFF.1);
            }
        }
    }
}

fn is_about_that_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

/// One connection, from its first byte to the end of the carrier that it may become.
async fn serve(shared: Arc<Shared>, tcp: TcpStream, address: SocketAddr, door: Door) {
    let caller = Caller::new(&shared, door, address);
    // Boxed, so that the memory of the handshake does not stay with the carrier.
    let handshake = Box::pin(handshake(&shared, tcp, caller.clone()));
    let established = tokio::select! {
        established = handshake => established,
        () = caller.place.shed() => {
            shared.metrics.handshake("shed");
            debug!(from = %caller.address, "closed a half-open connection to make room");
            return;
        }
        () = caller.door.closed(&shared) => return,
    };
    drop(caller);
    if let Some(established) = established {
        session::run(shared, established).await;
    }
}

async fn handshake(
    shared: &Arc<Shared>,
    mut tcp: TcpStream,
    mut caller: Caller,
) -> Option<session::Established> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(from = %caller.address, %error, "the connection ended at once");
        return None;
    }
    let deadline = Instant::now() + shared.config.timing.tls_handshake;
    if caller.owes_a_proxy_header(shared) {
        introduce(shared, &mut tcp, &mut caller, deadline).await?;
    }
    let address = caller.address;
    let Some(tls) = caller.door.tls(shared) else {
        return request(shared, tcp, &caller).await;
    };
    let accept = async {
        let start = LazyConfigAcceptor::new(Acceptor::default(), ReadAhead::new(tcp)).await?;
        // Before the first signature, and not for whoever has sent no more than a part of a hello.
        caller.turn = Some(match caller.door {
            Door::Public => in_turn(shared).await,
            Door::Peers(_) => Turn::Now,
        });
        start.into_stream(tls).await
    };
    match timeout_at(deadline, accept).await {
        Ok(Ok(tls)) => {
            let proved = tls.get_ref().1.peer_certificates().map(peer_of);
            let established = request(shared, tls, &caller).await?;
            // On a door with client certificates, both proofs are of one relay.
            match proved {
                Some(Ok(proved)) if proved.id != *established.id() => {
                    shared.metrics.handshake("proof-failed");
                    warn!(client = %address, tls = %proved.id, assertion = %established.id(), "a peer gave two names");
                    None
                }
                _ => Some(established),
            }
        }
        Ok(Err(error)) => {
            shared.metrics.handshake("tls-failed");
            debug!(from = %address, %error, "the TLS handshake failed");
            None
        }
        Err(_) => {
            shared.metrics.handshake("tls-timeout");
            debug!(from = %address, "the TLS handshake took too long");
            None
        }
    }
}

/// Takes the client's address from the balancer's PROXY header.
async fn introduce(
    shared: &Shared,
    tcp: &mut TcpStream,
    caller: &mut Caller,
    deadline: Instant,
) -> Option<()> {
    let balancer = caller.address;
    match timeout_at(deadline, proxy_header::read(tcp)).await {
        Ok(Ok(Some(client))) => {
            caller.address = client;
            caller.is_of(shared, client);
            return Some(());
        }
        Ok(Ok(None)) => return Some(()),
        Ok(Err(error @ proxy_header::Error::Silent)) => {
            debug!(%balancer, %error, "a balancer looked whether somebody listens");
            return None;
        }
        Ok(Err(error)) => warn!(%balancer, %error, "refused a connection"),
        Err(_) => warn!(%balancer, "the PROXY header did not come in time"),
    }
    shared.metrics.handshake("proxy-header");
    None
}

async fn request<T>(shared: &Arc<Shared>, io: T, caller: &Caller) -> Option<session::Established>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match public::serve(shared, io, caller).await {
        Outcome::Answered => None,
        Outcome::Failed => {
            shared.metrics.handshake("http-failed");
            None
        }
        Outcome::Upgraded { admitted, io } => {
            session::establish(shared, &caller.door, *admitted, io).await
        }
    }
}
