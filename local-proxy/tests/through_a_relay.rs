//! The whole local proxy against a relay and an agent built from the same parts: enrolled identity,
//! carrier, line, sealed session, and what happens when the carrier is lost.

#![expect(
    clippy::unwrap_used,
    reason = "a step that cannot be taken fails the test"
)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::{Request, Response, StatusCode, header};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use throwline_authority::{Authority, Subject, Target};
use throwline_certs::enrol::Asker;
use throwline_certs::{Identity, PendingIdentity, SignedRevocations, tls};
use throwline_local_proxy::kubeconfig::Files;
use throwline_local_proxy::{Config, Error, Failure, Metrics, Outbound, Ready, Store, store};
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::{self, AcceptConfig, Carrier, IncomingStream};
use throwline_tunnel::line::{self, LineBudgets};
use throwline_tunnel::proto::SUBPROTOCOL;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    ClusterInfo, ClusterList, ControlKind, ControlMessage, Drain, Refusal, RefusalCode,
    RevocationList, RevocationsVersion, StreamKind, StreamReply,
};
use throwline_tunnel::proto::wire::{CLUSTER_LIST_CAP, CONTROL_CAP, REVOCATIONS_CAP};
use throwline_tunnel::{message, session, ws};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use url::Url;

/// A relay with the agent of the cluster `prod` inside.
struct Relay {
    url: Url,
    authority: Authority,
    carriers: Arc<Mutex<Vec<Carrier>>>,
    manners: Arc<Manners>,
    serving: JoinHandle<()>,
    dir: tempfile::TempDir,
}

/// How it behaves.
struct Manners {
    agent: Mutex<Arc<rustls::ServerConfig>>,
    /// How long the agent lets a line be without a stream.
    detached: Duration,
    /// The version that it tells of, and the list that it gives.
    told: watch::Sender<u64>,
    list: Mutex<Option<SignedRevocations>>,
    given: AtomicUsize,
    /// The names that it lists.
    names: Mutex<Vec<String>>,
    /// It asks each carrier to move at once.
    drains: AtomicBool,
}

impl Relay {
    async fn start() -> Self {
        Self::with(Duration::ZERO).await
    }

    async fn with(detached: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let url: Url = format!("http://{addr}").parse().unwrap();
        let authority = Authority::open_or_create(&dir.path().join("relay"), &url)
            .await
            .unwrap();
        let agent = enrolled_agent(&authority, &url).await;
        let manners = Arc::new(Manners {
            agent: Mutex::new(agent),
            detached,
            told: watch::Sender::new(0),
            list: Mutex::default(),
            given: AtomicUsize::new(0),
            names: Mutex::new(["prod", "away", "not/a name"].map(str::to_owned).into()),
            drains: AtomicBool::new(false),
        });
        let carriers = Arc::default();
        let serving = tokio::spawn(serve(listener, manners.clone(), Arc::clone(&carriers)));
        Self {
            url,
            authority,
            carriers,
            manners,
            serving,
            dir,
        }
    }

    /// The state directory of a user who has logged in.
    async fn user(&self) -> Store {
        self.user_in("ann").await
    }

    /// The same user, who has logged in once more, with another state directory.
    async fn user_in(&self, dir: &str) -> Store {
        let subject = Subject::User {
            name: "ann".to_owned(),
            groups: vec!["dev".to_owned()],
        };
        let identity = enrol(&self.authority, subject, &self.url).await;
        let store = Store::new(self.dir.path().join(dir));
        store
            .save(&store::Credentials {
                identity,
                roots: self.authority.roots().clone(),
                relay: store::RelayFile {
                    url: self.url.clone(),
                    ca_file: None,
                    system_ca: false,
                },
            })
            .unwrap();
        store
    }

    /// Tells of a list of this version, and gives this one.
    fn tell(&self, version: u64, list: SignedRevocations) {
        *self.manners.list.lock().unwrap() = Some(list);
        self.manners.told.send_replace(version);
    }

    fn close_carriers(&self) {
        for carrier in self.carriers.lock().unwrap().drain(..) {
            carrier.close(CloseCode::GoingAway, "restart");
        }
    }
}

/// What the agent of `prod` accepts sessions with.
async fn enrolled_agent(authority: &Authority, url: &Url) -> Arc<rustls::ServerConfig> {
    let identity = enrol(authority, Subject::Cluster("prod".to_owned()), url).await;
    tls::session_server(&identity, authority.validator()).unwrap()
}

async fn enrol(authority: &Authority, subject: Subject, url: &Url) -> Identity {
    let token = authority
        .create_token(&subject, Duration::from_secs(60), url)
        .await
        .unwrap();
    let pending = PendingIdentity::generate().unwrap();
    let asker = match &subject {
        Subject::Cluster(name) => Asker::Cluster {
            uid: format!("uid-of-{name}"),
        },
        Subject::User { .. } => Asker::User,
    };
    let request = token.request(&asker, pending.csr_pem()).unwrap();
    let issued = authority.redeem(&request).await.unwrap();
    pending.complete(issued.chain).unwrap()
}

async fn serve(listener: TcpListener, manners: Arc<Manners>, carriers: Arc<Mutex<Vec<Carrier>>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (manners, carriers) = (manners.clone(), carriers.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let key = request.headers()["sec-websocket-key"].as_bytes().to_vec();
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(carry(upgraded, manners.clone(), carriers.clone()));
            let response = Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header(header::CONNECTION, "Upgrade")
                .header(header::UPGRADE, "websocket")
                .header("sec-websocket-accept", ws::accept_key(&key))
                .header("sec-websocket-protocol", SUBPROTOCOL)
                .body(Full::<Bytes>::default());
            async move { response }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::spawn(connection);
    }
}

async fn carry(
    upgraded: hyper::upgrade::OnUpgrade,
    manners: Arc<Manners>,
    carriers: Arc<Mutex<Vec<Carrier>>>,
) {
    let io = TokioIo::new(upgraded.await.unwrap());
    let (mut connection, _) = carrier::accept(io, AcceptConfig::new("relay"), |_, _| Ok(()))
        .await
        .unwrap();
    carriers.lock().unwrap().push(connection.carrier.clone());
    while let Some(stream) = connection.incoming.next().await {
        tokio::spawn(answer(stream, manners.clone()));
    }
}

async fn answer(stream: IncomingStream, manners: Arc<Manners>) {
    match stream.header.kind.clone() {
        Some(StreamKind::ListClusters(_)) => {
            let names = manners.names.lock().unwrap().clone();
            let list = ClusterList {
                clusters: names
                    .into_iter()
                    .map(|name| ClusterInfo {
                        name,
                        ..ClusterInfo::default()
                    })
                    .collect(),
                total: 0,
            };
            let mut stream = stream.accept(StreamReply::accepted()).await.unwrap();
            message::write_long(&mut stream, &list, CLUSTER_LIST_CAP)
                .await
                .unwrap();
        }
        Some(StreamKind::Control(_)) => {
            let mut stream = stream.accept(StreamReply::accepted()).await.unwrap();
            if manners.drains.load(Ordering::SeqCst) {
                let at_once = ControlMessage::from(ControlKind::Drain(Drain::default()));
                let _ = message::write(&mut stream, &at_once, CONTROL_CAP).await;
            }
            let (mut read, mut write) = tokio::io::split(stream);
            let hearing = tokio::spawn(async move {
                let _ = tokio::io::copy(&mut read, &mut tokio::io::sink()).await;
            });
            let mut told = manners.told.subscribe();
            while !hearing.is_finished() {
                let version = *told.borrow_and_update();
                let news = ControlKind::Revocations(RevocationsVersion { version });
                let news = ControlMessage::from(news);
                if version > 0
                    && message::write(&mut write, &news, CONTROL_CAP)
                        .await
                        .is_err()
                {
                    return;
                }
                told.changed().await.unwrap();
            }
        }
        Some(StreamKind::FetchRevocations(_)) => {
            manners.given.fetch_add(1, Ordering::SeqCst);
            let list = manners.list.lock().unwrap().clone().unwrap();
            let list = RevocationList {
                list: list.list,
                signature: list.signature,
            };
            let mut stream = stream.accept(StreamReply::accepted()).await.unwrap();
            message::write_long(&mut stream, &list, REVOCATIONS_CAP)
                .await
                .unwrap();
        }
        Some(StreamKind::Open(open)) if open.cluster == "prod" => {
            let stream = stream.accept(StreamReply::accepted()).await.unwrap();
            // A warm spare may be cut during its handshake.
            let Ok(accepted) = line::accept(stream, manners.detached, LineBudgets::default()).await
            else {
                return;
            };
            let line = accepted.into_new().unwrap();
            let agent = manners.agent.lock().unwrap().clone();
            let Ok(io) = session::accept(line, agent).await else {
                return;
            };
            let h2 = io.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|request: Request<Incoming>| async move {
                let said = Bytes::from(format!("agent saw {}", request.uri().path()));
                let begins = stream::once(async { Ok::<_, Infallible>(Frame::data(said)) });
                let body = match request.uri().path() {
                    "/endless" => BodyExt::boxed(StreamBody::new(begins.chain(stream::pending()))),
                    _ => BodyExt::boxed(StreamBody::new(begins)),
                };
                Ok::<_, Infallible>(Response::new(body))
            });
            let io = TokioIo::new(io);
            if h2 {
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(io, service).await;
            } else {
                let builder = hyper::server::conn::http1::Builder::new();
                let _ = builder.serve_connection(io, service).await;
            }
        }
        _ => {
            let refusal = Refusal::new(RefusalCode::Offline, "").since(1_000);
            stream.refuse(refusal).await;
        }
    }
}

/// A running local proxy.
struct Proxy {
    ready: Ready,
    store: Store,
    metrics: Metrics,
    shutdown: ShutdownTrigger,
    running: JoinHandle<Result<(), Error>>,
}

impl Proxy {
    async fn start(store: &Store) -> Self {
        Self::start_with(Self::config(store)).await
    }

    fn config(store: &Store) -> Config {
        let mut config = Config::new(store.dir());
        config.port = Some(0);
        config.kubeconfig = Some(Files::one(store.path("kubeconfig")));
        config
    }

    async fn start_with(config: Config) -> Self {
        let store = Store::new(&config.state_dir);
        let metrics = config.metrics.clone();
        let (ready, is_ready) = oneshot::channel();
        let (shutdown, requested) = Shutdown::new();
        let running = tokio::spawn(throwline_local_proxy::run(config, ready, requested));
        Self {
            ready: is_ready.await.unwrap(),
            store,
            metrics,
            shutdown,
            running,
        }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let response = self.open(path).await;
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn open(&self, path: &str) -> Response<Incoming> {
        let io = TokioIo::new(connect(&self.store, self.ready.addr).await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(path)
            .header("host", self.ready.addr.to_string())
            .body(Full::<Bytes>::default())
            .unwrap();
        sender.send_request(request).await.unwrap()
    }

    async fn is_told_of_the_revocation(&self) {
        let (status, said) = self.get("/clusters/prod/api/v1/pods").await;
        assert_eq!(status, 403, "{said}");
        let why = "the certificate of the agent of cluster prod was revoked";
        assert!(said.contains(why), "{said}");
    }

    async fn end(self) {
        self.shutdown.trigger();
        self.running.await.unwrap().unwrap();
        assert_eq!(self.metrics.tasks.get(), 0);
    }
}

async fn connect(store: &Store, addr: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut roots = rustls::RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(store.path("loopback-ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let chain = vec![CertificateDer::from_pem_file(store.path("loopback-client.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(store.path("loopback-client-key.pem")).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .unwrap();
    let stream = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, stream).await.unwrap()
}

#[tokio::test]
async fn a_request_reaches_the_agent_and_a_new_carrier_follows_a_lost_one() {
    let relay = Relay::start().await;
    let proxy = Proxy::start(&relay.user().await).await;
    assert_eq!(
        proxy.ready.clusters,
        ["away", "prod"],
        "names of a relay are checked"
    );
    assert_eq!(proxy.ready.contexts, ["throwline-away", "throwline-prod"]);
    let kubeconfig = std::fs::read_to_string(proxy.store.path("kubeconfig")).unwrap();
    assert!(kubeconfig.contains("/clusters/prod"), "{kubeconfig}");

    let seen = (200, "agent saw /api/v1/pods".to_owned());
    assert_eq!(proxy.get("/clusters/prod/api/v1/pods").await, seen);
    let (status, body) = proxy.get("/clusters/away/api/v1/pods").await;
    assert_eq!(status, 503);
    assert!(
        body.contains("cluster away is offline since 1970-01-01T00:00:01Z"),
        "{body}"
    );
    assert_eq!(proxy.metrics.carriers.get(), 1, "one for all clusters");

    relay.close_carriers();
    assert_eq!(proxy.get("/clusters/prod/api/v1/pods").await, seen);
    assert_eq!(proxy.metrics.carriers.get(), 2);

    proxy.shutdown.trigger();
    proxy.running.await.unwrap().unwrap();
    assert_eq!(proxy.metrics.tasks.get(), 0);
    assert_eq!(proxy.metrics.api_sessions.get(), 0);
    assert_eq!(proxy.metrics.upgrade_sessions.get(), 0);
    assert_eq!(proxy.metrics.requests_in_flight.get(), 0);
}

#[tokio::test]
async fn clusters_are_listed_on_a_carrier_of_their_own() {
    let relay = Relay::start().await;
    let store = relay.user().await;
    let clusters = throwline_local_proxy::clusters(&store, &Outbound::default())
        .await
        .unwrap();
    assert_eq!(clusters.len(), 2, "names of a relay are checked");
    relay.serving.abort();
    let _ = relay.serving.await;
    let error = throwline_local_proxy::clusters(&store, &Outbound::default())
        .await
        .unwrap_err();
    assert!(
        matches!(error, Error::Relay(Failure::RelayUnreachable { .. })),
        "{error}"
    );
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..4000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not within 20 s: {what}");
}

#[tokio::test]
async fn a_cluster_that_comes_later_gets_its_context_without_a_restart() {
    let relay = Relay::start().await;
    let mut config = Proxy::config(&relay.user().await);
    config.timing.list = Duration::from_millis(20);
    let proxy = Proxy::start_with(config).await;
    let text = || std::fs::read_to_string(proxy.store.path("kubeconfig")).unwrap();
    let before = text();
    assert!(!before.contains("late"), "{before}");
    relay.manners.names.lock().unwrap().push("late".to_owned());
    eventually("its context", || text().contains("name: throwline-late")).await;
    let (status, _) = proxy.get("/clusters/late/api/v1/pods").await;
    assert_eq!(status, 503, "it is served: offline, not unknown");
    // A cluster that disappears keeps its context.
    let after = text();
    relay.manners.names.lock().unwrap().clear();
    relay.manners.names.lock().unwrap().push("later".to_owned());
    eventually("another context", || {
        text().contains("name: throwline-later")
    })
    .await;
    assert!(text().contains("name: throwline-late\n"), "{after}");
}

#[tokio::test]
async fn a_second_proxy_of_one_identity_is_told_of_the_first() {
    let relay = Relay::start().await;
    let first = Proxy::start(&relay.user().await).await;
    let config = Proxy::config(&first.store);
    let before = std::fs::read_to_string(first.store.path("kubeconfig")).unwrap();
    let (ready, _is_ready) = oneshot::channel();
    let (_shutdown, requested) = Shutdown::new();
    let error = throwline_local_proxy::run(config.clone(), ready, requested).await;
    let error = error.unwrap_err();
    assert!(matches!(error, Error::AlreadyRuns { .. }), "{error}");
    assert!(
        error.to_string().contains(&first.ready.addr.to_string()),
        "{error}"
    );
    let after = std::fs::read_to_string(first.store.path("kubeconfig")).unwrap();
    assert_eq!(before, after);
    first.shutdown.trigger();
    first.running.await.unwrap().unwrap();
    Proxy::start_with(config).await;
}

#[tokio::test]
async fn entries_that_another_proxy_serves_are_left_to_it_until_it_ends() {
    let relay = Relay::start().await;
    let shared = relay.dir.path().join("kubeconfig");
    let text = || std::fs::read_to_string(&shared).unwrap();
    let config = |store: &Store| {
        let mut config = Proxy::config(store);
        config.kubeconfig = Some(Files::one(&shared));
        config.timing.list = Duration::from_millis(20);
        config
    };
    let (one, two) = (relay.user_in("one").await, relay.user_in("two").await);
    let first = Proxy::start_with(config(&one)).await;
    let before = text();
    assert!(first.ready.left.is_empty());

    let second = Proxy::start_with(config(&two)).await;
    assert_eq!(text(), before);
    assert_eq!(second.ready.contexts, first.ready.contexts);
    assert_eq!(second.ready.changes, []);
    let said: Vec<_> = second.ready.left.iter().map(ToString::to_string).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    for what in [
        "throwline-prod",
        &first.ready.addr.to_string(),
        &one.dir().display().to_string(),
    ] {
        assert!(said.iter().any(|said| said.contains(what)), "{said:?}");
    }

    // It ends: the one that is there serves them.
    first.shutdown.trigger();
    first.running.await.unwrap().unwrap();
    let server = format!("https://{}/clusters/prod", second.ready.addr);
    eventually("they are taken over", || text().contains(&server)).await;
    assert!(!text().contains(one.dir().to_str().unwrap()), "{}", text());

    // Contexts of a stopped proxy are taken over at a start, with a message.
    second.shutdown.trigger();
    second.running.await.unwrap().unwrap();
    let third = Proxy::start_with(config(&one)).await;
    assert!(third.ready.left.is_empty());
    let said: Vec<_> = third
        .ready
        .changes
        .iter()
        .map(ToString::to_string)
        .collect();
    let takes = said
        .iter()
        .filter(|said| said.starts_with("took over") && said.contains(two.dir().to_str().unwrap()));
    assert_eq!(takes.count(), 2, "{said:?}");
    let (status, _) = third.get("/clusters/prod/api/v1/pods").await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn a_list_without_end_is_refused_and_a_long_one_is_no_long_work() {
    let relay = Relay::start().await;
    let store = relay.user().await;
    let named = |count: usize| (0..count).map(|n| format!("c{n}")).collect::<Vec<_>>();
    *relay.manners.names.lock().unwrap() = named(100_000);
    let (ready, _is_ready) = oneshot::channel();
    let (_shutdown, requested) = Shutdown::new();
    let error = throwline_local_proxy::run(Proxy::config(&store), ready, requested).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("more than 10000"), "{error}");
    assert!(!store.path("kubeconfig").exists());

    *relay.manners.names.lock().unwrap() = named(10_000);
    let proxy = Proxy::start(&store).await;
    assert_eq!(proxy.ready.contexts.len(), 10_000);
}

#[tokio::test]
async fn a_relay_that_always_asks_to_move_is_not_dialled_without_end() {
    let relay = Relay::start().await;
    relay.manners.drains.store(true, Ordering::SeqCst);
    let proxy = Proxy::start(&relay.user().await).await;
    eventually("moves", || proxy.metrics.carriers.get() >= 5).await;
    // Without a limit there are hundreds in this time. One more may come after 5 s.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(
        proxy.metrics.carriers.get() <= 7,
        "{}",
        proxy.metrics.carriers.get()
    );
    let (status, _) = proxy.get("/clusters/prod/api").await;
    assert_eq!(status, 200, "it works meanwhile");
}

#[tokio::test]
async fn a_start_that_waits_for_a_silent_relay_or_a_lock_can_be_stopped() {
    let relay = Relay::start().await;
    let store = relay.user().await;
    // It accepts connections and sends nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut credentials = store.load().unwrap();
    let real = credentials.relay.url.clone();
    credentials.relay.url = format!("http://{}", silent.local_addr().unwrap())
        .parse()
        .unwrap();
    store.save(&credentials).unwrap();
    let mut config = Proxy::config(&store);
    config.timing.wait_for_relay = Duration::from_secs(3600);
    let start = |config: Config| {
        let (ready, is_ready) = oneshot::channel();
        let (shutdown, requested) = Shutdown::new();
        let running = tokio::spawn(throwline_local_proxy::run(config, ready, requested));
        (shutdown, running, is_ready)
    };
    let (shutdown, running, _is_ready) = start(config.clone());
    let (_held, _) = silent.accept().await.unwrap();
    shutdown.trigger();
    let ended = tokio::time::timeout(Duration::from_secs(20), running).await;
    ended.expect("it stops").unwrap().unwrap();

    credentials.relay.url = real;
    store.save(&credentials).unwrap();
    std::fs::write(store.path("kubeconfig.lock"), "").unwrap();
    let (shutdown, running, _is_ready) = start(config);
    eventually("the list", || store.path("proxy.json").exists()).await;
    shutdown.trigger();
    let ended = tokio::time::timeout(Duration::from_secs(20), running).await;
    ended.expect("it stops").unwrap().unwrap();
    assert!(!store.path("kubeconfig").exists());
}

/// The relay is the revoked agent's accomplice: it leads users there, and tells of no newer list, of a
/// newer one that it has not, or of none.
#[tokio::test]
async fn an_agent_that_was_revoked_is_refused_whatever_the_relay_says() {
    for detached in [Duration::ZERO, Duration::from_secs(60)] {
        let relay = Relay::with(detached).await;
        let user = relay.user().await;
        let proxy = Proxy::start(&user).await;
        let seen = (200, "agent saw /api/v1/pods".to_owned());
        assert_eq!(proxy.get("/clusters/prod/api/v1/pods").await, seen);
        let endless = proxy.open("/clusters/prod/endless").await;
        assert_eq!(endless.status(), 200);

        let authority = &relay.authority;
        let before = authority.signed_revocations().unwrap();
        let target = Target::Cluster("prod".to_owned());
        authority.revoke(&target).await.unwrap();
        let newest = authority.refresh_revocations().await.unwrap().unwrap();
        let version = authority.validator().revocations().version();
        relay.tell(version, newest);
        // What runs ends, and nothing begins.
        let ended = tokio::time::timeout(Duration::from_secs(20), endless.collect());
        assert!(ended.await.expect("it ends").is_err(), "a clean end");
        proxy.is_told_of_the_revocation().await;

        let given = relay.manners.given.load(Ordering::SeqCst);
        relay.tell(u64::MAX, before);
        eventually("the older list was fetched", || {
            relay.manners.given.load(Ordering::SeqCst) > given
        })
        .await;
        relay.close_carriers();
        proxy.is_told_of_the_revocation().await;
        proxy.end().await;

        // Another day, and it tells of none.
        relay.manners.told.send_replace(0);
        let proxy = Proxy::start(&user).await;
        proxy.is_told_of_the_revocation().await;
        let anew = enrolled_agent(authority, &relay.url).await;
        *relay.manners.agent.lock().unwrap() = anew;
        assert_eq!(proxy.get("/clusters/prod/api/v1/pods").await, seen);
        proxy.end().await;
    }
}
