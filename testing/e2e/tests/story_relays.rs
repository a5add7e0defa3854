//! Several relays on one PostgreSQL: kubectl reaches an agent wherever it is connected.

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::{BoxFuture, FutureExt, try_join_all};
use throwline_database::Database;
use throwline_e2e::environment::{CLUSTER, USER, private_dir};
use throwline_e2e::forwarder::Forwarder;
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::postgres::{self, OWNER, Postgres};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Fixture, Kubectl, Proxy, Relay, Suite, User, contains, eventually, free_address, tools,
};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    Suite::new()
        .story("kubectl_by_way_of_another_relay", kubectl_by_another_relay)
        .alone(
            "the_database_stops_under_kubectl",
            Duration::from_secs(120),
            the_database_stops,
        )
        .alone(
            "the_agents_relay_is_killed",
            Duration::from_secs(120),
            the_agents_relay_is_killed,
        )
        .run(fixture)
}

/// The agent is connected to relay one, the user to relay two.
struct Set {
    one: Relay,
    two: Relay,
    agent: Agent,
    user: User,
    server: tokio::sync::Mutex<Postgres>,
    front: Forwarder,
    upstream: Arc<Upstream>,
    namespace: String,
    dir: tempfile::TempDir,
}

async fn fixture() -> Result<Set> {
    let dir = private_dir()?;
    let upstream = Arc::new(Upstream::start(dir.path()).await?);
    let server = Postgres::start().await?;
    postgres::migrate(&Database::from_url(&server.url(OWNER))?).await?;
    let url = server.url(OWNER);
    let (front, first, second) = (free_address()?, free_address()?, free_address()?);
    let public = format!("https://localhost:{}", front.port());
    let start = async |name: &str, listen: SocketAddr, dir: &Path| {
        let database = ["--database", &url, "--instance", name];
        Relay::at(dir, listen, &public, &database).await
    };
    let (one_dir, two_dir) = (dir.path().join("one"), dir.path().join("two"));
    let one = start("one", first, &one_dir).await?;
    one.share_the_ca(&two_dir)?;
    let two = start("two", second, &two_dir).await?;
    let front = Forwarder::start(front, &[first]).await?;

    let token = one.token(&["--cluster", CLUSTER]).await?;
    // At one relay only, so that lines must go from one to the other.
    let alone = ["--carriers", "1"];
    let agent = Agent::start(dir.path(), CLUSTER, &token, upstream.kubeconfig(), &alone).await?;
    eventually(PATIENCE, "the agent is at relay one", || async {
        let metrics = one.metrics().await?;
        ensure!(metrics.sum("throwline_relay_carriers", &["role=\"agent\""]) == 1.0);
        Ok(())
    })
    .await?;
    front.lead_to(second);
    let token = two
        .token(&["--user", USER, "--group", upstream.group()])
        .await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    eventually(PATIENCE, "relay two knows of the agent", || async {
        let known = two.metrics().await?;
        ensure!(known.sum("throwline_relay_remote_tunnels", &[]) >= 1.0);
        Ok(())
    })
    .await?;
    let namespace = upstream.namespace("throwline-e2e-").await?;
    Ok(Set {
        one,
        two,
        agent,
        user,
        server: tokio::sync::Mutex::new(server),
        front,
        upstream,
        namespace,
        dir,
    })
}

impl Fixture for Set {
    fn diagnostics(&self) -> String {
        let parts = [&self.one.process, &self.two.process, &self.agent.process];
        let logs: Vec<String> = parts.iter().map(|process| process.log()).collect();
        logs.join("\n----\n")
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.upstream.clean().await }.boxed()
    }
}

impl Set {
    /// A separate local proxy, and kubectl before it.
    async fn on_the_users_machine(&self) -> Result<(Proxy, Kubectl)> {
        let proxy = Proxy::start(&self.user, &[CLUSTER], &[]).await?;
        let kubectl = Kubectl::new(
            &tools::newest_kubectl()?,
            &proxy.kubeconfig,
            self.dir.path(),
        )
        .context(&format!("throwline-{CLUSTER}"))
        .namespace(&self.namespace);
        Ok((proxy, kubectl))
    }
}

async fn kubectl_by_another_relay(set: Arc<Set>) -> Result<()> {
    let (_proxy, kubectl) = set.on_the_users_machine().await?;
    let pod = Pod::start(&set.upstream, &set.namespace, pod::IDLE).await?;
    contains(&kubectl.ok(&["get", "pods"]).await?, &pod.name)?;
    let said = kubectl
        .ok(&[
            "exec",
            &pod.name,
            "--",
            "sh",
            "-c",
            "echo ahoy; head -c 3000000 /dev/zero | wc -c",
        ])
        .await?;
    contains(&said, "ahoy")?;
    contains(&said, "3000000")?;
    try_join_all((0..10).map(|_| kubectl.ok(&["get", "pods"]))).await?;

    let forwarded = "throwline_relay_forwarded_lines_total";
    let (out, into) = (set.two.metrics().await?, set.one.metrics().await?);
    let lines = out.sum(forwarded, &["direction=\"out\""]);
    ensure!(lines >= 2.0, "{lines} lines");
    ensure!(into.sum(forwarded, &["direction=\"in\""]) == lines);
    let peers = into.sum("throwline_relay_carriers", &["role=\"relay\""]);
    ensure!(peers == 1.0, "{peers} peer carriers for {lines} lines");
    // The user and its address pass over the hop too.
    let events = set.agent.audit_events()?;
    let event = events.last().map(ToString::to_string).unwrap_or_default();
    contains(&event, USER)?;
    contains(&event, "127.0.0.1")?;
    contains(
        &set.user.clusters().await?.to_string(),
        "\"connected\":true",
    )?;
    pod.remove().await
}

/// Case 24: what is known is believed while the database is away.
async fn the_database_stops(set: Arc<Set>) -> Result<()> {
    let (proxy, kubectl) = set.on_the_users_machine().await?;
    kubectl.ok(&["get", "pods"]).await?;
    let mut server = set.server.lock().await;
    let address = server.address();
    server.stop().await?;
    let lines = "throwline_relay_forwarded_lines_total";
    let before = set.two.metrics().await?.sum(lines, &[]);
    // The session that is there, and a line that is new.
    kubectl.ok(&["get", "pods"]).await?;
    // One local proxy at a time for a state directory.
    drop(proxy);
    let (_again, kubectl) = set.on_the_users_machine().await?;
    kubectl.ok(&["get", "pods"]).await?;
    let after = set.two.metrics().await?.sum(lines, &[]);
    ensure!(after > before, "no new line: {before} and {after}");
    server.start_at(address).await?;
    eventually(PATIENCE, "both relays are back at the database", || async {
        for relay in [&set.one, &set.two] {
            let metrics = relay.metrics().await?;
            ensure!(metrics.sum("throwline_relay_database_up", &[]) == 1.0);
        }
        Ok(())
    })
    .await?;
    kubectl.ok(&["get", "pods"]).await.map(drop)
}

async fn the_agents_relay_is_killed(set: Arc<Set>) -> Result<()> {
    let (_proxy, kubectl) = set.on_the_users_machine().await?;
    kubectl.ok(&["get", "pods"]).await?;
    set.front.lead_to(set.two.listen);
    let killed = Instant::now();
    set.one.process.kill().await?;
    eventually(PATIENCE, "kubectl works again", || async {
        kubectl.ok(&["get", "pods"]).await
    })
    .await?;
    println!("  kubectl works again {:?} after kill -9", killed.elapsed());
    Ok(())
}
