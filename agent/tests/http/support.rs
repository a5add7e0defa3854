//! An API server to talk to, and users to talk.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use throwline_agent::audit::{Audit, Limits as AuditLimits, Sink, Subject};
use throwline_agent::live::LiveSession;
use throwline_agent::quotas::Quotas;
use throwline_agent::request::Lifetime;
use throwline_agent::session::{self, Protocol, SessionServer, Setup};
use throwline_agent::upstream::Upstream;
use throwline_agent::{ClusterAccess, Gateway, Limits, Metrics};
use throwline_certs::PeerIdentity;
use throwline_ops::{Drain, Shutdown, ShutdownTrigger};
use throwline_policy::PolicySet;
use throwline_policy::rules::User;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;
pub(crate) type Tls = TlsStream<TcpStream>;

/// What an API server saw of a request.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
    pub(crate) trailers: bool,
}

impl Seen {
    pub(crate) fn all(&self, name: &str) -> Vec<String> {
        self.headers
            .get_all(name)
            .iter()
            .map(|value| value.to_str().unwrap().to_owned())
            .collect()
    }
}

pub(crate) fn full(text: impl Into<Bytes>) -> Body {
    Full::new(text.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

/// A body that the test feeds; dropping the sender without an error is a clean end.
pub(crate) fn fed() -> (mpsc::Sender<Result<Bytes, std::io::Error>>, Body) {
    let (feed, mut fed) = mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let frames = futures::stream::poll_fn(move |cx| {
        fed.poll_recv(cx).map(|it| it.map(|it| it.map(Frame::data)))
    });
    (feed, StreamBody::new(frames).boxed_unsync())
}

/// A TLS listener with a certificate for 127.0.0.1, and the kubeconfig that leads to it.
pub(crate) struct Tcp {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: std::net::SocketAddr,
}

impl Tcp {
    pub(crate) async fn bind(alpn: &[&[u8]]) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])
            .unwrap()
            .self_signed(&key)
            .unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), certificate.pem()).unwrap();
        let mut config =
            rustls::ServerConfig::builder_with_provider(throwline_certs::tls::provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(
                    vec![certificate.der().clone()],
                    key.serialize_der().try_into().unwrap(),
                )
                .unwrap();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let kubeconfig = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: 'https://{address}', certificate-authority: ca.pem}}}}]\n\
             users: [{{name: u, user: {{token: agents-own}}}}]\n"
        );
        std::fs::write(dir.path().join("kubeconfig"), kubeconfig).unwrap();
        Self {
            listener,
            acceptor: TlsAcceptor::from(Arc::new(config)),
            dir,
            address,
        }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("kubeconfig")
    }

    pub(crate) async fn accept(&self) -> Tls {
        let (tcp, _) = self.listener.accept().await.unwrap();
        self.acceptor.accept(tcp).await.unwrap()
    }
}

/// An API server on hyper: HTTP/2 with 100 streams, HTTP/1.1 if that is asked for.
pub(crate) struct ApiServer {
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    pub(crate) connections: Arc<Mutex<Vec<tokio::task::AbortHandle>>>,
    pub(crate) kubeconfig: PathBuf,
    pub(crate) dir: PathBuf,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
        for connection in self.connections.lock().unwrap().drain(..) {
            connection.abort();
        }
    }
}

impl ApiServer {
    /// Answers by `answer`; the body has been read by then.
    pub(crate) async fn start<F>(alpn: &[&[u8]], answer: F) -> Self
    where
        F: Fn(Seen) -> BoxFuture<'static, Response<Body>> + Send + Sync + 'static,
    {
        let tcp = Tcp::bind(alpn).await;
        let (seen, connections) = (
            Arc::<Mutex<Vec<Seen>>>::default(),
            Arc::<Mutex<Vec<_>>>::default(),
        );
        let (kubeconfig, dir) = (tcp.kubeconfig(), tcp.dir.path().to_owned());
        let (answer, log, open) = (Arc::new(answer), seen.clone(), connections.clone());
        let task = tokio::spawn(async move {
            loop {
                let tls = tcp.accept().await;
                let (answer, log) = (answer.clone(), log.clone());
                let service = hyper::service::service_fn(move |request: Request<Incoming>| {
                    let (answer, log) = (answer.clone(), log.clone());
                    async move {
                        let (head, body) = request.into_parts();
                        let body = body.collect().await?;
                        let seen = Seen {
                            method: head.method,
                            path: head.uri.path_and_query().unwrap().to_string(),
                            headers: head.headers,
                            trailers: body.trailers().is_some(),
                            body: body.to_bytes(),
                        };
                        log.lock().unwrap().push(seen.clone());
                        Ok::<_, hyper::Error>(answer(seen).await)
                    }
                });
                let http2 = tls.get_ref().1.alpn_protocol() == Some(b"h2");
                let serving = tokio::spawn(async move {
                    if http2 {
                        let mut builder =
                            hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                        let _ = builder
                            .max_concurrent_streams(100)
                            .serve_connection(TokioIo::new(tls), service)
                            .await;
                    } else {
                        let _ = hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(tls), service)
                            .await;
                    }
                });
                open.lock().unwrap().push(serving.abort_handle());
            }
        });
        Self {
            seen,
            connections,
            kubeconfig,
            dir,
            task,
        }
    }

    /// On HTTP/2, always with the same answer.
    pub(crate) async fn saying(
        status: u16,
        headers: &'static [(&str, &str)],
        body: &'static str,
    ) -> Self {
        Self::start(&[b"h2", b"http/1.1"], move |_| {
            Box::pin(async move {
                let mut response = Response::builder().status(status);
                for (name, value) in headers {
                    response = response.header(*name, *value);
                }
                response.body(full(body)).unwrap()
            })
        })
        .await
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

/// The agent between.
pub(crate) struct Agent {
    gateway: Arc<Gateway>,
    server: SessionServer,
    quotas: Quotas,
    metrics: Metrics,
    limits: session::Limits,
    setup: Setup,
    _trigger: ShutdownTrigger,
}

impl Agent {
    pub(crate) async fn before(kubeconfig: PathBuf) -> Self {
        Self::with(kubeconfig, Audit::Off, Limits::default()).await
    }

    pub(crate) async fn with(kubeconfig: PathBuf, audit: Audit, limits: Limits) -> Self {
        let metrics = Metrics::register(&prometheus::Registry::new()).unwrap();
        let source = ClusterAccess::Kubeconfig(kubeconfig);
        let upstream = Upstream::load(source, limits.upstream, metrics.clone())
            .await
            .unwrap();
        let sink = Sink::open(&audit, AuditLimits::default(), metrics.clone()).unwrap();
        let subject = Subject {
            cluster: "prod-eu".into(),
            user: User {
                name: "jane".into(),
                groups: vec!["dev".into(), "ops".into()],
                ..User::default()
            },
            source: "192.0.2.1".into(),
        };
        let (trigger, shutdown) = Shutdown::new();
        let life = Lifetime {
            live: LiveSession::alone(jane(SystemTime::now() + Duration::from_secs(3600))),
            guard: Arc::new(Drain::new().guard()),
            detached: Duration::ZERO,
            phases: None,
        };
        let setup = Setup {
            protocol: Protocol::Http2,
            subject: Arc::new(subject),
            life,
            shutdown,
            round_trip: Duration::ZERO,
            credentials: None,
        };
        let quotas = Quotas::new(limits.quotas, metrics.clone());
        let gateway = Gateway::new(
            upstream,
            sink,
            quotas.clone(),
            metrics.clone(),
            limits.request,
        );
        let gateway = Arc::new(gateway);
        let (served, limits) = (gateway.clone(), limits.session);
        let server = SessionServer::new(served, quotas.clone(), metrics.clone(), limits);
        Self {
            gateway,
            server,
            quotas,
            metrics,
            limits,
            setup,
            _trigger: trigger,
        }
    }

    pub(crate) fn expiring(mut self, at: SystemTime) -> Self {
        self.setup.life.live = LiveSession::alone(jane(at));
        self
    }

    /// The same agent with these rules.
    pub(crate) fn under(mut self, policy: PolicySet) -> Self {
        drop(self.server);
        let gateway = Arc::into_inner(self.gateway).expect("no session yet");
        self.gateway = Arc::new(gateway.with_policy(policy));
        self.server = SessionServer::new(
            self.gateway.clone(),
            self.quotas.clone(),
            self.metrics.clone(),
            self.limits,
        );
        self
    }

    /// The same agent, as another user sees it.
    pub(crate) fn of(&self, name: &str) -> Self {
        let mut subject = Subject::clone(&self.setup.subject);
        subject.user.name = name.to_owned();
        let (trigger, shutdown) = Shutdown::new();
        Self {
            gateway: self.gateway.clone(),
            server: self.server.clone(),
            quotas: self.quotas.clone(),
            metrics: self.metrics.clone(),
            limits: self.limits,
            setup: Setup {
                subject: Arc::new(subject),
                shutdown,
                ..self.setup.clone()
            },
            _trigger: trigger,
        }
    }

    pub(crate) fn session(&self, protocol: Protocol) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let setup = Setup {
            protocol,
            ..self.setup.clone()
        };
        tokio::spawn(self.server.clone().serve(far, setup));
        near
    }

    /// An API session.
    pub(crate) async fn http2(&self) -> SendRequest<Body> {
        let io = TokioIo::new(self.session(Protocol::Http2));
        let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .handshake(io)
            .await
            .unwrap();
        tokio::spawn(connection);
        sender
    }

    /// One exchange in bytes on an upgrade session: writes, then reads to the end.
    pub(crate) async fn raw(&self, request: &[u8]) -> String {
        let mut session = self.session(Protocol::Http1);
        session.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        within(session.read_to_end(&mut answer)).await.unwrap();
        String::from_utf8_lossy(&answer).into_owned()
    }
}

pub(crate) fn get(path: &str) -> Request<Body> {
    Request::get(format!("https://agent{path}"))
        .body(full(""))
        .unwrap()
}

pub(crate) async fn text(response: Response<Incoming>) -> String {
    let body = within(response.into_body().collect())
        .await
        .unwrap()
        .to_bytes();
    String::from_utf8_lossy(&body).into_owned()
}

/// Nothing in these tests may hang.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future)
        .await
        .expect("it must not hang")
}

pub(crate) async fn eventually(mut holds: impl FnMut() -> bool) {
    within(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

fn jane(not_after: SystemTime) -> PeerIdentity {
    PeerIdentity {
        id: "spiffe://d/user/jane".parse().unwrap(),
        groups: vec!["dev".into(), "ops".into()],
        serial: "01".into(),
        not_before: SystemTime::UNIX_EPOCH,
        not_after,
        fingerprint: [0; 32],
        public_key: Vec::new(),
    }
}
