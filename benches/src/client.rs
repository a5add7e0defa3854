//! The client of every measurement: the same code against the upstream itself and against the
//! local proxy, so that the ratio of two figures is the path's and nothing else's.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// One way to the upstream.
#[derive(Clone)]
pub(crate) struct Target {
    pub(crate) name: &'static str,
    addr: SocketAddr,
    prefix: String,
    connector: TlsConnector,
}

impl Target {
    pub(crate) fn new(
        name: &'static str,
        addr: SocketAddr,
        prefix: &str,
        ca_pem: &[u8],
        client: Option<(&Path, &Path)>,
    ) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(ca_pem) {
            roots.add(ca?)?;
        }
        let builder = rustls::ClientConfig::builder_with_provider(throwline_certs::tls::provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let mut tls = match client {
            Some((cert, key)) => {
                let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(key)?)?
            }
            None => builder.with_no_client_auth(),
        };
        // A new kubectl has no session to resume; a measurement of new connections must not either.
        tls.resumption = rustls::client::Resumption::disabled();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            name,
            addr,
            prefix: prefix.to_owned(),
            connector: TlsConnector::from(Arc::new(tls)),
        })
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<Connection> {
        let tcp = TcpStream::connect(self.addr)
            .await
            .with_context(|| format!("cannot reach {}", self.name))?;
        tcp.set_nodelay(true)?;
        let tls = self
            .connector
            .connect(ServerName::from(self.addr.ip()), tcp)
            .await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        Ok(Connection {
            sender,
            prefix: self.prefix.clone(),
            host: self.addr.to_string(),
        })
    }
}

/// One kept connection.
pub(crate) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    prefix: String,
    host: String,
}

impl Connection {
    /// One GET; how long it took until its last byte. Fails unless exactly `size` bytes came.
    pub(crate) async fn get(&mut self, size: u64) -> anyhow::Result<Duration> {
        let started = Instant::now();
        let request = self.request(Method::GET, &format!("/bytes/{size}"), Bytes::new())?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        ensure!(
            response.status().is_success(),
            "the answer was {}",
            response.status()
        );
        let mut body = response.into_body();
        let mut received = 0;
        while let Some(frame) = body.frame().await {
            received += frame?.data_ref().map_or(0, |data| data.len() as u64);
        }
        ensure!(received == size, "{received} bytes came of {size}");
        Ok(started.elapsed())
    }

    /// One POST of `body`; how long until the upstream said that it has all of it.
    pub(crate) async fn post(&mut self, body: Bytes) -> anyhow::Result<Duration> {
        let size = body.len();
        let started = Instant::now();
        let request = self.request(Method::POST, "/upload", body)?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        let answer = response.into_body().collect().await?.to_bytes();
        ensure!(
            answer == size.to_string(),
            "the upstream did not receive all {size} bytes"
        );
        Ok(started.elapsed())
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        Ok(Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.prefix))
            .header(header::HOST, &self.host)
            .body(Full::new(body))?)
    }
}
