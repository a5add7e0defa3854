//! Thousands of agents in one process: the product's own carriers, each with its identity, and no
//! cluster behind them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use futures::stream::{self, StreamExt, TryStreamExt};
use throwline_authority::{Authority, Subject};
use throwline_certs::enrol::Asker;
use throwline_certs::{Identity, PendingIdentity, Roots, tls};
use throwline_database::Database;
use throwline_ops::{Shutdown, ShutdownTrigger, network};
use throwline_tunnel::carrier::{Connection, DialConfig, DialError, IncomingStream, dial};
use throwline_tunnel::proto::messages::{AgentStatus, Role};
use throwline_uplink::{Carriers, Config, Environment, Metrics, Pool, UplinkHandler, prover};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use url::Url;

use crate::{Relay, eventually};

/// Enrolments at once: the database is not what is measured.
const ENROLLING: usize = 16;

/// Who the agents are to be, and whom they trust.
pub struct Enrolled {
    identities: Vec<Identity>,
    roots: Roots,
}

impl Enrolled {
    /// By the authority of `relay`, in its own tables or in this database's.
    pub async fn at(relay: &Relay, database: Option<&str>, count: usize) -> Result<Self> {
        let (state, public) = (&relay.state, &relay.public_url);
        Self::by(state, database, public, "simulated-", count).await
    }

    /// By the authority that keeps its state there, and whose relay is at `public`; their names
    /// begin with `prefix`.
    pub async fn by(
        state: &Path,
        database: Option<&str>,
        public: &str,
        prefix: &str,
        count: usize,
    ) -> Result<Self> {
        let database = database.map(Database::from_url).transpose()?;
        let url: Url = public.parse()?;
        let builder = Authority::builder(state).database(database);
        let authority = builder.open_or_create(&url).await?;
        let identities = stream::iter(0..count)
            .map(|number| {
                let (authority, url) = (&authority, &url);
                async move {
                    let subject = Subject::Cluster(format!("{prefix}{number}"));
                    let life = Duration::from_secs(3600);
                    let token = authority.create_token(&subject, life, url).await?;
                    let pending = PendingIdentity::generate()?;
                    let asker = Asker::Cluster {
                        uid: format!("uid-{prefix}{number}"),
                    };
                    let request = token.request(&asker, pending.csr_pem())?;
                    let issued = authority.redeem(&request).await?;
                    anyhow::Ok(pending.complete(issued.chain)?)
                }
            })
            .buffer_unordered(ENROLLING)
            .try_collect()
            .await?;
        let roots = authority.roots().clone();
        Ok(Self { identities, roots })
    }

    /// So many of them, apart from the others.
    pub fn split_off(&mut self, count: usize) -> Self {
        let rest = self.identities.len().saturating_sub(count);
        Self {
            identities: self.identities.split_off(rest),
            roots: self.roots.clone(),
        }
    }

    pub fn len(&self) -> usize {
        self.identities.len()
    }

    pub fn is_empty(&self) -> bool {
        self.identities.is_empty()
    }
}

/// Agents that hold one carrier each and take no lines.
///
/// They run on threads of their own that give way, as if on other machines: what is measured is
/// not to wait behind their signatures.
pub struct Simulated {
    all: Vec<Pool>,
    stop: ShutdownTrigger,
    failures: Arc<AtomicU64>,
    registry: prometheus::Registry,
    metrics: Metrics,
    shutdown: Shutdown,
    apart: Apart,
}

impl Simulated {
    /// None of them yet.
    pub fn new() -> Result<Self> {
        let registry = prometheus::Registry::new();
        let metrics = Metrics::new("agent")?;
        metrics.register(&registry)?;
        let (stop, shutdown) = Shutdown::new();
        Ok(Self {
            all: Vec::new(),
            stop,
            failures: Arc::default(),
            registry,
            metrics,
            shutdown,
            apart: Apart::new()?,
        })
    }

    /// All of them dial `public` at once.
    pub fn dial(&mut self, enrolled: Enrolled, public: &str) -> Result<()> {
        let _apart = self.apart.0.as_ref().map(Runtime::enter);
        let tls = tls::carrier_client(&enrolled.roots, tls::Trust::default())?;
        let url: Url = public.parse()?;
        for identity in enrolled.identities {
            let handler = Idle {
                url: url.clone(),
                tls: tls.clone(),
                identity,
                status: watch::Sender::default(),
                failures: self.failures.clone(),
            };
            let config = Config {
                count: 1,
                ..Config::default()
            };
            let environment = Environment {
                shutdown: self.shutdown.clone(),
                ready: None,
                network: network::changes(),
                metrics: self.metrics.clone(),
            };
            let (handler, carriers) = (Arc::new(handler), Carriers::new());
            self.all
                .push(Pool::start(handler, carriers, config, environment));
        }
        Ok(())
    }

    /// Waits until each has its carrier.
    pub async fn all_connected(&self, patience: Duration) -> Result<()> {
        eventually(patience, "all agents are connected", || async {
            let (now, wanted) = (self.connected(), self.all.len());
            ensure!(
                now == wanted as f64,
                "{now} of {wanted} are connected\n{}",
                self.dials_failed()
            );
            Ok(())
        })
        .await
    }

    /// How many have a carrier.
    pub fn connected(&self) -> f64 {
        self.metrics.carriers.get() as f64
    }

    /// Failed dials, by kind.
    fn dials_failed(&self) -> String {
        let text = prometheus::TextEncoder::new().encode_to_string(&self.registry.gather());
        let text = text.unwrap_or_default();
        let failures = text
            .lines()
            .filter(|line| line.starts_with("throwline_agent_connect_failures"));
        failures.collect::<Vec<_>>().join("\n")
    }

    /// Ends them all; how many dials had failed.
    pub async fn stop(self) -> u64 {
        self.stop.trigger();
        for pool in self.all {
            pool.ended().await.close("the agent stops").await;
        }
        self.failures.load(Ordering::Relaxed)
    }
}

/// A runtime that may be dropped within another.
struct Apart(Option<Runtime>);

impl Apart {
    fn new() -> Result<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        // On Linux each thread has its own; without the right to, they compete as they are.
        builder.on_thread_start(|| {
            let _ = rustix::process::nice(19);
        });
        Ok(Self(Some(builder.worker_threads(2).enable_all().build()?)))
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// An agent that has carriers and takes no lines.
struct Idle {
    url: Url,
    tls: Arc<rustls::ClientConfig>,
    identity: Identity,
    status: watch::Sender<AgentStatus>,
    failures: Arc<AtomicU64>,
}

impl UplinkHandler for Idle {
    type Error = DialError;

    async fn dial(&self, avoid: Vec<String>) -> Result<Connection, DialError> {
        let tls = Some(self.tls.clone());
        let prover = Arc::new(prover(&self.identity));
        let (url, role) = (self.url.clone(), Role::Agent);
        let mut config = DialConfig::new(url, tls, prover, role, "simulated");
        config.avoid = avoid;
        dial(&config).await
    }

    fn accept(&self, stream: IncomingStream, _retiring: &Shutdown) {
        drop(stream);
    }

    fn status(&self) -> Option<watch::Receiver<AgentStatus>> {
        Some(self.status.subscribe())
    }

    fn failed(&self, _error: &DialError) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}
