//! Several relays on one PostgreSQL behind a balancer, clusters and people that come through them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::future::try_join_all;
use throwline_database::Database;
use tokio::sync::Mutex;

use crate::balancer::{Balancer, Mode, Product, Site};
use crate::environment::private_dir;
use crate::forwarder::Forwarder;
use crate::link::Link;
use crate::postgres::{self, OWNER, Postgres};
use crate::upstream::Upstream;
use crate::{Agent, Kubectl, Proxy, Relay, User, eventually, free_address, metrics, tools};

/// How many of each there are.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    pub relays: usize,
    pub agents: usize,
    pub proxies: usize,
}

impl Size {
    /// One cluster and one user behind three relays: it is lines that are looked at, not crowds.
    pub const ONE_USER: Self = Self {
        relays: 3,
        agents: 1,
        proxies: 1,
    };

    /// From the environment (`THROWLINE_E2E_AGENTS`, `_PROXIES`), else what every
    /// run of the tests can bear.
    pub fn from_environment() -> Self {
        let number = |name: &str, default| {
            let value = std::env::var(format!("THROWLINE_E2E_{name}")).ok();
            value.and_then(|text| text.parse().ok()).unwrap_or(default)
        };
        Self {
            relays: BALANCED,
            agents: number("AGENTS", 3),
            proxies: number("PROXIES", 3),
        }
    }
}

/// As many relays as the files of `deploy/balancers` name.
pub const BALANCED: usize = 3;

/// What leads clients to the relays.
#[derive(Debug, Clone, Copy)]
pub enum Front {
    /// A real one by its file of `deploy/balancers`, which names three relays.
    Balancer { product: Product, mode: Mode },
    /// Connections go to the relays in turn, past those that refuse.
    Plain,
}

impl Front {
    /// From `THROWLINE_E2E_FRONT`, else HAProxy that passes TLS through.
    pub fn from_environment() -> Result<Self> {
        let text = std::env::var("THROWLINE_E2E_FRONT");
        Self::parse(text.as_deref().unwrap_or("haproxy-passthrough"))
    }

    /// `haproxy-terminate`, `envoy-passthrough`, …, or `plain`.
    pub fn parse(text: &str) -> Result<Self> {
        if text == "plain" {
            return Ok(Self::Plain);
        }
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
        Ok(Self::Balancer { product, mode })
    }
}

/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// From where relays see the balancer come, which they trust.
const BALANCER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));

pub struct Fleet {
    // Dropped in this order: clients first.
    pub proxies: Vec<Mutex<Proxy>>,
    pub users: Vec<User>,
    pub agents: Vec<Mutex<Agent>>,
    pub relays: Vec<Mutex<Relay>>,
    /// The ways out of agents and of proxies, where they can be cut.
    pub agent_links: Vec<Link>,
    pub proxy_links: Vec<Link>,
    size: Size,
    listen: SocketAddr,
    balancer: Mutex<Option<Balancer>>,
    _forwarder: Option<Forwarder>,
    client_arguments: Vec<String>,
    pub database: Mutex<Postgres>,
    pub upstream: Arc<Upstream>,
    pub dir: tempfile::TempDir,
}

impl Fleet {
    /// A whole one, with these arguments of its relays beside their own.
    pub async fn start(size: Size, front: Front, relay_arguments: &[&str]) -> Result<Self> {
        let mut fleet = Self::relays(size, front, relay_arguments).await?;
        fleet.clusters().await?;
        fleet.people().await?;
        Ok(fleet)
    }

    /// The same, with a [`Link`] for each agent and each proxy.
    pub async fn with_links(size: Size, front: Front, relay_arguments: &[&str]) -> Result<Self> {
        let mut fleet = Self::relays(size, front, relay_arguments).await?;
        let links = async |count| try_join_all((0..count).map(|_| Link::start(fleet.listen))).await;
        (fleet.agent_links, fleet.proxy_links) =
            (links(size.agents).await?, links(size.proxies).await?);
        fleet.clusters().await?;
        fleet.people().await?;
        Ok(fleet)
    }

    async fn relays(size: Size, front: Front, relay_arguments: &[&str]) -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Arc::new(Upstream::start(dir.path()).await?);
        let database = Postgres::start().await?;
        let url = database.url(OWNER);
        postgres::migrate(&Database::from_url(&url)?).await?;
        let port = free_address()?.port();
        let admin_port = free_address()?.port();
        let listen = free_address()?;
        let public = format!("https://localhost:{}", listen.port());
        let last = u8::try_from(size.relays)?
            .checked_add(11)
            .context("too many")?;
        let addresses: Vec<SocketAddr> = (11..last)
            .map(|last| SocketAddr::from(([127, 0, 0, last], port)))
            .collect();
        let trusted = BALANCER.to_string();
        let mut by_the_front: Vec<&str> = Vec::new();
        let mut client_arguments = Vec::new();
        let mut site = None;
        if let Front::Balancer { mode, .. } = front {
            let relays = addresses.as_slice().try_into();
            let at = Site {
                dir: dir.path().join("balancer"),
                mode,
                listen,
                relays: relays.context("the balancers' files name three relays")?,
                admin_port,
                source: BALANCER,
                idle_seconds: 60,
            };
            at.prepare()?;
            by_the_front.extend(["--trust-proxy", &trusted]);
            match mode {
                Mode::Terminate => {
                    by_the_front.push("--plaintext");
                    client_arguments
                        .extend(["--ca-file".into(), at.ca_file().display().to_string()]);
                }
                Mode::Passthrough => by_the_front.push("--proxy-protocol"),
            }
            site = Some(at);
        }
        let mut relays: Vec<Relay> = Vec::new();
        for (number, listen) in addresses.iter().enumerate() {
            let name = relay_name(number);
            let home = dir.path().join(&name);
            if let Some(first) = relays.first() {
                first.share_the_ca(&home)?;
            }
            let own = ["--database", &url, "--instance", &name];
            let arguments = [&own[..], &by_the_front, relay_arguments].concat();
            let admin = SocketAddr::new(listen.ip(), admin_port);
            relays.push(Relay::with_admin(&home, *listen, admin, &public, &arguments).await?);
        }
        let (balancer, forwarder) = match (front, &site) {
            (Front::Balancer { product, .. }, Some(site)) => {
                (Some(Balancer::start(product, site).await?), None)
            }
            _ => (None, Some(Forwarder::start(listen, &addresses).await?)),
        };
        Ok(Self {
            relays: relays.into_iter().map(Mutex::new).collect(),
            agents: Vec::new(),
            proxies: Vec::new(),
            users: Vec::new(),
            agent_links: Vec::new(),
            proxy_links: Vec::new(),
            size,
            listen,
            balancer: Mutex::new(balancer),
            _forwarder: forwarder,
            client_arguments,
            database: Mutex::new(database),
            upstream,
            dir,
        })
    }

    /// Enrols the clusters' agents and waits until each is connected.
    async fn clusters(&mut self) -> Result<()> {
        for number in 0..self.size.agents {
            let name = cluster_name(number);
            let token = self.token(&["--cluster", &name]).await?;
            let arguments = self.arguments(self.agent_links.get(number));
            let agent = self
                .agent(self.dir.path(), &name, &token, &arguments)
                .await?;
            self.agents.push(Mutex::new(agent));
        }
        try_join_all(
            self.agents
                .iter()
                .map(async |agent| agent.lock().await.connected().await),
        )
        .await
        .map(drop)
    }

    async fn agent(
        &self,
        dir: &Path,
        name: &str,
        token: &str,
        arguments: &[String],
    ) -> Result<Agent> {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Agent::start(dir, name, token, self.upstream.kubeconfig(), &arguments).await
    }

    /// Signs the users in and starts their proxies.
    async fn people(&mut self) -> Result<()> {
        for number in 0..self.size.proxies {
            let name = user_name(number);
            let who = ["--user", &name, "--group", self.upstream.group()];
            let token = self.token(&who).await?;
            let link = self.proxy_links.get(number);
            let arguments = self.arguments(link);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            let user = User::login(self.dir.path(), &name, &token, &arguments).await?;
            let clusters = clusters_of(number, self.size.agents);
            let clusters: Vec<String> = clusters.into_iter().map(cluster_name).collect();
            let clusters: Vec<&str> = clusters.iter().map(String::as_str).collect();
            let url = link.map(Link::url).unwrap_or_default();
            let way: &[&str] = match link {
                Some(_) => &["--proxy", &url],
                None => &[],
            };
            let proxy = Proxy::start(&user, &clusters, way).await?;
            self.proxies.push(Mutex::new(proxy));
            self.users.push(user);
        }
        Ok(())
    }

    /// The arguments of an agent, and of a login, behind that link.
    fn arguments(&self, link: Option<&Link>) -> Vec<String> {
        let mut all = self.client_arguments.clone();
        if let Some(link) = link {
            all.extend(["--proxy".into(), link.url()]);
        }
        all
    }

    /// kill -9 of the balancer, and the same one again after a while.
    pub async fn restart_balancer(&self, down: Duration) -> Result<()> {
        let mut balancer = self.balancer.lock().await;
        let balancer = balancer.as_mut().context("there is no balancer")?;
        balancer.kill().await?;
        tokio::time::sleep(down).await;
        balancer.restart().await
    }

    pub fn size(&self) -> Size {
        self.size
    }

    /// Stops all local proxies.
    pub async fn stop_people(&self) -> Result<()> {
        let stop = async |proxy: &Mutex<Proxy>| {
            let ended = proxy.lock().await.process.stop(PATIENCE).await?;
            ensure!(ended.success(), "a proxy ended with {ended}");
            anyhow::Ok(())
        };
        try_join_all(self.proxies.iter().map(stop)).await.map(drop)
    }

    /// Starts them again.
    pub async fn start_people(&self) -> Result<()> {
        let start = async |proxy: &Mutex<Proxy>| proxy.lock().await.restart().await;
        try_join_all(self.proxies.iter().map(start)).await.map(drop)
    }

    async fn token(&self, arguments: &[&str]) -> Result<String> {
        let relay = self.relays.first().context("a fleet has a relay")?;
        relay.lock().await.token(arguments).await
    }

    /// Another agent of that cluster, enrolled separately.
    pub async fn replica(&self, number: usize) -> Result<Agent> {
        let name = cluster_name(number);
        let token = self.token(&["--cluster", &name]).await?;
        let home = self.dir.path().join("replica");
        let arguments = self.arguments(None);
        let agent = self.agent(&home, &name, &token, &arguments).await?;
        agent.connected().await?;
        Ok(agent)
    }

    /// The users, by number, that have that cluster.
    pub fn users_of(&self, cluster: usize) -> Vec<usize> {
        (0..self.proxies.len())
            .filter(|user| clusters_of(*user, self.agents.len()).contains(&cluster))
            .collect()
    }

    /// kubectl of that user, before that cluster.
    pub async fn kubectl(&self, user: usize, cluster: usize) -> Result<Kubectl> {
        let proxy = self.proxies.get(user).context("no such user")?;
        self.kubectl_at(&*proxy.lock().await, cluster)
    }

    /// kubectl by way of that proxy, before that cluster.
    pub fn kubectl_at(&self, proxy: &Proxy, cluster: usize) -> Result<Kubectl> {
        let newest = tools::newest_kubectl()?;
        let context = format!("throwline-{}", cluster_name(cluster));
        Ok(Kubectl::new(&newest, &proxy.kubeconfig, self.dir.path()).context(&context))
    }

    /// Waits until every agent is connected to this many different relays.
    pub async fn spread_over(&self, relays: usize, limit: Duration) -> Result<Duration> {
        let all: Vec<usize> = (0..self.agents.len()).collect();
        self.these_spread_over(&all, relays, limit).await
    }

    /// The same for some of them.
    pub async fn these_spread_over(
        &self,
        agents: &[usize],
        relays: usize,
        limit: Duration,
    ) -> Result<Duration> {
        let since = Instant::now();
        let agents = agents.iter().filter_map(|agent| self.agents.get(*agent));
        try_join_all(agents.map(async |agent| {
            eventually(limit, "an agent is at different relays", || async {
                let agent = agent.lock().await;
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
        let mut add = |name: &str, log: &str| all.push(crate::environment::tail(name, log));
        for relay in self.relays.iter().filter_map(|relay| relay.try_lock().ok()) {
            add("relay", &relay.process.log());
        }
        for agent in self.agents.iter().filter_map(|agent| agent.try_lock().ok()) {
            add(agent.process.name(), &agent.process.log());
        }
        for proxy in self
            .proxies
            .iter()
            .filter_map(|proxy| proxy.try_lock().ok())
        {
            add(proxy.process.name(), &proxy.process.log());
        }
        all.join("\n----\n")
    }
}

pub fn relay_name(number: usize) -> String {
    format!("relay-{number}")
}

pub fn cluster_name(number: usize) -> String {
    format!("cluster-{number}")
}

pub fn user_name(number: usize) -> String {
    format!("user-{number}")
}

/// Two clusters for each user, so that each cluster has several users.
pub fn clusters_of(user: usize, agents: usize) -> Vec<usize> {
    let mut numbers = vec![user % agents.max(1), (user + 1) % agents.max(1)];
    numbers.dedup();
    numbers
}
