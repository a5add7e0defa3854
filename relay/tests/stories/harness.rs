//! A relay on a free port, people and clusters to connect to it, and what it counted.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prometheus::{Encoder, TextEncoder};
use tempfile::TempDir;
use throwline_authority::{Authority, Subject, Validity};
use throwline_certs::enrol::Asker;
use throwline_certs::{Identity, Kind, PendingIdentity, jws, sha256, tls};
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_relay::{Config, Error, Relay, Tls};
use throwline_tunnel::carrier::{
    BoxError, Carrier, Connection, DialConfig, DialError, IncomingStream, OpenError, Prover, dial,
};
use throwline_tunnel::mux;
use throwline_tunnel::proto::assertion::Claims;
use throwline_tunnel::proto::messages::{
    AgentStatus, Control, ControlKind, ControlMessage, LineKind, Open, Refusal, Role, StreamKind,
    StreamReply,
};
use throwline_tunnel::{message, proto::wire::CONTROL_CAP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use url::Url;

/// Long enough for a busy machine; a story that waits this long has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) authority: Authority,
    pub(crate) url: Url,
    pub(crate) address: SocketAddr,
    pub(crate) metrics: prometheus::Registry,
    pub(crate) admin: SocketAddr,
    pub(crate) trigger: ShutdownTrigger,
    relay: JoinHandle<Result<(), Error>>,
    tasks_before: usize,
    _dir: TempDir,
}

pub(crate) struct Setup {
    pub(crate) tls: Option<Tls>,
    pub(crate) lives: Validity,
    pub(crate) configure: Box<dyn FnOnce(&mut Config) + Send>,
    pub(crate) policy: Option<Arc<dyn throwline_relay::policy::Policy>>,
    pub(crate) registry: Option<Arc<dyn throwline_relay::registry::Registry>>,
    /// Of another relay of the set.
    pub(crate) authority: Option<Authority>,
    pub(crate) peers: Option<TcpListener>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            tls: None,
            lives: Validity::default(),
            configure: Box::new(|_| {}),
            policy: None,
            registry: None,
            authority: None,
            peers: None,
        }
    }
}

impl World {
    /// TLS by the relay's own certificate, all else by default.
    pub(crate) async fn new() -> Self {
        Self::with(Setup::default()).await
    }

    /// Behind a balancer that ends TLS: raw requests can be written by hand.
    pub(crate) async fn plaintext() -> Self {
        Self::with(Setup {
            tls: Some(Tls::Plaintext),
            ..Setup::default()
        })
        .await
    }

    pub(crate) async fn configured(configure: impl FnOnce(&mut Config) + Send + 'static) -> Self {
        Self::with(Setup {
            configure: Box::new(configure),
            ..Setup::default()
        })
        .await
    }

    pub(crate) async fn with(setup: Setup) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let admin = admin_listener.local_addr().unwrap();
        let tls = setup.tls.unwrap_or(Tls::Own);
        let scheme = if tls == Tls::Plaintext {
            "http"
        } else {
            "https"
        };
        let url: Url = format!("{scheme}://127.0.0.1:{}", address.port())
            .parse()
            .unwrap();
        let authority = match setup.authority {
            Some(authority) => authority,
            None => Authority::open_or_create(dir.path(), &url).await.unwrap(),
        };
        let authority = authority.with_validity(setup.lives);
        // The database's own tasks are there before and after.
        authority.clusters().await.unwrap();
        let tasks_before = tasks();
        let mut config = Config::new(url.clone(), tls);
        config.timing.drain_timeout = Duration::from_secs(1);
        (setup.configure)(&mut config);
        let metrics = prometheus::Registry::new();
        let mut relay = Relay::new(Arc::new(authority.clone()), config).metrics(metrics.clone());
        if let Some(policy) = setup.policy {
            relay = relay.policy(policy);
        }
        if let Some(registry) = setup.registry {
            relay = relay.registry(registry);
        }
        if let Some(listener) = setup.peers {
            let address = listener.local_addr().unwrap().to_string();
            relay = relay.peers(listener, address);
        }
        let (trigger, shutdown) = Shutdown::new();
        let relay = tokio::spawn(relay.run(listener, Some(admin_listener), shutdown));
        Self {
            authority,
            url,
            address,
            metrics,
            admin,
            trigger,
            relay,
            tasks_before,
            _dir: dir,
        }
    }

    pub(crate) async fn cluster(&self, name: &str) -> Identity {
        self.enrol(&Subject::Cluster(name.into())).await
    }

    pub(crate) async fn user(&self, name: &str) -> Identity {
        self.enrol(&Subject::User {
            name: name.into(),
            groups: vec!["people".into()],
        })
        .await
    }

    async fn enrol(&self, subject: &Subject) -> Identity {
        enrol(&self.authority, &self.url, subject).await
    }

    pub(crate) fn user_id(&self, name: &str) -> String {
        format!("spiffe://{}/user/{name}", self.authority.trust_domain())
    }

    pub(crate) fn dial_config(&self, identity: &Identity) -> DialConfig {
        let tls = (self.url.scheme() == "https")
            .then(|| tls::carrier_client(self.authority.roots(), tls::Trust::default()).unwrap());
        let role = match identity.id().kind() {
            Kind::Cluster => Role::Agent,
            Kind::User => Role::LocalProxy,
            Kind::Relay => Role::Relay,
        };
        let instance = format!("instance-{}", unique());
        DialConfig::new(
            self.url.clone(),
            tls,
            Arc::new(prover(identity)),
            role,
            instance,
        )
    }

    pub(crate) async fn dial(&self, identity: &Identity) -> Result<Connection, DialError> {
        dial(&self.dial_config(identity)).await
    }

    /// A user's carrier.
    pub(crate) async fn proxy(&self, identity: &Identity) -> Connection {
        self.dial(identity).await.unwrap()
    }

    /// A cluster's carrier with an agent behind it that echoes the bytes of its lines.
    pub(crate) async fn agent(&self, identity: &Identity) -> Agent {
        let before = self.metric(r#"throwline_relay_carriers{role="agent"}"#);
        let agent = Agent::serve(self.dial(identity).await.unwrap());
        // The route is there a moment after the welcome.
        self.until_metric(r#"throwline_relay_carriers{role="agent"}"#, |now| {
            now > before
        })
        .await;
        agent
    }

    /// The value of one series, as `/metrics` would show it; 0 if there is none yet.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.metrics.gather(), &mut text)
            .unwrap();
        let text = String::from_utf8(text).unwrap();
        text.lines()
            .filter_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
            .map(|value| value.parse().unwrap())
            .next()
            .unwrap_or(0.0)
    }

    pub(crate) async fn until_metric(&self, series: &str, holds: impl Fn(f64) -> bool) {
        eventually(series, || holds(self.metric(series))).await;
    }

    /// With all peers gone, nothing is counted any more.
    pub(crate) async fn at_rest(&self) {
        for series in [
            r#"throwline_relay_carriers{role="agent"}"#,
            r#"throwline_relay_carriers{role="local-proxy"}"#,
            "throwline_relay_lines",
            "throwline_relay_half_open",
        ] {
            self.until_metric(series, |value| value == 0.0).await;
        }
    }

    /// Ends the relay, which must leave no task behind. Peers must be dropped before.
    pub(crate) async fn end(self) {
        self.at_rest().await;
        self.trigger.trigger();
        tokio::time::timeout(PATIENCE, self.relay)
            .await
            .expect("the relay ends")
            .unwrap()
            .unwrap();
        let before = self.tasks_before;
        eventually("tasks at the baseline", || tasks() <= before).await;
    }

    /// Waits for the relay to end by itself.
    pub(crate) async fn ended(self) {
        tokio::time::timeout(PATIENCE, self.relay)
            .await
            .expect("the relay ends")
            .unwrap()
            .unwrap();
    }
}

async fn enrol(authority: &Authority, relay: &Url, subject: &Subject) -> Identity {
    let token = authority
        .create_token(subject, Duration::from_secs(60), relay)
        .await
        .unwrap();
    let pending = PendingIdentity::generate().unwrap();
    let asker = match subject {
        Subject::Cluster(name) => Asker::Cluster {
            uid: format!("uid-of-{name}"),
        },
        Subject::User { .. } => Asker::User,
    };
    let request = token.request(&asker, pending.csr_pem()).unwrap();
    let issued = authority.redeem(&request).await.unwrap();
    pending.complete(issued.chain).unwrap()
}

/// A user of another authority.
pub(crate) async fn enrolled(authority: &Authority, relay: &Url, name: &str) -> Identity {
    let subject = Subject::User {
        name: name.into(),
        groups: Vec::new(),
    };
    enrol(authority, relay, &subject).await
}

/// An agent that accepts every line, tells what was asked, and echoes.
pub(crate) struct Agent {
    pub(crate) carrier: Carrier,
    pub(crate) opened: mpsc::UnboundedReceiver<Open>,
    task: JoinHandle<()>,
}

impl Agent {
    pub(crate) fn serve(connection: Connection) -> Self {
        Self::serve_with(connection, |_| None)
    }

    /// `refuse` may refuse a line.
    pub(crate) fn serve_with(
        connection: Connection,
        refuse: impl Fn(&Open) -> Option<Refusal> + Send + 'static,
    ) -> Self {
        let Connection {
            carrier,
            mut incoming,
            ..
        } = connection;
        let (tell, opened) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            let mut lines = tokio::task::JoinSet::new();
            while let Some(stream) = incoming.next().await {
                let Some(StreamKind::Open(open)) = stream.header.kind.clone() else {
                    panic!("an agent is only opened lines to");
                };
                let refused = refuse(&open);
                let _ = tell.send(open);
                match refused {
                    Some(refused) => stream.refuse(refused).await,
                    None => {
                        lines.spawn(echo(stream));
                    }
                }
            }
        });
        Self {
            carrier,
            opened,
            task,
        }
    }

    pub(crate) async fn tell(&self, status: AgentStatus) -> mux::Stream {
        let (mut control, _) = self
            .carrier
            .open(StreamKind::Control(Control {}).into())
            .await
            .unwrap();
        let told = ControlMessage::from(ControlKind::AgentStatus(status));
        message::write(&mut control, &told, CONTROL_CAP)
            .await
            .unwrap();
        control
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.carrier
            .close(throwline_tunnel::proto::close::CloseCode::Normal, "done");
        self.task.abort();
    }
}

async fn echo(stream: IncomingStream) {
    let reply = StreamReply {
        agent_instance: "echo".into(),
        detached_ms: 120_000,
        ..StreamReply::accepted()
    };
    let Ok(stream) = stream.accept(reply).await else {
        return;
    };
    let (mut read, mut write) = tokio::io::split(stream);
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = write.shutdown().await;
    }
}

/// What a local proxy asks for.
pub(crate) fn open(cluster: &str) -> Open {
    Open {
        version: 1,
        cluster: cluster.into(),
        line_id: vec![7; 16],
        kind: LineKind::Api.into(),
        ..Open::default()
    }
}

/// Opens a line, and sees that an agent is at its other end.
pub(crate) async fn line(connection: &Connection, cluster: &str) -> mux::Stream {
    let (mut stream, reply) = connection.carrier.open(open(cluster).into()).await.unwrap();
    assert_eq!(reply.agent_instance, "echo");
    stream.write_all(b"ahoy").await.unwrap();
    stream.flush().await.unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"ahoy");
    stream
}

/// The refusal that an open must end in.
pub(crate) async fn refused(connection: &Connection, wanted: impl Into<StreamHeader>) -> Refusal {
    match connection.carrier.open(wanted.into()).await {
        Err(OpenError::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) use throwline_tunnel::proto::messages::StreamHeader;

pub(crate) fn prover(identity: &Identity) -> Prover {
    lying_prover(identity, |_| {})
}

/// Signs what `bend` makes of the claims.
pub(crate) fn lying_prover(
    identity: &Identity,
    bend: impl Fn(&mut Claims) + Send + Sync + 'static,
) -> Prover {
    let (asserts, signs) = (identity.clone(), identity.clone());
    Prover {
        assertion: Box::new(move |claims| {
            let mut claims = claims.clone();
            bend(&mut claims);
            jws::sign(&asserts, &claims).map_err(BoxError::from)
        }),
        sign: Box::new(move |transcript| signs.sign(transcript).map_err(BoxError::from)),
        sha256,
        id: identity.id().to_string(),
    }
}

pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn tasks() -> usize {
    tokio::runtime::Handle::current()
        .metrics()
        .num_alive_tasks()
}

pub(crate) fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
