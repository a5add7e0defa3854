//! The sealed session: TLS 1.3 on a line, between the user's certificate and the agent's.
//!
//! The relay between them sees ciphertext. What the certificates must be is decided by the
//! `rustls` configs, which come from elsewhere; here are the deadline and the types.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::line::Line;
use crate::proto::line::resume::{Key, LABEL};

/// Longest handshake, either side. Two round trips of the wide-area network fit many times.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Opens a session as the local proxy.
///
/// # Errors
/// The handshake fails, or the peer's certificate is not accepted.
pub async fn connect<S>(
    line: Line<S>,
    config: Arc<rustls::ClientConfig>,
    name: ServerName<'static>,
) -> io::Result<client::TlsStream<Line<S>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let session = within(TlsConnector::from(config).connect(name, line)).await?;
    let (line, tls) = session.get_ref();
    arm(line, tls)?;
    Ok(session)
}

/// Accepts a session as the agent.
///
/// # Errors
/// As [`connect`].
pub async fn accept<S>(
    line: Line<S>,
    config: Arc<rustls::ServerConfig>,
) -> io::Result<server::TlsStream<Line<S>>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let session = within(TlsAcceptor::from(config).accept(line)).await?;
    let (line, tls) = session.get_ref();
    arm(line, tls)?;
    Ok(session)
}

/// From here on the line outlives its stream: both ends have a secret that no relay has.
fn arm<S, Side>(line: &Line<S>, tls: &rustls::ConnectionCommon<Side>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if line.is_resumable() {
        let secret = tls.export_keying_material([0; 32], LABEL, Some(line.id()));
        line.arm(Key::new(&secret.map_err(io::Error::other)?));
    }
    Ok(())
}

async fn within<T>(handshake: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the sealed session's handshake took too long",
        )),
    }
}
