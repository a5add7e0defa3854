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

use super::access::Credentials;
use super::error::{ConnectError, Error};

/// TLS, or plain TCP for a kubeconfig with `http:`.
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

/// How long the silent peer of an upgraded connection may be lost before the kernel detects it.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

pub(super) async fn connect(
    credentials: &Credentials,
    protocols: Protocols,
    within: Duration,
) -> Result<Connected, Error> {
    let (host, port) = &credentials.address;
    let connecting = async {
        let tcp = tcp(host, *port).await.map_err(|source| ConnectError::Tcp {
            host: host.clone(),
            port: *port,
            source,
        })?;
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
    match tokio::time::timeout(within, connecting).await {
        Ok(connected) => connected,
        Err(_) => Err(Error::Connect(ConnectError::Timeout {
            host: host.clone(),
            port: *port,
            within,
        })),
    }
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
    match error.downcast::<rustls::Error>() {
        Ok(cause) => Error::Tls(cause),
        Err(error) => Error::Connect(ConnectError::Handshake(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::access::ClusterAccess;
    use super::*;
    use rustls::NamedGroup;

    /// kube builds the configuration from the process' default provider.
    #[tokio::test]
    async fn the_key_exchange_with_the_api_server_is_post_quantum_at_both_ends() {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        // As an API server in Go 1.24: it supports both, and selects what the client prefers.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), made.cert.pem()).unwrap();
        let path = dir.path().join("kubeconfig");
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://{address}', certificate-authority: ca.pem}}}}]\n\
             users: [{{name: u, user: {{token: t}}}}]\n"
        );
        std::fs::write(&path, kubeconfig).unwrap();
        let credentials = Credentials::load(&ClusterAccess::Kubeconfig(path))
            .await
            .unwrap();
        for protocols in [Protocols::Any, Protocols::Http1] {
            let accept = async {
                let (tcp, _) = listener.accept().await.unwrap();
                acceptor.accept(tcp).await.unwrap()
            };
            let connecting = connect(&credentials, protocols, Duration::from_secs(60));
            let (near, far) = tokio::join!(connecting, accept);
            let Either::Left(near) = near.unwrap().io else {
                panic!("not TLS")
            };
            for group in [
                near.get_ref().1.negotiated_key_exchange_group(),
                far.get_ref().1.negotiated_key_exchange_group(),
            ] {
                let group = group.map(|group| group.name());
                assert_eq!(group, Some(NamedGroup::X25519MLKEM768));
            }
        }
    }
}
