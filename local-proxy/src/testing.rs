//! A stand-in for everything behind the sealed sessions, and a client that speaks as kubectl does.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::client::conn;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use throwline_kube_wire::http1::gate::Gate;
use throwline_ops::{Drain, Shutdown, ShutdownTrigger};
use throwline_tunnel::proto::messages::LineKind;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{LoopbackLimits, SessionLimits, Timing};
use crate::failure::Failure;
use crate::loopback::server;
use crate::loopback::tls::{self as loopback, LoopbackTls};
use crate::metrics::Metrics;
use crate::request::proxy::{LargeHeads, Proxy};
use crate::session::{Dial, Dialed, Epoch, SessionContext, Sessions};
use crate::store::Store;

pub(crate) type AnyBody = BoxBody<Bytes, io::Error>;
pub(crate) type Answer = Response<AnyBody>;
type Handler = Arc<dyn Fn(Request<Incoming>) -> BoxFuture<'static, Answer> + Send + Sync>;

/// Serves sessions over in-memory pipes, as an agent does over lines.
pub(crate) struct Agent {
    handler: Handler,
    pub(crate) epoch: AtomicU64,
    pub(crate) api_dials: AtomicUsize,
    pub(crate) upgrade_dials: AtomicUsize,
    /// What the next dials fail with, for as long as it is set.
    pub(crate) failure: Mutex<Option<Failure>>,
    /// Cuts the sessions that are open.
    sessions: Mutex<CancellationToken>,
    /// Asks the sessions that are open to finish, as a GOAWAY does.
    drains: Mutex<CancellationToken>,
    pub(crate) streams: u32,
    /// So many next API sessions end with NO_ERROR at the first request, which is not processed.
    pub(crate) ending: AtomicUsize,
    /// So many next API sessions answer by 103 without end.
    pub(crate) hinting: AtomicUsize,
}

impl Agent {
    pub(crate) fn new<F, R>(handler: F) -> Arc<Self>
    where
        F: Fn(Request<Incoming>) -> R + Send + Sync + 'static,
        R: Future<Output = Answer> + Send + 'static,
    {
        Arc::new(Self {
            handler: Arc::new(move |request| Box::pin(handler(request))),
            epoch: AtomicU64::new(1),
            api_dials: AtomicUsize::new(0),
            upgrade_dials: AtomicUsize::new(0),
            failure: Mutex::default(),
            sessions: Mutex::default(),
            drains: Mutex::default(),
            streams: 200,
            ending: AtomicUsize::new(0),
            hinting: AtomicUsize::new(0),
        })
    }

    pub(crate) fn cut(&self) {
        std::mem::take(&mut *self.sessions.lock().unwrap()).cancel();
    }

    pub(crate) fn drain(&self) {
        std::mem::take(&mut *self.drains.lock().unwrap()).cancel();
    }
}

impl Dial for Agent {
    fn dial<'a>(
        &'a self,
        _cluster: &'a str,
        kind: LineKind,
    ) -> BoxFuture<'a, Result<Dialed, Failure>> {
        Box::pin(async move {
            let dials = match kind {
                LineKind::Upgrade => &self.upgrade_dials,
                _ => &self.api_dials,
            };
            dials.fetch_add(1, Ordering::SeqCst);
            // A dial takes time, in which others come.
            tokio::task::yield_now().await;
            if let Some(failure) = self.failure.lock().unwrap().clone() {
                return Err(failure);
            }
            let (near, far) = tokio::io::duplex(64 * 1024);
            let handler = self.handler.clone();
            let cut = self.sessions.lock().unwrap().clone();
            let drain = self.drains.lock().unwrap().clone();
            let service = service_fn(move |request| {
                let answer = handler(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let one_of = |count: &AtomicUsize| {
                let less = |count: usize| count.checked_sub(1);
                count
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                    .is_ok()
            };
            let is_ending = one_of(&self.ending);
            if is_ending || one_of(&self.hinting) {
                tokio::spawn(async move {
                    match is_ending {
                        true => drop(end_in_peace(far).await),
                        false => hint_without_end(far).await,
                    }
                });
                return Ok(Dialed {
                    io: Box::new(near),
                    epoch: self.epoch(),
                    line: None,
                    round_trip: Duration::ZERO,
                });
            }
            let io = TokioIo::new(far);
            match kind {
                LineKind::Upgrade => {
                    let gate = Gate::new(io.into_inner(), |_| 0, Arc::new(LargeHeads::new(16)));
                    let notes = gate.notes();
                    let handler = self.handler.clone();
                    let service = service_fn(move |mut request: Request<Incoming>| {
                        if let Some(long) = notes.take().target {
                            request.extensions_mut().insert(long);
                        }
                        let answer = handler(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let connection = hyper::server::conn::http1::Builder::new()
                        .max_buf_size(2 * 1024 * 1024)
                        .serve_connection(TokioIo::new(gate), service)
                        .with_upgrades();
                    tokio::spawn(cut.run_until_cancelled_owned(connection));
                }
                _ => {
                    let mut builder =
                        hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    builder.max_concurrent_streams(self.streams);
                    let connection = builder.serve_connection(io, service);
                    tokio::spawn(cut.run_until_cancelled_owned(async move {
                        tokio::pin!(connection);
                        tokio::select! {
                            _ = connection.as_mut() => {}
                            () = drain.cancelled() => {
                                connection.as_mut().graceful_shutdown();
                                let _ = connection.await;
                            }
                        }
                    }));
                }
            }
            Ok(Dialed {
                io: Box::new(near),
                epoch: self.epoch(),
                line: None,
                round_trip: Duration::ZERO,
            })
        })
    }

    fn epoch(&self) -> Epoch {
        Epoch {
            generation: 0,
            carrier: self.epoch.load(Ordering::SeqCst),
        }
    }
}

/// SETTINGS, then `:status: 103` by its name in HPACK's table, in a separate frame, without end.
async fn hint_without_end(mut io: tokio::io::DuplexStream) {
    let _ = io.read(&mut [0; 4096]).await;
    let _ = io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await;
    let hint = [0, 0, 5, 1, 4, 0, 0, 0, 1, 0x08, 3, b'1', b'0', b'3'];
    while io.write_all(&hint).await.is_ok() {}
}

struct Shareable(Arc<Agent>);

impl Dial for Shareable {
    fn dial<'a>(&'a self, c: &'a str, kind: LineKind) -> BoxFuture<'a, Result<Dialed, Failure>> {
        self.0.dial(c, kind)
    }

    fn epoch(&self) -> Epoch {
        self.0.epoch()
    }
}

/// A local proxy on a free port, without relay.
pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) store: Store,
    pub(crate) proxy: Arc<Proxy>,
    pub(crate) metrics: Metrics,
    pub(crate) shutdown: ShutdownTrigger,
    _kill: tokio_util::sync::DropGuard,
    _dir: tempfile::TempDir,
}

impl Running {
    pub(crate) async fn start(agent: &Arc<Agent>) -> Self {
        Self::start_with(agent, Timing::default()).await
    }

    pub(crate) async fn start_with(agent: &Arc<Agent>, timing: Timing) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path().join("state"));
        let tls = LoopbackTls::open(&store).unwrap().tls;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let metrics = Metrics::new();
        let kill = CancellationToken::new();
        let proxy = Arc::new(Proxy {
            large_heads: Arc::new(LargeHeads::new(LoopbackLimits::default().large_heads)),
            drain: Drain::new(),
            sessions: Arc::new(Sessions::new(SessionContext {
                dial: Arc::new(Shareable(agent.clone())),
                timing: timing.clone(),
                limits: SessionLimits::default(),
                metrics: metrics.clone(),
                tasks: TaskTracker::new(),
                kill: kill.clone(),
            })),
            only: None,
        });
        let (trigger, shutdown) = Shutdown::new();
        let serving = proxy.clone();
        tokio::spawn(kill.clone().run_until_cancelled_owned(async move {
            let limits = LoopbackLimits::default();
            server::run(listener, tls, serving, &timing, limits, shutdown).await;
        }));
        Self {
            addr,
            store,
            proxy,
            metrics,
            shutdown: trigger,
            _kill: kill.drop_guard(),
            _dir: dir,
        }
    }

    /// A TLS connection with the client certificate of the kubeconfig.
    pub(crate) async fn connect(&self, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
        tls(self.addr, self.client(alpn, true)).await.unwrap()
    }

    pub(crate) fn client(&self, alpn: &[&[u8]], with_certificate: bool) -> ClientConfig {
        client_config(
            &self.store,
            &self.store,
            alpn,
            with_certificate,
            &[&rustls::version::TLS13],
        )
    }

    pub(crate) async fn http1(&self) -> conn::http1::SendRequest<AnyBody> {
        let io = TokioIo::new(self.connect(&[]).await);
        let (sender, connection) = conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender
    }

    pub(crate) async fn http2(&self) -> conn::http2::SendRequest<AnyBody> {
        let io = TokioIo::new(self.connect(&[b"h2", b"http/1.1"]).await);
        let (sender, connection) = conn::http2::handshake(TokioExecutor::new(), io)
            .await
            .unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One GET on a new connection.
    pub(crate) async fn get(&self, path: &str) -> Response<Incoming> {
        let request = self.request("GET", path).body(empty()).unwrap();
        self.http1().await.send_request(request).await.unwrap()
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> http::request::Builder {
        Request::builder()
            .method(method)
            .uri(path)
            .header("host", self.addr.to_string())
    }

    /// For HTTP/2, which needs the whole URL.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.addr)
    }
}

pub(crate) async fn tls(
    addr: SocketAddr,
    config: ClientConfig,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(addr).await?;
    stream.set_nodelay(true)?;
    let name = ServerName::try_from("127.0.0.1").unwrap();
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
}

/// Trusts the authority of one store and shows the certificate of another.
pub(crate) fn client_config(
    trusts: &Store,
    shows: &Store,
    alpn: &[&[u8]],
    with_certificate: bool,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    client_config_by(provider, trusts, shows, alpn, with_certificate, versions)
}

/// The same with other cryptography.
pub(crate) fn client_config_by(
    provider: Arc<rustls::crypto::CryptoProvider>,
    trusts: &Store,
    shows: &Store,
    alpn: &[&[u8]],
    with_certificate: bool,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(trusts.path(loopback::CA)).unwrap())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let mut config = if with_certificate {
        let chain = vec![CertificateDer::from_pem_file(shows.path(loopback::CLIENT)).unwrap()];
        let key = PrivateKeyDer::from_pem_file(shows.path(loopback::CLIENT_KEY)).unwrap();
        builder.with_client_auth_cert(chain, key).unwrap()
    } else {
        builder.with_no_client_auth()
    };
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

pub(crate) fn empty() -> AnyBody {
    text("")
}

pub(crate) fn text(content: impl Into<Bytes>) -> AnyBody {
    Full::new(content.into())
        .map_err(|never| match never {})
        .boxed()
}

pub(crate) fn answer(content: impl Into<Bytes>) -> Answer {
    Response::new(text(content))
}

/// A body that is fed from outside; an `Err` cuts it.
pub(crate) fn fed() -> (mpsc::Sender<io::Result<Bytes>>, AnyBody) {
    let (feed, source) = mpsc::channel::<io::Result<Bytes>>(1);
    let stream = futures::stream::unfold(source, |mut source| async {
        let next = source.recv().await?;
        Some((next.map(Frame::data), source))
    });
    (
        feed,
        BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(stream))))),
    )
}

type FrameStream = std::pin::Pin<Box<dyn futures::Stream<Item = io::Result<Frame<Bytes>>> + Send>>;

/// `BoxBody` requires `Sync`, which a stream behind a lock is.
struct SyncStream(Mutex<FrameStream>);

impl futures::Stream for SyncStream {
    type Item = io::Result<Frame<Bytes>>;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        self.get_mut().0.get_mut().unwrap().as_mut().poll_next(cx)
    }
}

/// HTTP/2 that answers the first HEADERS by a GOAWAY without an error, which names no stream.
async fn end_in_peace(mut io: tokio::io::DuplexStream) -> io::Result<()> {
    const PREFACE: usize = 24;
    const HEADERS: u8 = 1;
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const SETTINGS_ACK: [u8; 9] = [0, 0, 0, 4, 1, 0, 0, 0, 0];
    const GOAWAY: [u8; 17] = [0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    io.read_exact(&mut [0; PREFACE]).await?;
    io.write_all(&SETTINGS).await?;
    io.write_all(&SETTINGS_ACK).await?;
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        io.read_exact(&mut vec![0; length as usize]).await?;
        if head[3] == HEADERS {
            io.write_all(&GOAWAY).await?;
            return io.shutdown().await;
        }
    }
}

pub(crate) async fn read(response: Response<Incoming>) -> (u16, String) {
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// Waits until it holds; fails the test when it does not for long.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 10 s: {what}");
}
