//! The listeners, for the public and for peers: accept, bound, terminate TLS, read one request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use throwline_certs::Kind;
use throwline_certs::tls::peer_of;
use throwline_tunnel::PrefixedIo;
use throwline_tunnel::carrier::{AcceptError, set_socket_options};
use throwline_tunnel::proto::busy;
use throwline_tunnel::read_ahead::ReadAhead;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::authenticator::Authenticator;
use super::caller::{Caller, Callers, ListenerKind};
use super::client_hello;
use super::requests::{Accepted, Outcome, Requests};
use crate::lifecycle::Lifecycle;
use crate::limits::handshakes::Handshakes;
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::session::{Established, Sessions};

/// The first and the longest pause after a failed `accept`.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Makes carriers of connections.
pub(crate) struct Listener {
    pub(crate) kind: ListenerKind,
    /// `None` where a balancer terminates TLS.
    pub(crate) tls: Option<Arc<ServerConfig>>,
    pub(crate) authenticator: Arc<Authenticator>,
    pub(crate) callers: Arc<Callers>,
    pub(crate) requests: Arc<Requests>,
    pub(crate) handshakes: Arc<Handshakes>,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Metrics,
    /// See [`Timing::tls_handshake`](crate::Timing::tls_handshake).
    pub(crate) tls_timeout: Duration,
}

impl Listener {
    /// Accepts until the listener closes. Never fails: the causes that stop one `accept` pass.
    pub(crate) async fn run(self: Arc<Self>, listener: TcpListener) {
        let mut pause = BACK_OFF.0;
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = self.closed().cancelled() => return,
            };
            match accepted {
                Ok((tcp, address)) => {
                    pause = BACK_OFF.0;
                    let connection = Arc::clone(&self).serve(tcp, address);
                    self.lifecycle.tasks.spawn(connection);
                }
                Err(error) if is_about_that_connection(&error) => {
                    debug!(%error, "a connection ended before it was accepted");
                }
                Err(error) => {
                    // Descriptors or memory are short. Unauthenticated connections make room.
                    self.metrics.accept_errors.inc();
                    self.callers.half_open.shed_oldest();
                    warn!(%error, pause_ms = pause.as_millis(), "cannot accept connections");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(BACK_OFF.1);
                }
            }
        }
    }

    /// Cancelled when no new connection is accepted. Peers bring lines to agents that have not moved
    /// yet, so theirs are accepted to the end.
    fn closed(&self) -> &CancellationToken {
        match self.kind {
            ListenerKind::Public => &self.lifecycle.draining,
            ListenerKind::Peers => &self.lifecycle.closing,
        }
    }

    /// One connection, from its first byte to the end of the carrier that it may become.
    async fn serve(self: Arc<Self>, tcp: TcpStream, address: SocketAddr) {
        let caller = self.callers.enter(self.kind, address);
        // Boxed, so that the memory of the handshake does not stay with the carrier.
        let handshake = Box::pin(self.handshake(tcp, caller.clone()));
        let established = tokio::select! {
            established = handshake => established,
            () = caller.shed() => {
                self.metrics.handshake("shed");
                debug!(from = %caller.address, "closed a half-open connection to make room");
                return;
            }
            () = self.closed().cancelled() => return,
        };
        if established.is_some() {
            caller.completed();
        }
        // Not half-open any more, whatever it has become.
        drop(caller);
        if let Some(established) = established {
            Arc::clone(&self.sessions).run(established).await;
        }
    }

    async fn handshake(&self, mut tcp: TcpStream, mut caller: Caller) -> Option<Established> {
        if let Err(error) = set_socket_options(&tcp) {
            debug!(from = %caller.address, %error, "the connection ended at once");
            return None;
        }
        let deadline = Instant::now() + self.tls_timeout;
        if caller.expects_proxy_header() {
            caller.read_proxy_header(&mut tcp, deadline).await?;
        }
        match &self.tls {
            Some(tls) => self.tls_handshake(tcp, &caller, tls, deadline).await,
            None => self.request(tcp, &caller).await,
        }
    }

    async fn tls_handshake(
        &self,
        mut tcp: TcpStream,
        caller: &Caller,
        tls: &Arc<ServerConfig>,
        deadline: Instant,
    ) -> Option<Established> {
        let address = caller.address;
        // Before the first signature, and not for a peer that has sent no more than a part of a hello.
        let first = match timeout_at(deadline, client_hello::read(&mut tcp)).await {
            Ok(Ok(first)) => first,
            Ok(Err(error)) => {
                self.metrics.handshake("tls-failed");
                debug!(from = %address, %error, "the connection ended before its TLS handshake");
                return None;
            }
            Err(_) => {
                self.metrics.handshake("tls-timeout");
                debug!(from = %address, "no TLS handshake has begun in time");
                return None;
            }
        };
        if let Err(wait) = caller.admit(address).await {
            debug!(from = %address, ?wait, "told to come again later");
            let alert = async {
                tcp.write_all(&busy::alert(wait)).await?;
                tcp.shutdown().await
            };
            // Seven bytes fit into any socket's buffer; a peer that is gone needs no answer.
            let _ = timeout_at(deadline, alert).await;
            return None;
        }
        // The wait for admission is not the peer's fault, so its time begins again.
        let deadline = Instant::now() + self.tls_timeout;
        // The ClientHello was read ahead, and rustls reads it again from here.
        let io = ReadAhead::new(PrefixedIo::new(first, tcp));
        let accept = TlsAcceptor::from(Arc::clone(tls)).accept(io);
        // On threads of lower priority: a flood of handshakes must not delay the lines.
        let tls = match timeout_at(deadline, self.handshakes.run(accept)).await {
            Ok(Some(Ok(tls))) => tls,
            Ok(Some(Err(error))) => {
                self.metrics.handshake("tls-failed");
                debug!(from = %address, %error, "the TLS handshake failed");
                return None;
            }
            Ok(None) => {
                self.metrics.handshake("tls-failed");
                debug!(from = %address, "the TLS handshake ended with the relay");
                return None;
            }
            Err(_) => {
                self.metrics.handshake("tls-timeout");
                debug!(from = %address, "the TLS handshake took too long");
                return None;
            }
        };
        let proved = tls.get_ref().1.peer_certificates().map(peer_of);
        let established = self.request(tls, caller).await?;
        // On a listener with client certificates, both proofs must be of one relay.
        match proved {
            Some(Ok(proved)) if proved.id != *established.id() => {
                self.metrics.handshake("proof-failed");
                warn!(client = %address, tls = %proved.id, assertion = %established.id(), "a peer gave two names");
                None
            }
            _ => Some(established),
        }
    }

    async fn request<T>(&self, io: T, caller: &Caller) -> Option<Established>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        match self.requests.serve(io, caller, &self.authenticator).await {
            Outcome::Answered => None,
            Outcome::Failed => {
                self.metrics.handshake("http-failed");
                None
            }
            Outcome::Upgraded { accepted, io } => self.establish(*accepted, io, caller).await,
        }
    }

    /// Verifies the peer's proof of its key, on the carrier.
    async fn establish<T>(
        &self,
        accepted: Accepted,
        io: PrefixedIo<T>,
        caller: &Caller,
    ) -> Option<Established>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let Accepted {
            assertion,
            permit,
            client,
        } = accepted;
        match self.authenticator.establish(&assertion, io).await {
            Ok((connection, proof)) => {
                self.metrics.handshake("accepted");
                let is_relay = assertion.peer.id.kind() == Kind::Relay;
                let peer = Peer {
                    identity: assertion.peer,
                    client,
                    has_own_address: !is_relay && caller.is_own_address(client),
                };
                // A network with an authenticated peer is preferred at admission, so only behind
                // the proof.
                self.sessions.authenticated(&peer);
                Some(Established {
                    peer: Arc::new(peer),
                    proof,
                    connection,
                    permit,
                    is_for_renewal: assertion.is_for_renewal,
                })
            }
            Err(AcceptError::Declined) => {
                self.metrics.handshake("declined");
                debug!(%client, peer = %assertion.peer.id, "a dialer wants another relay");
                None
            }
            Err(error) => {
                self.metrics.handshake("proof-failed");
                warn!(%client, peer = %assertion.peer.id, %error, "a carrier did not prove itself");
                None
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
