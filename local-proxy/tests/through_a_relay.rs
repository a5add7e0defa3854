//! The whole local proxy against a relay and an agent built from the same parts: enrolled identity,
//! carrier, line, sealed session, and what happens when the carrier is lost.

#![expect(
    clippy::unwrap_used,
    reason = "a step that cannot be taken fails the test"
)]

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use throwline_certs::{
    Identity, PendingIdentity,
    authority::{Authority, Subject},
    tls,
};
use throwline_local_proxy::{Config, Error, Failure, Metrics, Outbound, Ready, Store, store};
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::{
    carrier::{self, AcceptConfig, Carrier, IncomingStream},
    line, message,
    proto::{
        SUBPROTOCOL,
        close::CloseCode,
        messages::{ClusterInfo, ClusterList, Refusal, RefusalCode, StreamKind, StreamReply},
        wire::CLUSTER_LIST_CAP,
    },
    session, ws,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinHandle,
};
use url::Url;

/// A relay with the agent of the cluster `prod` inside.
struct Relay {
    url: Url,
    authority: Authority,
    carriers: Arc<Mutex<Vec<Carrier>>>,
    serving: JoinHandle<()>,
    dir: tempfile::TempDir,
}

impl Relay {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let url: Url = format!("http://{addr}").parse().unwrap();
        let authority = Authority::open_or_create(&dir.path().join("relay"), &url)
            .await
            .unwrap();
        let agent = enrol(&authority, Subject::Cluster("prod".to_owned()), &url).await;
        let agent = tls::session_server(&agent, authority.validator()).unwrap();
        let carriers = Arc::default();
        let serving = tokio::spawn(serve(listener, agent, Arc::clone(&carriers)));
        Self {
            url,
            authority,
            carriers,
            serving,
            dir,
        }
    }

    /// The state directory of a user who has logged in.
    async fn user(&self) -> Store {
        let subject = Subject::User {
            name: "ann".to_owned(),
            groups: vec!["dev".to_owned()],
        };
        let identity = enrol(&self.authority, subject, &self.url).await;
        let store = Store::new(self.dir.path().join("ann"));
        store
            .save(&store::Credentials {
                identity,
                roots: self.authority.roots().clone(),
                relay: store::RelayFile {
                    url: self.url.clone(),
                    ca_file: None,
                },
            })
            .unwrap();
        store
    }

    fn close_carriers(&self) {
        for carrier in self.carriers.lock().unwrap().drain(..) {
            carrier.close(CloseCode::GoingAway, "restart");
        }
    }
}

async fn enrol(authority: &Authority, subject: Subject, url: &Url) -> Identity {
    let token = authority
        .create_token(&subject, Duration::from_secs(60), url)
        .await
        .unwrap();
    let pending = PendingIdentity::generate().unwrap();
    let issued = authority
        .redeem(&token.secret, &pending.csr_pem())
        .await
        .unwrap();
    pending.complete(issued.chain).unwrap()
}

async fn serve(
    listener: TcpListener,
    agent: Arc<rustls::ServerConfig>,
    carriers: Arc<Mutex<Vec<Carrier>>>,
) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (agent, carriers) = (agent.clone(), carriers.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let key = request.headers()["sec-websocket-key"].as_bytes().to_vec();
            let upgraded = hyper::upgrade::on(&mut request);
            tokio::spawn(carry(upgraded, agent.clone(), carriers.clone()));
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
    agent: Arc<rustls::ServerConfig>,
    carriers: Arc<Mutex<Vec<Carrier>>>,
) {
    let io = TokioIo::new(upgraded.await.unwrap());
    let (mut connection, _) = carrier::accept(io, AcceptConfig::new("relay"), |_, _| Ok(()))
        .await
        .unwrap();
    carriers.lock().unwrap().push(connection.carrier.clone());
    while let Some(stream) = connection.incoming.next().await {
        tokio::spawn(answer(stream, agent.clone()));
    }
}

async fn answer(stream: IncomingStream, agent: Arc<rustls::ServerConfig>) {
    match stream.header.kind.clone() {
        Some(StreamKind::ListClusters(_)) => {
            let list = ClusterList {
                clusters: ["prod", "away", "not/a name"]
                    .map(|name| ClusterInfo {
                        name: name.to_owned(),
                        ..ClusterInfo::default()
                    })
                    .into(),
            };
            let mut stream = stream.accept(StreamReply::accepted()).await.unwrap();
            message::write_long(&mut stream, &list, CLUSTER_LIST_CAP)
                .await
                .unwrap();
        }
        Some(StreamKind::Control(_)) => {
            let mut stream = stream.accept(StreamReply::accepted()).await.unwrap();
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        }
        Some(StreamKind::Open(open)) if open.cluster == "prod" => {
            let stream = stream.accept(StreamReply::accepted()).await.unwrap();
            // A warm spare may be cut while it comes up.
            let Ok(accepted) = line::accept(stream, Duration::ZERO).await else {
                return;
            };
            let line = accepted.into_new().unwrap();
            let Ok(io) = session::accept(line, agent).await else {
                return;
            };
            let h2 = io.get_ref().1.alpn_protocol() == Some(b"h2");
            let service = service_fn(|request: Request<Incoming>| async move {
                let said = format!("agent saw {}", request.uri().path());
                Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(said))))
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
        let mut config = Config::new(store.dir());
        config.port = Some(0);
        config.kubeconfig = Some(store.path("kubeconfig"));
        let metrics = config.metrics.clone();
        let (ready, is_ready) = oneshot::channel();
        let (shutdown, requested) = Shutdown::new();
        let running = tokio::spawn(throwline_local_proxy::run(config, ready, requested));
        Self {
            ready: is_ready.await.unwrap(),
            store: store.clone(),
            metrics,
            shutdown,
            running,
        }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let io = TokioIo::new(connect(&self.store, self.ready.addr).await);
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(path)
            .header("host", self.ready.addr.to_string())
            .body(Full::<Bytes>::default())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
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
    assert_eq!(clusters.len(), 3);
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
