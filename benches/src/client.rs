//! The client of every measurement: the same code against the upstream itself and through each
//! tunnel, so that the ratio of two figures is the path's and nothing else's.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{CipherSuite, NamedGroup, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

const ALPN: &[u8] = b"http/1.1";

/// The cryptography of client and upstream, the same on every way: what we choose for ourselves
/// must not change what we are measured by. Its key exchange is kubectl's and the API server's.
pub(crate) fn yardstick() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
        .kx_groups
        .sort_by_key(|group| group.name() != NamedGroup::X25519MLKEM768);
    Arc::new(provider)
}

/// One way to the upstream.
#[derive(Clone)]
pub(crate) struct Target {
    addr: SocketAddr,
    prefix: String,
    connector: TlsConnector,
}

impl Target {
    /// The upstream's own TLS at this address.
    pub(crate) fn bare(addr: SocketAddr, ca_pem: &str) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
            roots.add(ca?)?;
        }
        let mut tls = rustls::ClientConfig::builder_with_provider(yardstick())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self::new(addr, String::new(), tls))
    }

    /// As a kubeconfig has it.
    pub(crate) fn of(context: &throwline_e2e::client::Target) -> anyhow::Result<Self> {
        let tls = context.tls_with(yardstick(), &[ALPN])?;
        Ok(Self::new(
            context.address.parse()?,
            context.prefix.clone(),
            tls,
        ))
    }

    fn new(addr: SocketAddr, prefix: String, mut tls: rustls::ClientConfig) -> Self {
        // A new kubectl has no session to resume; a measurement of new connections must not either.
        tls.resumption = rustls::client::Resumption::disabled();
        Self {
            addr,
            prefix,
            connector: TlsConnector::from(Arc::new(tls)),
        }
    }

    async fn secure(&self) -> anyhow::Result<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.addr)
            .await
            .with_context(|| format!("cannot reach {}", self.addr))?;
        tcp.set_nodelay(true)?;
        let name = ServerName::from(self.addr.ip());
        Ok(self.connector.connect(name, tcp).await?)
    }

    pub(crate) async fn connect(&self) -> anyhow::Result<Connection> {
        let tls = self.secure().await?;
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tls)).await?;
        tokio::spawn(connection);
        Ok(Connection {
            sender,
            prefix: self.prefix.clone(),
            host: self.addr.to_string(),
        })
    }

    /// An upgraded request, as exec sends it, on a separate line.
    pub(crate) async fn upgrade(&self) -> anyhow::Result<Echo> {
        let mut stream = self.secure().await?;
        let path = "/api/v1/namespaces/default/pods/p/exec?command=cat&stdin=true";
        let head = format!(
            "POST {}{path} HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\
             Content-Length: 0\r\n\r\n",
            self.prefix, self.addr
        );
        stream.write_all(head.as_bytes()).await?;
        stream.flush().await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            answer.push(stream.read_u8().await?);
        }
        let switched = answer.starts_with(b"HTTP/1.1 101");
        ensure!(switched, "{}", String::from_utf8_lossy(&answer));
        Ok(Echo { stream })
    }

    /// Connects, asks for so many bytes, and reads none of them for as long as this is held.
    pub(crate) async fn stall(&self, size: u64) -> anyhow::Result<Stalled> {
        let mut connection = self.connect().await?;
        let body = connection.begin(size).await?;
        Ok(Stalled {
            _connection: connection,
            _body: body,
        })
    }
}

/// An upgraded connection whose far end sends back what it gets.
pub(crate) struct Echo {
    stream: TlsStream<TcpStream>,
}

impl Echo {
    /// There and back.
    pub(crate) async fn ask(&mut self, message: &[u8]) -> anyhow::Result<()> {
        self.stream.write_all(message).await?;
        self.stream.flush().await?;
        let mut answer = vec![0; message.len()];
        self.stream.read_exact(&mut answer).await?;
        ensure!(answer == message, "the echo is another");
        Ok(())
    }
}

/// A reader that has stopped.
pub(crate) struct Stalled {
    _connection: Connection,
    _body: Incoming,
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
        let mut body = self.begin(size).await?;
        let mut received = 0;
        while let Some(frame) = body.frame().await {
            received += frame?.data_ref().map_or(0, |data| data.len() as u64);
        }
        ensure!(received == size, "{received} bytes came of {size}");
        Ok(started.elapsed())
    }

    async fn begin(&mut self, size: u64) -> anyhow::Result<Incoming> {
        let request = self.request(Method::GET, &format!("/bytes/{size}"), Bytes::new())?;
        self.sender.ready().await?;
        let response = self.sender.send_request(request).await?;
        ensure!(
            response.status().is_success(),
            "the answer was {}",
            response.status()
        );
        Ok(response.into_body())
    }

    /// One POST of `body`; how long until the upstream acknowledged all of it.
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
