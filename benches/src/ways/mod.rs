//! The ways to the upstream that are compared, each with its processes.

mod chain;
mod idle_agents;
mod peer_agents;
mod rathole;
mod simulated_agents;
mod ssh;
mod throwline;
mod wstunnel;

use std::any::Any;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use throwline_e2e::kubectl::Kubectl;
use throwline_e2e::process::Process;
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{Relay, eventually, tools};

use crate::client::Target;
use crate::helper::Helper;
use crate::rows::DIRECT;
use crate::{proc, upstream};

pub(crate) use idle_agents::IdleAgents;
pub(crate) use simulated_agents::connect;
pub(crate) use throwline::{THROWLINE, version as throwline_version};

/// Round trip of the direct way over the wide-area network.
const FAR: Duration = Duration::from_millis(100);
/// Of each of a tunnel's hops there: the relay lies half-way.
const HOP: Duration = Duration::from_millis(50);
/// How long a way may take to come up.
const START: Duration = Duration::from_secs(60);

/// Where everything is that ways lead to and come from.
pub(crate) struct Site {
    dir: tempfile::TempDir,
    upstream: upstream::Address,
    /// What kubectl is pointed at; none where there is no kubectl.
    cluster: Option<Upstream>,
    _server: Helper,
}

impl Site {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let dir = throwline_e2e::environment::private_dir()?;
        let (server, line) = Helper::start(&["upstream"]).await?;
        let cluster = match tools::newest_kubectl() {
            Ok(_) => Some(Upstream::start(dir.path()).await?),
            Err(_) => None,
        };
        Ok(Self {
            dir,
            upstream: serde_json::from_str(&line)?,
            cluster,
            _server: server,
        })
    }

    /// What lies at this address is the upstream itself.
    fn bare(&self, addr: SocketAddr) -> anyhow::Result<Target> {
        Target::bare(addr, &self.upstream.ca_pem)
    }

    /// A private directory.
    fn room(&self, name: &str) -> anyhow::Result<PathBuf> {
        let room = self.dir.path().join(name);
        std::fs::create_dir_all(&room)?;
        Ok(room)
    }
}

/// How far apart the ends of a hop are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Distance {
    Near,
    Far,
}

impl Distance {
    fn label(self) -> &'static str {
        match self {
            Self::Near => "near",
            Self::Far => "far",
        }
    }

    /// Where to dial to come to `to`, half of the whole way off.
    async fn hop(self, to: SocketAddr, held: &mut Held) -> anyhow::Result<SocketAddr> {
        match self {
            Self::Near => Ok(to),
            Self::Far => path(to, HOP, held).await,
        }
    }
}

/// What runs as long as this is kept.
#[derive(Default)]
struct Held(Vec<Box<dyn Any + Send + Sync>>);

impl Held {
    fn keep(&mut self, what: impl Any + Send + Sync) {
        self.0.push(Box::new(what));
    }
}

async fn path(to: SocketAddr, round_trip: Duration, held: &mut Held) -> anyhow::Result<SocketAddr> {
    let (to, millis) = (to.to_string(), round_trip.as_millis().to_string());
    let arguments = ["delay", "--to", &to, "--round-trip-ms", &millis];
    let (helper, line) = Helper::start(&arguments).await?;
    held.keep(helper);
    line.parse().context("the path gave no address")
}

/// Whose part of a tunnel a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Relay,
    Agent,
    Local,
}

/// One way from the client to the upstream.
pub(crate) struct Route {
    pub(crate) target: Target,
    /// kubectl by this way, with a home that has no cache.
    pub(crate) kubectl: Option<Kubectl>,
    parts: Vec<(Side, u32)>,
    _held: Held,
}

impl Route {
    /// CPU seconds of all the tunnel's processes so far.
    pub(crate) fn cpu_seconds(&self) -> f64 {
        self.family(None).map(proc::cpu_seconds).sum()
    }

    pub(crate) fn cpu_of(&self, side: Side) -> f64 {
        self.family(Some(side)).map(proc::cpu_seconds).sum()
    }

    pub(crate) fn has(&self, side: Side) -> bool {
        self.parts.iter().any(|(part, _)| *part == side)
    }

    pub(crate) fn forget_peaks(&self) {
        self.family(None).for_each(proc::forget_peak);
    }

    /// The most resident memory of a side, in MiB: its processes' peaks together.
    pub(crate) fn peak_mib(&self, side: Side) -> f64 {
        self.family(Some(side)).map(proc::peak_kib).sum::<f64>() / 1024.0
    }

    pub(crate) fn resident_mib(&self, side: Side) -> f64 {
        self.family(Some(side)).map(proc::resident_kib).sum::<f64>() / 1024.0
    }

    fn family(&self, side: Option<Side>) -> impl Iterator<Item = u32> {
        let parts = self.parts.iter();
        parts
            .filter(move |(part, _)| side.is_none_or(|side| side == *part))
            .flat_map(|(_, pid)| proc::family(*pid))
    }

    async fn answers(&self) -> anyhow::Result<()> {
        eventually(START, "a first answer", || async {
            self.target.connect().await?.get(1).await?;
            Ok(())
        })
        .await
    }
}

/// A way over both distances.
pub(crate) struct Way {
    pub(crate) name: &'static str,
    /// Name and version of what carries it; empty for the direct way.
    pub(crate) version: String,
    pub(crate) near: Route,
    pub(crate) far: Route,
    /// Resident memory of the agent's side before any request, in MiB.
    pub(crate) idle_agent_mib: Option<f64>,
}

/// What can be compared, in the order of the report.
pub(crate) const NAMES: [&str; 6] = [
    DIRECT,
    ssh::NAME,
    rathole::NAME,
    wstunnel::NAME,
    chain::NAME,
    THROWLINE,
];

/// Starts a way. An error that is a [`throwline_e2e::suite::Skipped`] means that its program is not
/// installed.
pub(crate) async fn start(name: &'static str, site: &Site, rest: Duration) -> anyhow::Result<Way> {
    let version = match name {
        ssh::NAME => ssh::version()?,
        rathole::NAME => rathole::version()?,
        wstunnel::NAME => wstunnel::version()?,
        chain::NAME => chain::version()?,
        THROWLINE => throwline::version()?,
        _ => String::new(),
    };
    let near = route(name, site, Distance::Near).await?;
    let idle_agent_mib = if near.has(Side::Agent) {
        // What starting took is given back.
        tokio::time::sleep(rest).await;
        Some(near.resident_mib(Side::Agent))
    } else {
        None
    };
    near.answers().await?;
    let far = route(name, site, Distance::Far).await?;
    far.answers().await?;
    Ok(Way {
        name,
        version,
        near,
        far,
        idle_agent_mib,
    })
}

async fn route(name: &'static str, site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let route = match name {
        ssh::NAME => ssh::route(site, distance).await,
        rathole::NAME => rathole::route(site, distance).await,
        wstunnel::NAME => wstunnel::route(site, distance).await,
        chain::NAME => chain::route(site, distance).await,
        THROWLINE => throwline::route(site, distance).await,
        _ => direct(site, distance).await,
    };
    route.with_context(|| format!("{name}, {}", distance.label()))
}

/// Waits for a first answer by way of these processes. Fails at once when `client` has ended.
async fn first_answer(
    target: &Target,
    client: &Process,
    others: &[&Process],
) -> anyhow::Result<()> {
    let answered = || async {
        for process in others {
            process.check_running().await?;
        }
        target.connect().await?.get(1).await
    };
    let logs = || {
        let logs = others.iter().map(|process| process.log());
        logs.collect::<Vec<_>>().join("\n")
    };
    let first = client.until(START, "a first answer", answered).await;
    first.map(drop).with_context(logs)
}

/// Throwline alone, all on one machine, answering; with its relay, for others to connect to.
pub(crate) async fn throwline_with_relay(site: &Site) -> anyhow::Result<(Route, Arc<Relay>)> {
    let (route, relay) = throwline::with_relay(site, Distance::Near).await?;
    route.answers().await?;
    Ok((route, relay))
}

async fn direct(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let mut addr = site.upstream.addr;
    let mut kubectl = None;
    if distance == Distance::Far {
        addr = path(addr, FAR, &mut held).await?;
        if let Some(cluster) = &site.cluster {
            let dir = site.room("direct")?;
            let kubeconfig = far_kubeconfig(cluster.kubeconfig(), &dir, &mut held).await?;
            kubectl = Some(Kubectl::new(&tools::newest_kubectl()?, &kubeconfig, &dir));
        }
    }
    Ok(Route {
        target: site.bare(addr)?,
        kubectl,
        parts: Vec::new(),
        _held: held,
    })
}

/// The same cluster, far away.
async fn far_kubeconfig(near: &Path, dir: &Path, held: &mut Held) -> anyhow::Result<PathBuf> {
    let text = std::fs::read_to_string(near)?;
    let server = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix("https://"))
        .context("the cluster has no server")?;
    let far = path(server.parse()?, FAR, held).await?;
    let file = dir.join("far.kubeconfig");
    std::fs::write(&file, text.replace(server, &far.to_string()))?;
    Ok(file)
}
