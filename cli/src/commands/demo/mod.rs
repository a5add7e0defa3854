//! `throwline demo`: every part in one process, to try things and to show them.

mod command;
mod upstream;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use throwline_agent::{Audit, ClusterAccess};
use throwline_authority::{Authority, Subject};
use throwline_certs::tls::Trust;
use throwline_local_proxy::kubeconfig::Files;
use throwline_local_proxy::{Outbound, Ready, Store};
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::Proxies;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use url::Url;

use crate::args;
use crate::output;
use upstream::Upstream;

/// The cluster's name on the line, and so in the context `throwline-demo`.
const CLUSTER: &str = "demo";

/// How long the agent may take to connect to a relay in the same process.
const CONNECT: Duration = Duration::from_secs(20);

/// How long each part may take to stop.
const STOP: Duration = Duration::from_secs(5);

pub(super) async fn run(args: args::Demo) -> anyhow::Result<ExitCode> {
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    // Removed when dropped, whichever way this ends.
    let dir = tempfile::Builder::new()
        .prefix("throwline-demo-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
        .context("cannot make a private directory for the demo")?;

    let outcome = tokio::select! {
        outcome = demo(&args, dir.path(), &shutdown) => outcome,
        () = second.received() => Err(anyhow::anyhow!("stopped at once, by a second signal")),
    };
    dir.close().context("cannot remove the demo's directory")?;
    outcome
}

async fn demo(args: &args::Demo, dir: &Path, shutdown: &Shutdown) -> anyhow::Result<ExitCode> {
    let upstream = Upstream::start(args, dir).await?;
    let started = tokio::select! {
        started = Parts::start(&upstream, dir) => started,
        () = shutdown.requested() => Err(anyhow::anyhow!("stopped while starting")),
    };
    let outcome = match started {
        Ok(parts) => {
            let outcome = with_parts(args, &upstream, &parts, dir, shutdown).await;
            parts.stop().await;
            outcome
        }
        Err(error) => Err(error),
    };
    upstream.stop().await;
    outcome
}

async fn with_parts(
    args: &args::Demo,
    upstream: &Upstream,
    parts: &Parts,
    dir: &Path,
    shutdown: &Shutdown,
) -> anyhow::Result<ExitCode> {
    if !args.command.is_empty() {
        // Standard output belongs to the command.
        if let Some(hint) = &upstream.hint {
            eprintln!("{hint}");
        }
        return command::run(&args.command, &parts.kubeconfig, shutdown).await;
    }
    print!("{}", summary(upstream, parts, dir));
    tokio::select! {
        () = shutdown.requested() => Ok(ExitCode::SUCCESS),
        failure = parts.ended() => Err(failure),
    }
}

fn summary(upstream: &Upstream, parts: &Parts, dir: &Path) -> String {
    let groups = match upstream.groups.as_slice() {
        [] => "in no groups".to_owned(),
        groups => format!("in groups {}", groups.join(", ")),
    };
    let connected = match parts.round_trip_us {
        0 => "connected".to_owned(),
        micros => format!("connected, {} from the relay", output::round_trip(micros)),
    };
    let hint = upstream
        .hint
        .as_ref()
        .map(|hint| format!("\n{hint}\n"))
        .unwrap_or_default();
    format!(
        "Everything runs in this process, in {dir}, and ends with it.\n\n  \
         cluster      {cluster}\n  \
         agent        {connected}\n  \
         relay        {relay} (sees ciphertext only)\n  \
         local proxy  https://{proxy}\n  \
         you are      {user}, {groups}\n  \
         audit        {audit}\n\
         {hint}\n\
         In another terminal:\n  \
         export KUBECONFIG={kubeconfig}\n  \
         kubectl get pods -A\n\n\
         Stop with Ctrl-C.\n",
        dir = dir.display(),
        cluster = upstream.description,
        relay = parts.relay_url,
        proxy = parts.ready.addr,
        user = upstream.user,
        audit = parts.audit.display(),
        kubeconfig = parts.kubeconfig.display(),
    )
}

/// The relay, the agent and the local proxy, running.
struct Parts {
    relay_url: Url,
    ready: Ready,
    kubeconfig: PathBuf,
    audit: PathBuf,
    round_trip_us: u64,
    // In the order in which they stop: users first, so that no user sees an error.
    tasks: Vec<Part>,
}

struct Part {
    name: &'static str,
    stop: ShutdownTrigger,
    task: JoinHandle<Result<(), anyhow::Error>>,
}

impl Part {
    fn spawn<E, F>(name: &'static str, run: impl FnOnce(Shutdown) -> F) -> Self
    where
        E: std::error::Error + Send + Sync + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
    {
        let (stop, shutdown) = Shutdown::new();
        let run = run(shutdown);
        Self {
            name,
            stop,
            task: tokio::spawn(async move { Ok(run.await?) }),
        }
    }
}

impl Parts {
    async fn start(upstream: &Upstream, dir: &Path) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .context("cannot open a loopback port for the relay")?;
        let relay_url = Url::parse(&format!("https://{}", listener.local_addr()?))?;
        let system_names = upstream.system_names()?;
        let authority = Authority::open_or_create(&dir.join("relay"), &relay_url)
            .await?
            .with_system_names(system_names.clone());
        authority.set_relay_url(&relay_url).await?;
        let ttl = Duration::from_secs(600);
        let agent_token = authority
            .create_token(&Subject::Cluster(CLUSTER.to_owned()), ttl, &relay_url)
            .await?;
        let user = Subject::User {
            name: upstream.user.clone(),
            groups: upstream.groups.clone(),
        };
        let user_token = authority
            .create_token(&user, ttl, &relay_url)
            .await
            .with_context(|| {
                format!(
                    "cannot give {} an identity; choose another with --user and --group",
                    upstream.user
                )
            })?;

        let mut relay_config =
            throwline_relay::Config::new(relay_url.clone(), throwline_relay::Tls::Own);
        relay_config.timing.drain_timeout = Duration::from_secs(1);
        let relay = Part::spawn("relay", |stop| {
            throwline_relay::run(listener, None, Arc::new(authority), relay_config, stop)
        });

        let agent_dir = dir.join("agent");
        let access = ClusterAccess::Kubeconfig(upstream.kubeconfig.clone());
        // One that cannot be determined is the same for as long as the demo lasts.
        let uid = throwline_agent::cluster_uid(access.clone()).await.ok();
        let is_known = uid.is_some();
        let uid = uid.unwrap_or_else(|| "demo".to_owned());
        let (trust, proxies) = (Trust::default(), Proxies::none());
        throwline_agent::enrol(&agent_token, &agent_dir, &uid, trust, &proxies).await?;
        let audit = dir.join("audit.jsonl");
        let mut agent_config = throwline_agent::Config::load(&agent_dir, access)?;
        agent_config.audit = Audit::File(audit.clone());
        agent_config.cluster_uid = agent_config.cluster_uid.filter(|_| is_known);
        agent_config.system_names = system_names;
        let agent = Part::spawn("agent", |stop| {
            throwline_agent::run(agent_config, None, stop)
        });

        let store = Store::new(dir.join("user"));
        throwline_local_proxy::login(&user_token, &store, &Outbound::default()).await?;
        let round_trip_us = connected(&store).await?;

        let mut proxy_config = throwline_local_proxy::Config::new(store.dir());
        proxy_config.clusters = vec![CLUSTER.to_owned()];
        // Never the well-known port: a proxy of the user's own may come for it.
        proxy_config.port = Some(0);
        let kubeconfig = dir.join("kubeconfig");
        proxy_config.kubeconfig = Some(Files::one(&kubeconfig));
        proxy_config.set_current = true;
        let (ready, is_ready) = oneshot::channel();
        let proxy = Part::spawn("local proxy", |stop| {
            throwline_local_proxy::run(proxy_config, ready, stop)
        });
        let tasks = vec![proxy, agent, relay];
        let Ok(ready) = is_ready.await else {
            let mut parts = tasks.into_iter();
            let failure = match parts.next() {
                Some(proxy) => proxy
                    .task
                    .await
                    .map_err(anyhow::Error::from)
                    .and_then(|outcome| outcome),
                None => Ok(()),
            };
            bail!(
                failure
                    .err()
                    .unwrap_or_else(|| anyhow::anyhow!("the local proxy ended at once"))
            );
        };
        Ok(Self {
            relay_url,
            ready,
            kubeconfig,
            audit,
            round_trip_us,
            tasks,
        })
    }

    /// Ends only if a part ends by itself, which none should.
    async fn ended(&self) -> anyhow::Error {
        loop {
            if let Some(part) = self.tasks.iter().find(|part| part.task.is_finished()) {
                return anyhow::anyhow!(
                    "the {} ended by itself; the log above says why",
                    part.name
                );
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    async fn stop(self) {
        for mut part in self.tasks {
            part.stop.trigger();
            if tokio::time::timeout(STOP, &mut part.task).await.is_err() {
                tracing::warn!(part = part.name, "did not stop in time");
                part.task.abort();
            }
        }
    }
}

/// Waits until the relay lists the agent; the round trip between them in microseconds.
async fn connected(store: &Store) -> anyhow::Result<u64> {
    let deadline = tokio::time::Instant::now() + CONNECT;
    loop {
        let clusters = throwline_local_proxy::clusters(store, &Outbound::default()).await?;
        if let Some(cluster) = clusters
            .iter()
            .find(|cluster| cluster.name == CLUSTER && cluster.connected)
        {
            return Ok(cluster.round_trip_us);
        }
        if tokio::time::Instant::now() >= deadline {
            bail!(
                "the agent did not connect within {} s; the log above says why",
                CONNECT.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
