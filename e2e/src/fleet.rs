//! Three relays on one PostgreSQL behind a real balancer, clusters and people that come through
//! them, and a load that counts what it asked and what failed.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use throwline_certs::Database;
use throwline_certs::authority::Authority;
use tokio::sync::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::balancer::{Balancer, Mode, Product, Site};
use crate::client::Target;
use crate::postgres::{OWNER, Postgres};
use crate::upstream::Upstream;
use crate::world::private_dir;
use crate::{Agent, Kubectl, Proxy, Relay, User, eventually, free_address, metrics, tools};

const PATIENCE: Duration = Duration::from_secs(60);

/// How many of each there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub agents: usize,
    pub proxies: usize,
}

impl Size {
    /// As the environment says (`THROWLINE_E2E_AGENTS`, `_PROXIES`), else what every
    /// run of the tests can bear.
    pub fn from_environment() -> Self {
        let number = |name: &str, default| {
            let value = std::env::var(format!("THROWLINE_E2E_{name}")).ok();
            value.and_then(|text| text.parse().ok()).unwrap_or(default)
        };
        Self {
            agents: number("AGENTS", 3),
            proxies: number("PROXIES", 3),
        }
    }
}

/// What leads clients to the relays: a balancer by its file of `deploy/balancers`.
#[derive(Debug, Clone, Copy)]
pub struct Front {
    pub product: Product,
    pub mode: Mode,
}

impl Front {
    /// As `THROWLINE_E2E_FRONT` says (`haproxy-terminate`, `envoy-passthrough`, …), else HAProxy
    /// that passes TLS through.
    pub fn from_environment() -> Result<Self> {
        let text = std::env::var("THROWLINE_E2E_FRONT");
        let text = text.as_deref().unwrap_or("haproxy-passthrough");
        let (product, mode) = text.split_once('-').unwrap_or((text, ""));
        let product = match product {
            "haproxy" => Product::Haproxy,
            "nginx" => Product::Nginx,
            "envoy" => Product::Envoy,
            _ => bail!("no such balancer: {text}"),
        };
        let mode = match mode {
            "terminate" => Mode::Terminate,
            "passthrough" => Mode::Passthrough,
            _ => bail!("no such mode of a balancer: {text}"),
        };
        Ok(Self { product, mode })
    }
}

/// From where relays see the balancer come, which they trust.
const BALANCER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));

pub struct Fleet {
    pub relays: Vec<Mutex<Relay>>,
    pub agents: Vec<Agent>,
    pub proxies: Vec<Proxy>,
    _balancer: Balancer,
    client_arguments: Vec<String>,
    pub database: Mutex<Postgres>,
    pub upstream: Arc<Upstream>,
    pub dir: tempfile::TempDir,
}

impl Fleet {
    /// Three relays, as the balancers' files name them, with these arguments beside their own.
    pub async fn start(size: Size, front: Front, relay_arguments: &[&str]) -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Arc::new(Upstream::start(dir.path()).await?);
        let database = Postgres::start().await?;
        let url = database.url(OWNER);
        Authority::migrate(&Database::from_url(&url)?).await?;
        let port = free_address()?.port();
        let site = Site {
            dir: dir.path().join("balancer"),
            mode: front.mode,
            listen: free_address()?,
            relays: [11, 12, 13].map(|last| SocketAddr::from(([127, 0, 0, last], port))),
            admin_port: free_address()?.port(),
            source: BALANCER,
            idle_seconds: 60,
        };
        site.prepare()?;
        let public = format!("https://localhost:{}", site.listen.port());
        let trusted = BALANCER.to_string();
        let (by_the_balancer, client_arguments): (&[&str], _) = match front.mode {
            Mode::Terminate => {
                let ca = site.ca_file().display().to_string();
                (&["--plaintext"], vec!["--ca-file".to_owned(), ca])
            }
            Mode::Passthrough => (&["--proxy-protocol"], Vec::new()),
        };
        let mut relays: Vec<Relay> = Vec::new();
        for (number, listen) in site.relays.iter().enumerate() {
            let name = format!("relay-{number}");
            let home = dir.path().join(&name);
            if let Some(first) = relays.first() {
                first.share_the_ca(&home)?;
            }
            let own = [
                "--database",
                &url,
                "--instance",
                &name,
                "--trust-proxy",
                &trusted,
            ];
            let arguments = [&own, by_the_balancer, relay_arguments].concat();
            let admin = SocketAddr::new(listen.ip(), site.admin_port);
            relays.push(Relay::with_admin(&home, *listen, admin, &public, &arguments).await?);
        }
        let balancer = Balancer::start(front.product, &site).await?;
        let mut fleet = Self {
            relays: relays.into_iter().map(Mutex::new).collect(),
            agents: Vec::new(),
            proxies: Vec::new(),
            _balancer: balancer,
            client_arguments,
            database: Mutex::new(database),
            upstream,
            dir,
        };
        fleet.people_and_clusters(size).await?;
        Ok(fleet)
    }

    async fn people_and_clusters(&mut self, size: Size) -> Result<()> {
        let arguments = self.client_arguments.clone();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let path = self.dir.path();
        let relay = self.relays.first().context("a fleet has a relay")?;
        let relay = relay.lock().await;
        for number in 0..size.agents {
            let name = cluster_name(number);
            let token = relay.token(&["--cluster", &name]).await?;
            let kubeconfig = self.upstream.kubeconfig();
            self.agents
                .push(Agent::start(path, &name, &token, kubeconfig, &arguments).await?);
        }
        try_join_all(self.agents.iter().map(Agent::connected)).await?;
        for number in 0..size.proxies {
            let name = format!("user-{number}");
            let group = self.upstream.group();
            let token = relay.token(&["--user", &name, "--group", group]).await?;
            let user = User::login(path, &name, &token, &arguments).await?;
            let clusters: Vec<String> = clusters_of(number, size.agents);
            let clusters: Vec<&str> = clusters.iter().map(String::as_str).collect();
            self.proxies
                .push(Proxy::start(&user, &clusters, &[]).await?);
        }
        Ok(())
    }

    /// Another agent of that cluster, with an enrolment of its own.
    pub async fn replica(&self, number: usize) -> Result<Agent> {
        let name = cluster_name(number);
        let relay = self.relays.first().context("a fleet has a relay")?;
        let token = relay.lock().await.token(&["--cluster", &name]).await?;
        let arguments: Vec<&str> = self.client_arguments.iter().map(String::as_str).collect();
        let home = self.dir.path().join("replica");
        let kubeconfig = self.upstream.kubeconfig();
        let agent = Agent::start(&home, &name, &token, kubeconfig, &arguments).await?;
        agent.connected().await?;
        Ok(agent)
    }

    /// The users, by number, that have that cluster.
    pub fn users_of(&self, cluster: usize) -> Vec<usize> {
        let name = cluster_name(cluster);
        (0..self.proxies.len())
            .filter(|user| clusters_of(*user, self.agents.len()).contains(&name))
            .collect()
    }

    /// kubectl of that user, before that cluster.
    pub fn kubectl(&self, user: usize, cluster: usize) -> Result<Kubectl> {
        let proxy = self.proxies.get(user).context("no such user")?;
        let newest = tools::newest_kubectl()?;
        let context = format!("throwline-{}", cluster_name(cluster));
        Ok(Kubectl::new(&newest, &proxy.kubeconfig, self.dir.path()).context(&context))
    }

    /// Waits until every agent is connected to this many different relays.
    pub async fn spread_over(&self, relays: usize, limit: Duration) -> Result<Duration> {
        let since = Instant::now();
        try_join_all(self.agents.iter().map(|agent| async move {
            eventually(limit, "an agent is at different relays", || async {
                let now = metrics::Metrics::of(agent.admin).await?;
                ensure!(now.has("throwline_agent_relays"), "no such metric");
                let at = now.sum("throwline_agent_relays", &[]);
                ensure!(at >= relays as f64, "{} is at {at}", agent.cluster);
                Ok(())
            })
            .await
        }))
        .await?;
        Ok(since.elapsed())
    }

    pub fn logs(&self) -> String {
        let mut all: Vec<String> = Vec::new();
        for relay in &self.relays {
            if let Ok(relay) = relay.try_lock() {
                all.push(crate::world::tail("relay", &relay.process.log()));
            }
        }
        let agents = self.agents.iter().map(|agent| &agent.process);
        let proxies = self.proxies.iter().map(|proxy| &proxy.process);
        for process in agents.chain(proxies) {
            all.push(crate::world::tail(process.name(), &process.log()));
        }
        all.join("\n----\n")
    }
}

pub fn cluster_name(number: usize) -> String {
    format!("cluster-{number}")
}

/// Two clusters for each user, so that each cluster has several users.
fn clusters_of(user: usize, agents: usize) -> Vec<String> {
    let mut numbers = vec![user % agents.max(1), (user + 1) % agents.max(1)];
    numbers.dedup();
    numbers.into_iter().map(cluster_name).collect()
}

/// A load on all proxies of a fleet, until it is stopped or dropped.
pub struct Load {
    counts: Arc<Counts>,
    stop: CancellationToken,
    _stops: DropGuard,
    tasks: TaskTracker,
}

#[derive(Default)]
struct Counts {
    raw: AtomicU64,
    kubectl: AtomicU64,
    failed: StdMutex<Vec<Failed>>,
    /// For each worker, when its last request succeeded.
    last_good: StdMutex<Vec<Instant>>,
}

/// A request that failed.
#[derive(Debug, Clone)]
pub struct Failed {
    pub worker: usize,
    pub at: Instant,
    pub why: String,
}

/// What a load has done.
#[derive(Debug)]
pub struct Done {
    pub raw: u64,
    pub kubectl: u64,
    pub failed: Vec<Failed>,
}

/// Between two requests of one worker: there are many, and one machine.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests on one connection, before a new one is made as a new kubectl would.
const ON_ONE_CONNECTION: usize = 20;

impl Load {
    /// A worker for each context of each proxy, asking the API server for small things, and one
    /// that runs kubectl for each of the first `kubectls` proxies.
    pub fn start(fleet: &Fleet, kubectls: usize) -> Result<Self> {
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        let counts: Arc<Counts> = Arc::default();
        let mut workers = 0;
        let mut worker = || {
            let mut last = lock(&counts.last_good);
            last.push(Instant::now());
            workers += 1;
            workers - 1
        };
        for (number, proxy) in fleet.proxies.iter().enumerate() {
            let clusters = clusters_of(number, fleet.agents.len());
            for cluster in &clusters {
                let target = Target::read(&proxy.kubeconfig, &format!("throwline-{cluster}"))?;
                let work = ask_raw(Arc::clone(&counts), worker(), target, stop.clone());
                tasks.spawn(work);
            }
            if number < kubectls {
                let kubectl = fleet.kubectl(number, number % fleet.agents.len())?;
                let work = ask_kubectl(Arc::clone(&counts), worker(), kubectl, stop.clone());
                tasks.spawn(work);
            }
        }
        tasks.close();
        Ok(Self {
            counts,
            _stops: stop.clone().drop_guard(),
            stop,
            tasks,
        })
    }

    /// Waits until every worker has succeeded after now; says how long the slowest took.
    pub async fn all_succeed(&self, limit: Duration) -> Result<Duration> {
        let from = Instant::now();
        eventually(limit, "every worker succeeds again", || async {
            let last = lock(&self.counts.last_good);
            let waiting = last.iter().filter(|good| **good <= from).count();
            ensure!(waiting == 0, "{waiting} workers have not succeeded");
            Ok(())
        })
        .await?;
        let last_failure = lock(&self.counts.failed)
            .iter()
            .filter(|failed| failed.at >= from)
            .map(|failed| failed.at - from)
            .max();
        Ok(last_failure.unwrap_or_default())
    }

    pub fn failures(&self) -> Vec<Failed> {
        lock(&self.counts.failed).clone()
    }

    /// Lets what is under way end, and tells what was done.
    pub async fn stop(self) -> Result<Done> {
        self.stop.cancel();
        if tokio::time::timeout(PATIENCE, self.tasks.wait())
            .await
            .is_err()
        {
            bail!("a request of the load does not end");
        }
        Ok(Done {
            raw: self.counts.raw.load(Ordering::Relaxed),
            kubectl: self.counts.kubectl.load(Ordering::Relaxed),
            failed: self.failures(),
        })
    }
}

impl Counts {
    fn note(&self, worker: usize, outcome: Result<()>, of: &AtomicU64) {
        of.fetch_add(1, Ordering::Relaxed);
        match outcome {
            Ok(()) => {
                if let Some(last) = lock(&self.last_good).get_mut(worker) {
                    *last = Instant::now();
                }
            }
            Err(error) => lock(&self.failed).push(Failed {
                worker,
                at: Instant::now(),
                why: format!("{error:#}"),
            }),
        }
    }
}

async fn ask_raw(counts: Arc<Counts>, worker: usize, target: Target, stop: CancellationToken) {
    let mut connection: Option<(http1::SendRequest<Empty<Bytes>>, usize)> = None;
    while !stop.is_cancelled() {
        let asked = async {
            let (sender, left) = match connection.take() {
                Some((sender, left)) if left > 0 && !sender.is_closed() => (sender, left),
                _ => (connect(&target).await?, ON_ONE_CONNECTION),
            };
            connection = Some((get(sender, &target).await?, left - 1));
            Ok(())
        };
        let outcome = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(outcome) => outcome,
            Err(_) => Err(anyhow::anyhow!("no answer within {PATIENCE:?}")),
        };
        counts.note(worker, outcome, &counts.raw);
        tokio::time::sleep(PAUSE).await;
    }
}

async fn connect(target: &Target) -> Result<http1::SendRequest<Empty<Bytes>>> {
    let stream = target.connect(&[b"http/1.1"]).await?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // It ends with its sender.
    tokio::spawn(connection);
    Ok(sender)
}

async fn get(
    mut sender: http1::SendRequest<Empty<Bytes>>,
    target: &Target,
) -> Result<http1::SendRequest<Empty<Bytes>>> {
    let request = http::Request::get(format!("{}/api/v1/namespaces/default", target.prefix))
        .header(http::header::HOST, &target.address)
        .body(Empty::new())?;
    sender.ready().await?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let text = String::from_utf8_lossy(&body);
    ensure!(status == 200, "{status}: {text}");
    ensure!(text.contains("\"Namespace\""), "not whole: {text}");
    Ok(sender)
}

async fn ask_kubectl(
    counts: Arc<Counts>,
    worker: usize,
    kubectl: Kubectl,
    stop: CancellationToken,
) {
    while !stop.is_cancelled() {
        let outcome = kubectl.ok(&["get", "namespaces"]).await.map(drop);
        counts.note(worker, outcome, &counts.kubectl);
        tokio::time::sleep(PAUSE).await;
    }
}

fn lock<T>(mutex: &StdMutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Done {
    /// One line, for people.
    pub fn line(&self) -> String {
        let failed = self.failed.len();
        let (raw, kubectl) = (self.raw, self.kubectl);
        format!("requests={raw} kubectl={kubectl} failed={failed}")
    }

    /// Fails with the first few failures, if there are any.
    pub fn none_failed(&self) -> Result<()> {
        let some: Vec<&str> = self
            .failed
            .iter()
            .take(5)
            .map(|one| one.why.as_str())
            .collect();
        ensure!(some.is_empty(), "{}:\n{}", self.line(), some.join("\n"));
        Ok(())
    }
}
