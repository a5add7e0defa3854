//! The public listener: accept, bound, end TLS, read one request.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::public::{self, Outcome};
use crate::relay::Shared;
use crate::session;

/// The first and the longest pause after a failed `accept`.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// Accepts until the relay drains. Never fails: what stops one `accept` passes.
pub(crate) async fn run(listener: TcpListener, shared: Arc<Shared>) {
    let mut pause = BACK_OFF.0;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.draining.cancelled() => return,
        };
        match accepted {
            Ok((tcp, address)) => {
                pause = BACK_OFF.0;
                let connection = serve(Arc::clone(&shared), tcp, address);
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
async fn serve(shared: Arc<Shared>, tcp: TcpStream, address: SocketAddr) {
    let place = shared.half_open.enter(address.ip());
    // Boxed, so that the memory of the handshake does not stay with the carrier.
    let handshake = Box::pin(handshake(&shared, tcp, address));
    let established = tokio::select! {
        established = handshake => established,
        () = place.shed() => {
            shared.metrics.handshake("shed");
            debug!(client = %address, "closed a half-open connection to make room");
            return;
        }
        () = shared.draining.cancelled() => return,
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
) -> Option<session::Established> {
    if let Err(error) = tcp.set_nodelay(true) {
        debug!(client = %address, %error, "the connection ended at once");
        return None;
    }
    let Some(tls) = shared.tls.clone() else {
        return request(shared, tcp, address).await;
    };
    let accept = TlsAcceptor::from(tls).accept(tcp);
    match tokio::time::timeout(shared.config.timing.tls_handshake, accept).await {
        Ok(Ok(tls)) => request(shared, tls, address).await,
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
) -> Option<session::Established>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match public::serve(shared, io, address).await {
        Outcome::Answered => None,
        Outcome::Failed => {
            shared.metrics.handshake("http-failed");
            None
        }
        Outcome::Upgraded { admitted, io } => session::establish(shared, *admitted, io).await,
    }
}
