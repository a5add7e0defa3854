//! The listeners, for the public and for peers: accept, bound, end TLS, read one request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::server::Acceptor;
use throwline_certs::tls::peer_of;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::LazyConfigAcceptor;
use tracing::{debug, warn};

use crate::accept::Gate;
use crate::pace::{Turn, in_turn};
use crate::peers::Peers;
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
    let place = shared.half_open.enter(address.ip());
    // Boxed, so that the memory of the handshake does not stay with the carrier.
    let handshake = Box::pin(handshake(&shared, tcp, address, &door));
    let established = tokio::select! {
        established = handshake => established,
        () = place.shed() => {
            shared.metrics.handshake("shed");
            debug!(client = %address, "closed a half-open connection to make room");
            return;
        }
        () = door.closed(&shared) => return,
    };
    drop(place);
    if let Some(established) = established {
        session::run(shared, established).await;
    }
}

async fn handshake(
    shared: &Arc<Shared>,
    tcp: TcpStream,
    address: SocketAddr,
    door: &Door,
) -> Option<session::Established> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(client = %address, %error, "the connection ended at once");
        return None;
    }
    let Some(tls) = door.tls(shared) else {
        return request(shared, tcp, address, door, None).await;
    };
    let accept = async {
        let start = LazyConfigAcceptor::new(Acceptor::default(), tcp).await?;
        // Before the first signature, and not for whoever has sent no more than a part of a hello.
        let turn = match door {
            Door::Public => in_turn(shared).await,
            Door::Peers(_) => Turn::Now,
        };
        Ok::<_, io::Error>((start.into_stream(tls).await?, turn))
    };
    match tokio::time::timeout(shared.config.timing.tls_handshake, accept).await {
        Ok(Ok((tls, turn))) => {
            let proved = tls.get_ref().1.peer_certificates().map(peer_of);
            let established = request(shared, tls, address, door, Some(turn)).await?;
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
            debug!(client = %address, %error, "the TLS handshake failed");
            None
        }
        Err(_) => {
            shared.metrics.handshake("tls-timeout");
            debug!(client = %address, "the TLS handshake took too long");
            None
        }
    }
}

async fn request<T>(
    shared: &Arc<Shared>,
    io: T,
    address: SocketAddr,
    door: &Door,
    turn: Option<Turn>,
) -> Option<session::Established>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match public::serve(shared, io, address, door, turn).await {
        Outcome::Answered => None,
        Outcome::Failed => {
            shared.metrics.handshake("http-failed");
            None
        }
        Outcome::Upgraded { admitted, io } => session::establish(shared, door, *admitted, io).await,
    }
}
