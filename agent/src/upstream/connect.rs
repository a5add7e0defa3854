//! One connection to the API server.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use throwline_tunnel::read_ahead::ReadAhead;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::Error;
use super::access::Credentials;

/// TLS, or plain TCP for a kubeconfig that says `http:`.
pub(crate) type Transport = Either<TlsStream<ReadAhead<TcpStream>>, TcpStream>;

/// Which protocols to offer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Protocols {
    Any,
    /// An upgrade; kubectl offers no ALPN for it either.
    Http1,
}

pub(super) struct Connected {
    pub(super) io: Transport,
    pub(super) http2: bool,
}

/// How long a silent peer of an upgraded connection may be gone before the kernel notices.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

pub(super) async fn connect(
    credentials: &Credentials,
    protocols: Protocols,
    within: Duration,
) -> Result<Connected, Error> {
    let connecting = async {
        let (host, port) = (credentials.address.0.as_str(), credentials.address.1);
        let tcp = tcp(host, port)
            .await
            .map_err(|error| Error::Connect(format!("{host}:{port}: {error}")))?;
        let Some((config, name)) = &credentials.tls else {
            return Ok(Connected {
                io: Either::Right(tcp),
                http2: false,
            });
        };
        let mut config = config.clone();
        config.alpn_protocols = match protocols {
            Protocols::Any => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Protocols::Http1 => Vec::new(),
        };
        let tls = TlsConnector::from(Arc::new(config))
            .connect(name.clone(), ReadAhead::new(tcp))
            .await
            .map_err(tls_error)?;
        let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(Connected {
            io: Either::Left(tls),
            http2,
        })
    };
    tokio::time::timeout(within, connecting)
        .await
        .unwrap_or_else(|_| {
            let (host, port) = &credentials.address;
            Err(Error::Connect(format!(
                "{host}:{port} does not answer within {} s",
                within.as_secs()
            )))
        })
}

async fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect((host, port)).await?;
    tcp.set_nodelay(true)?;
    let keep_alive = TcpKeepalive::new()
        .with_time(KEEP_ALIVE)
        .with_interval(KEEP_ALIVE / 3);
    SockRef::from(&tcp).set_tcp_keepalive(&keep_alive)?;
    Ok(tcp)
}

fn tls_error(error: io::Error) -> Error {
    // A connection that is cut in the handshake is the network's fault, not the certificates'.
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    {
        Some(cause) => Error::Tls(cause.to_string()),
        None => Error::Connect(error.to_string()),
    }
}
