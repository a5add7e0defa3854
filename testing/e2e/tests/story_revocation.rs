//! What ends a stream and what does not: a revocation with its reason, a certificate's end only
//! without a renewal, a restart of the only relay not at all.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use throwline_authority::{Authority, Target};
use throwline_database::Database;
use throwline_e2e::environment::{CLUSTER, USER, private_dir, said, throwline};
use throwline_e2e::forwarder::Forwarder;
use throwline_e2e::pod::Pod;
use throwline_e2e::postgres::{self, OWNER, Postgres};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Builder, Environment, Fixture, Kubectl, Proxy, Relay, Suite, User, contains, eventually,
    free_address, tools, unique,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::Child;
use tokio::task::JoinHandle;

/// What the issue allows, and what a busy machine takes on top.
const WITHIN: Duration = Duration::from_secs(10 + 10);
const TICKING: &str = "trap 'exit 0' TERM INT; while :; do echo tick; sleep 1; done";

fn main() -> ExitCode {
    let limit = Duration::from_secs(240);
    Suite::new()
        .alone("a_revoked_user_is_cut_and_told_why", limit, a_revoked_user)
        .alone(
            "a_revoked_cluster_is_cut_and_its_users_told_why",
            limit,
            a_revoked_cluster,
        )
        .alone(
            "a_revocation_at_one_relay_reaches_the_other",
            limit,
            two_relays,
        )
        .alone(
            "streams_outlive_the_certificate_that_they_began_with",
            limit,
            streams_outlive_their_certificate,
        )
        .alone(
            "a_restart_of_the_only_relay_waits_for_no_stream",
            limit,
            a_restart,
        )
        .run(|| async { Ok(()) })
}

/// A kubectl that goes on until it is ended.
struct Running {
    what: &'static str,
    child: Child,
    lines: Arc<AtomicUsize>,
    stderr: JoinHandle<String>,
    stdout: JoinHandle<String>,
}

impl Running {
    fn start(kubectl: &Kubectl, what: &'static str, arguments: &[&str]) -> Result<Self> {
        let mut command = kubectl.command(arguments);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = Arc::new(AtomicUsize::new(0));
        let (out, mut err) = (
            child.stdout.take().context("no stdout")?,
            child.stderr.take().context("no stderr")?,
        );
        let counted = Arc::clone(&lines);
        let stdout = tokio::spawn(async move {
            let (mut read, mut last) = (BufReader::new(out).lines(), String::new());
            while let Ok(Some(line)) = read.next_line().await {
                counted.fetch_add(1, Ordering::Relaxed);
                last = line;
            }
            last
        });
        let stderr = tokio::spawn(async move {
            let mut text = String::new();
            let _ = err.read_to_string(&mut text).await;
            text
        });
        Ok(Self {
            what,
            child,
            lines,
            stderr,
            stdout,
        })
    }

    async fn says_more(&self) -> Result<()> {
        self.says_more_than(self.count()).await
    }

    /// Lines so far.
    fn count(&self) -> usize {
        self.lines.load(Ordering::Relaxed)
    }

    async fn says_more_than(&self, before: usize) -> Result<()> {
        eventually(Duration::from_secs(30), self.what, || async {
            let now = self.count();
            ensure!(now > before, "{} stands at {now} lines", self.what);
            Ok(())
        })
        .await
    }

    /// Ends by itself; kubectl's last output, on either stream.
    async fn ended(mut self, within: Duration) -> Result<String> {
        let ended = tokio::time::timeout(within, self.child.wait()).await;
        ended.with_context(|| format!("{} did not end within {within:?}", self.what))??;
        Ok(format!("{}\n{}", self.stdout.await?, self.stderr.await?))
    }
}

/// exec, logs -f and a watch that has something to say each second.
async fn streams(env: &Environment) -> Result<(Vec<Running>, Pod)> {
    streams_of(&env.newest()?, &env.upstream, &env.namespace).await
}

async fn streams_of(
    kubectl: &Kubectl,
    upstream: &Upstream,
    namespace: &str,
) -> Result<(Vec<Running>, Pod)> {
    let pod = Pod::start(upstream, namespace, TICKING).await?;
    let exec = ["exec", &pod.name, "--", "sh", "-c", TICKING];
    let all = vec![
        Running::start(kubectl, "exec", &exec)?,
        Running::start(kubectl, "logs -f", &["logs", "-f", &pod.name])?,
        Running::start(kubectl, "watch", &["get", "configmaps", "--watch"])?,
    ];
    for one in &all[..2] {
        one.says_more().await?;
    }
    let before = all[2].count();
    touch(upstream, namespace, &unique("first-")).await?;
    all[2].says_more_than(before).await?;
    Ok((all, pod))
}

/// Gives the watch something to say.
async fn touch(upstream: &Upstream, namespace: &str, name: &str) -> Result<()> {
    let admin = upstream.admin()?.namespace(namespace);
    admin.ok(&["create", "configmap", name]).await?;
    Ok(())
}

/// Revokes beside this relay; the output of the command.
async fn revoke(relay: &Relay, what: &[&str], database: &[&str]) -> Result<String> {
    let mut command = throwline(&relay.state)?;
    command.arg("revoke").args(what).args(database);
    command.arg("--state-dir").arg(&relay.state);
    let output = command.output().await?;
    ensure!(output.status.success(), "{}", said(&output));
    contains(&said(&output), "revoked")?;
    Ok(said(&output))
}

/// Each has ended by itself, and those that have room for it say why.
async fn cut(running: Vec<Running>, diagnostics: impl Fn() -> String) -> Result<()> {
    for one in running {
        let what = one.what;
        let told = one.ended(WITHIN).await;
        let told = told.map_err(|error| error.context(diagnostics()))?;
        // A stream of plain text has no room for a reason; kubectl tells that it was reset.
        if what != "logs -f" {
            contains(&told, "revoked")?;
        }
    }
    Ok(())
}

async fn a_revoked_user(_: Arc<()>) -> Result<()> {
    let env = Environment::start().await?;
    let (running, pod) = streams(&env).await?;
    let since = Instant::now();
    revoke(&env.relay, &["user", &env.user.name], &[]).await?;
    for one in running {
        let what = one.what;
        let told = one.ended(WITHIN).await;
        let told = told.map_err(|error| error.context(env.diagnostics()))?;
        println!(
            "    {what} ended after {:?}: {}",
            since.elapsed(),
            told.trim()
        );
        // A stream of plain text has no room for a reason; kubectl tells that it was reset.
        if what != "logs -f" {
            contains(&told, "revoked")?;
        }
    }
    let refused = env.newest()?.fails(&["get", "pods"]).await?;
    contains(&refused.stderr, "revoked")?;

    // A new token, and the same user is there again, with the same local proxy.
    let arguments = ["--user", &env.user.name, "--group", env.upstream.group()];
    let token = env.relay.token(&arguments).await?;
    let signed_in = env.user.sign_in(&token, &[]).await?;
    ensure!(signed_in.status.success(), "{}", said(&signed_in));
    eventually(Duration::from_secs(30), "the user is back", || async {
        env.newest()?.ok(&["get", "pods"]).await.map(drop)
    })
    .await?;
    pod.remove().await?;
    env.close().await
}

async fn a_revoked_cluster(_: Arc<()>) -> Result<()> {
    let mut env = Environment::start().await?;
    let (running, pod) = streams(&env).await?;
    let cluster = env.agent.cluster.clone();
    let told = revoke(&env.relay, &["cluster", &cluster], &[]).await?;
    contains(&told, &format!("throwline cluster release {cluster}"))?;
    cut(running, || env.diagnostics()).await?;
    let refused = env.newest()?.fails(&["get", "pods"]).await?;
    contains(&refused.stderr, "revoked")?;
    let listed = env.user.clusters().await?;
    contains(&listed.to_string(), "revoked")?;
    // The user's own machine has the list, whatever its relay sends from now on.
    let list = env.user.state.join("revocations.json");
    eventually(WITHIN, "the local proxy has the list", || async {
        ensure!(list.exists(), "not yet");
        Ok(())
    })
    .await?;

    // A new token, and the same cluster is there again, from the state directory that it has.
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    env.agent.restart_with(&token).await?;
    env.agent.connected().await?;
    env.newest()?.ok(&["get", "pods"]).await?;
    // Redeemed by now: it stays where it is, and the agent reconnects.
    env.agent.restart_with(&token).await?;
    env.agent.connected().await?;
    env.newest()?.ok(&["get", "pods"]).await?;
    pod.remove().await?;
    env.close().await
}

/// The agent is at relay one and its user at relay two; each revocation is made beside the other one.
async fn two_relays(_: Arc<()>) -> Result<()> {
    let dir = private_dir()?;
    let upstream = Upstream::start(dir.path()).await?;
    let server = Postgres::start().await?;
    let url = server.url(OWNER);
    postgres::migrate(&Database::from_url(&url)?).await?;
    let database = ["--database", url.as_str()];
    let (front, first, second) = (free_address()?, free_address()?, free_address()?);
    let public = format!("https://localhost:{}", front.port());
    let (one_dir, two_dir) = (dir.path().join("one"), dir.path().join("two"));
    let start = async |name: &str, listen: SocketAddr, dir: &Path| {
        let arguments = [&database[..], &["--instance", name]].concat();
        Relay::at(dir, listen, &public, &arguments).await
    };
    let one = start("one", first, &one_dir).await?;
    one.share_the_ca(&two_dir)?;
    let two = start("two", second, &two_dir).await?;
    let balancer = Forwarder::start(front, &[first]).await?;
    let token = one.token(&["--cluster", CLUSTER]).await?;
    let alone = ["--carriers", "1"];
    let mut agent =
        Agent::start(dir.path(), CLUSTER, &token, upstream.kubeconfig(), &alone).await?;
    agent.connected().await?;
    balancer.lead_to(second);
    let token = two
        .token(&["--user", USER, "--group", upstream.group()])
        .await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
    let namespace = unique("throwline-e2e-");
    let admin = upstream.admin()?;
    admin.ok(&["create", "namespace", &namespace]).await?;
    let kubectl = Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir.path())
        .context(&format!("throwline-{CLUSTER}"))
        .namespace(&namespace);
    let works = || async { kubectl.ok(&["get", "pods"]).await.map(drop) };
    let patience = Duration::from_secs(30);
    eventually(patience, "relay two leads to relay one", works).await?;
    let diagnostics = || {
        let logs = [&one.process, &two.process, &proxy.process].map(|process| process.log());
        logs.join("\n----\n")
    };
    let carriers = async |relay: &Relay, role: &str| {
        let metrics = relay.metrics().await?;
        let role = format!("role=\"{role}\"");
        anyhow::Ok(metrics.sum("throwline_relay_carriers", &[role.as_str()]))
    };
    ensure!(carriers(&one, "agent").await? == 1.0 && carriers(&two, "agent").await? == 0.0);

    let (running, pod) = streams_of(&kubectl, &upstream, &namespace).await?;
    let since = Instant::now();
    revoke(&two, &["cluster", CLUSTER], &database).await?;
    eventually(WITHIN, "relay one has no agent", || async {
        ensure!(carriers(&one, "agent").await? == 0.0, "still there");
        Ok(())
    })
    .await?;
    println!("    relay one let the agent go {:?} after", since.elapsed());
    cut(running, diagnostics).await?;
    println!("    the streams had ended {:?} after", since.elapsed());
    contains(&kubectl.fails(&["get", "pods"]).await?.stderr, "revoked")?;
    pod.remove().await?;

    balancer.lead_to(first);
    let token = two.token(&["--cluster", CLUSTER]).await?;
    agent.restart_with(&token).await?;
    agent.connected().await?;
    eventually(patience, "the cluster is there again", works).await?;
    let (running, pod) = streams_of(&kubectl, &upstream, &namespace).await?;
    let since = Instant::now();
    revoke(&one, &["user", USER], &database).await?;
    eventually(WITHIN, "relay two has no user", || async {
        ensure!(carriers(&two, "local-proxy").await? == 0.0, "still there");
        Ok(())
    })
    .await?;
    println!("    relay two let the user go {:?} after", since.elapsed());
    cut(running, diagnostics).await?;
    println!("    the streams had ended {:?} after", since.elapsed());
    contains(&kubectl.fails(&["get", "pods"]).await?.stderr, "revoked")?;
    pod.remove().await?;

    // What relays hear at once, and not only when they look.
    let open = async |relay: &Relay| {
        let named = Database::from_url(&url)?;
        let authority = Authority::builder(&relay.state).database(Some(named));
        anyhow::Ok(authority.open().await?)
    };
    let (here, there) = (open(&one).await?, open(&two).await?);
    let told = tokio::spawn(async move { there.revocations_changed().await });
    eventually(patience, "another process is told", || async {
        here.revoke(&Target::User(USER.to_owned())).await?;
        ensure!(told.is_finished(), "not yet");
        Ok(())
    })
    .await?;
    told.await??;
    upstream.clean().await
}

/// A certificate is back-dated by a minute, so one of 66 s is renewed after 24 s.
async fn streams_outlive_their_certificate(_: Arc<()>) -> Result<()> {
    const LIFE: Duration = Duration::from_secs(66);
    let short = ["--user-certificate-life", "66s"];
    let env = Builder::default().relay_arguments(&short).start().await?;
    let began = SystemTime::now();
    let (running, pod) = streams(&env).await?;
    // What they began with ends at the latest then.
    let last = began + LIFE + Duration::from_secs(8);
    while SystemTime::now() < last {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    for one in &running[..2] {
        let more = one.says_more().await;
        more.map_err(|error| error.context(env.diagnostics()))?;
    }
    let before = running[2].count();
    touch(&env.upstream, &env.namespace, "last").await?;
    running[2].says_more_than(before).await?;
    let log = env.proxy.process.log();
    ensure!(log.contains("certificate renewed"), "nothing was renewed");
    // A revocation still ends them, though it is about another certificate than they began with.
    revoke(&env.relay, &["user", &env.user.name], &[]).await?;
    for one in running {
        one.ended(WITHIN).await?;
    }
    pod.remove().await?;
    env.close().await
}

async fn a_restart(_: Arc<()>) -> Result<()> {
    let patient = ["--drain-timeout", "300s"];
    let mut env = Builder::default().relay_arguments(&patient).start().await?;
    let (running, pod) = streams(&env).await?;
    let since = Instant::now();
    env.relay.process.stop(Duration::from_secs(20)).await?;
    let stopped = since.elapsed();
    env.relay.restart().await?;
    env.newest()?.ok(&["get", "pods"]).await?;
    println!(
        "    the relay stopped after {stopped:?}; a request was served {:?} after the signal",
        since.elapsed()
    );
    ensure!(stopped < Duration::from_secs(8), "{stopped:?}");
    for one in &running[..2] {
        let more = one.says_more().await;
        more.map_err(|error| error.context(env.diagnostics()))?;
    }
    drop(running);
    pod.remove().await?;
    env.close().await
}
