//! The agent's life beside its API server: what it keeps in the cluster, how it stops, and what people
//! see while the API server or an agent is not there.

use std::net::{Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use throwline_e2e::environment::private_dir;
use throwline_e2e::metrics::{self, Metrics};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{
    Agent, Environment, Kubectl, Proxy, Suite, User, contains, eventually, lacks, tools, unique,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    Suite::new()
        .story("an_agent_comes_back_with_its_secret", comes_back)
        .story("replicas_share_one_secret_and_renew_in_turn", replicas)
        .story("ready_only_while_the_api_server_answers", readiness)
        .story("an_api_server_that_hangs_is_named_soon", hangs)
        .story("a_stopped_agent_says_that_it_was_stopped", stopped)
        .story("a_get_is_answered_by_another_replica", another_replica)
        .story(
            "a_slow_reader_gets_all_of_a_command_that_has_ended",
            slow_reader,
        )
        .story("clusters_is_no_failure_of_the_network", goodbye)
        .run(Environment::start)
}

/// A way to an API server that can be stopped: connections stay, and nothing passes.
struct Way {
    address: SocketAddr,
    open: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Way {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Way {
    async fn start(to: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let open = watch::Sender::new(true);
        let seen = open.subscribe();
        let task = tokio::spawn(async move {
            // They end with this task.
            let mut all = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let seen = seen.clone();
                all.spawn(async move {
                    let Ok(far) = TcpStream::connect(to).await else {
                        return;
                    };
                    let (near, far) = (near.into_split(), far.into_split());
                    tokio::join!(pass(near.0, far.1, seen.clone()), pass(far.0, near.1, seen));
                });
            }
        });
        Ok(Self {
            address,
            open,
            task,
        })
    }

    /// The kubeconfig of `template` by this way.
    fn kubeconfig(&self, template: &Path, dir: &Path) -> Result<PathBuf> {
        let text = std::fs::read_to_string(template)?;
        let mut config: serde_json::Value = serde_norway::from_str(&text)?;
        let (name, _) = host_of(&config)?;
        for cluster in config["clusters"].as_array_mut().into_iter().flatten() {
            // Its certificate is still for its own name.
            if cluster["cluster"]["tls-server-name"].is_null() {
                cluster["cluster"]["tls-server-name"] = name.clone().into();
            }
            cluster["cluster"]["server"] = format!("https://{}", self.address).into();
        }
        let file = dir.join(format!("{}.kubeconfig", unique("way")));
        std::fs::write(&file, serde_norway::to_string(&config)?)?;
        Ok(file)
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut open: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(read) = from.read(&mut buffer).await {
        if open.wait_for(|open| *open).await.is_err() || read == 0 {
            break;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            break;
        }
    }
}

/// Where the API server of a kubeconfig listens.
fn server_of(kubeconfig: &Path) -> Result<SocketAddr> {
    let text = std::fs::read_to_string(kubeconfig)?;
    let (host, port) = host_of(&serde_norway::from_str(&text)?)?;
    let mut found = (host.as_str(), port).to_socket_addrs()?;
    found
        .next()
        .with_context(|| format!("{host} has no address"))
}

/// The host, a name or an address, and the port of a kubeconfig's server.
fn host_of(config: &serde_json::Value) -> Result<(String, u16)> {
    let url = config["clusters"][0]["cluster"]["server"].as_str();
    let uri: http::Uri = url.context("no server")?.parse()?;
    let host = uri.host().context("no host")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().unwrap_or(443)))
}

/// A user of the environment's relay with a local proxy to these clusters.
async fn user(env: &Environment, dir: &Path, clusters: &[&str]) -> Result<(Proxy, Kubectl)> {
    let name = unique("u");
    let token = env
        .relay
        .token(&["--user", &name, "--group", env.upstream.group()])
        .await?;
    let user = User::login(dir, &name, &token, &[]).await?;
    let proxy = Proxy::start(&user, clusters, &[]).await?;
    let kubectl = Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir)
        .context(&format!("throwline-{}", clusters[0]))
        .namespace(&env.namespace);
    Ok((proxy, kubectl))
}

/// An empty Secret, as `deploy/kubernetes/agent.yaml` makes it.
async fn secret(env: &Environment) -> Result<(Kubectl, String, String)> {
    let admin = env.upstream.admin()?.namespace(&env.namespace);
    let name = unique("agent-state-");
    admin.ok(&["create", "secret", "generic", &name]).await?;
    let flag = format!("{}/{name}", env.namespace);
    Ok((admin, name, flag))
}

/// Those of the Deployment in `deploy/kubernetes/agent.yaml` that are not about its own paths: the binary
/// must know them.
fn shipped_arguments() -> Result<Vec<String>> {
    const SHIPPED: &str = include_str!("../../../deploy/kubernetes/agent.yaml");
    let own = [
        "--state-dir=",
        "--state-secret=",
        "--token-file=",
        "--admin-listen=",
    ];
    for document in SHIPPED.split("---\n") {
        let object: serde_json::Value = serde_norway::from_str(document)?;
        if object["kind"] != "Deployment" {
            continue;
        }
        let args = object["spec"]["template"]["spec"]["containers"][0]["args"].as_array();
        let args = args.into_iter().flatten().filter_map(|arg| arg.as_str());
        let args: Vec<&str> = args.collect();
        ensure!(args.first() == Some(&"agent"), "{args:?}");
        for flag in own {
            ensure!(
                args.iter().any(|arg| arg.starts_with(flag)),
                "no {flag} in {args:?}"
            );
        }
        let rest = args
            .into_iter()
            .skip(1)
            .filter(|arg| !own.iter().any(|flag| arg.starts_with(flag)));
        return Ok(rest.map(str::to_owned).collect());
    }
    anyhow::bail!("no Deployment in deploy/kubernetes/agent.yaml")
}

async fn comes_back(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let (admin, name, flag) = secret(&env).await?;
    let cluster = unique("pod");
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = env.upstream.kubeconfig();
    let mut arguments = vec!["--state-secret", &flag];
    let shipped = shipped_arguments()?;
    arguments.extend(shipped.iter().map(String::as_str));
    let mut agent = Agent::start(dir.path(), &cluster, &token, kubeconfig, &arguments).await?;
    agent.connected().await?;
    let saved = admin.json(&["get", "secret", &name]).await?;
    for key in ["identity.pem", "ca.pem", "relay-url"] {
        ensure!(saved["data"][key].is_string(), "no {key} in {saved}");
    }
    // A new pod: nothing but the Secret, and the token that was redeemed.
    for _ in 0..2 {
        agent.process.kill().await?;
        std::fs::remove_dir_all(&agent.state)?;
        agent.restart().await?;
    }
    let (_proxy, kubectl) = user(&env, dir.path(), &[&cluster]).await?;
    kubectl.ok(&["get", "pods"]).await?;

    // Without the right to it, or with another's contents, the error has the remedy.
    agent.process.stop(PATIENCE).await?;
    let patch = r#"{"data":{"identity.pem":"bm9uc2Vuc2U="}}"#;
    admin.ok(&["patch", "secret", &name, "-p", patch]).await?;
    std::fs::remove_dir_all(&agent.state)?;
    let damaged = agent.restart().await;
    let said = format!("{:#}", damaged.err().context("it runs on nonsense")?);
    contains(&said, &format!("the Secret {flag} is damaged"))?;
    // The key is nowhere in the logs.
    lacks(&agent.process.log(), "PRIVATE KEY")?;
    Ok(())
}

async fn replicas(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    // Renewed after some 30 s: two thirds of a life that begins a minute earlier.
    let relay =
        throwline_e2e::Relay::start(dir.path(), &["--agent-certificate-life", "75s"]).await?;
    let (admin, name, flag) = secret(&env).await?;
    let cluster = unique("both");
    let token = relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = env.upstream.kubeconfig();
    let arguments = ["--state-secret", &flag];
    let (first, second) = (dir.path().join("a"), dir.path().join("b"));
    std::fs::create_dir_all(&first)?;
    std::fs::create_dir_all(&second)?;
    // Both at once, with one token.
    let (one, two) = tokio::try_join!(
        Agent::start(&first, &cluster, &token, kubeconfig, &arguments),
        Agent::start(&second, &cluster, &token, kubeconfig, &arguments),
    )?;
    tokio::try_join!(one.connected(), two.connected())?;
    let serial = |agent: &Agent| std::fs::read_to_string(agent.state.join("identity.pem"));
    ensure!(serial(&one)? == serial(&two)?, "two identities");
    let before = admin.json(&["get", "secret", &name]).await?["data"]["identity.pem"].clone();
    let began = Instant::now();
    eventually(PATIENCE * 2, "one renews, both have it", || async {
        let now = admin.json(&["get", "secret", &name]).await?["data"]["identity.pem"].clone();
        ensure!(now != before, "not renewed after {:?}", began.elapsed());
        ensure!(serial(&one)? == serial(&two)?, "not yet at the other");
        anyhow::Ok(())
    })
    .await?;
    tokio::try_join!(one.connected(), two.connected())?;
    let both = format!("{}{}", one.process.log(), two.process.log());
    contains(&both, "the agent's certificate was renewed")?;
    contains(&both, "another replica has renewed")?;
    Ok(())
}

async fn readiness(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let template = env.upstream.kubeconfig();
    let way = Way::start(server_of(template)?).await?;
    let cluster = unique("ready");
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = way.kubeconfig(template, dir.path())?;
    let agent = Agent::start(dir.path(), &cluster, &token, &kubeconfig, &[]).await?;
    let ready = || async { metrics::ready(agent.admin).await };
    eventually(PATIENCE, "the agent is ready", ready).await?;

    // Its credentials are not accepted any more.
    let text = std::fs::read_to_string(&kubeconfig)?;
    let mut config: serde_json::Value = serde_norway::from_str(&text)?;
    for user in config["users"].as_array_mut().into_iter().flatten() {
        user["user"] = serde_json::json!({"token": "revoked"});
    }
    let bad = dir.path().join("bad.kubeconfig");
    std::fs::write(&bad, serde_norway::to_string(&config)?)?;
    let stranger = unique("stranger");
    let token = env.relay.token(&["--cluster", &stranger]).await?;
    let refused = Agent::start(dir.path(), &stranger, &token, &bad, &[]).await?;
    refused.connected().await?;
    let says = || async {
        let (status, body) = metrics::get(refused.admin, "/readyz").await?;
        ensure!(status == 503, "{status} {body}");
        contains(&body, "api-server")?;
        contains(&body, "401")
    };
    eventually(PATIENCE, "/readyz names the 401", says).await?;
    Ok(())
}

async fn hangs(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let template = env.upstream.kubeconfig();
    let way = Way::start(server_of(template)?).await?;
    let cluster = unique("hang");
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = way.kubeconfig(template, dir.path())?;
    let agent = Agent::start(dir.path(), &cluster, &token, &kubeconfig, &[]).await?;
    agent.connected().await?;
    let (_proxy, kubectl) = user(&env, dir.path(), &[&cluster]).await?;
    kubectl.ok(&["get", "pods"]).await?;
    way.open.send_replace(false);
    let began = Instant::now();
    let failed = kubectl.run(&["get", "pods"]).await?;
    ensure!(failed.code == Some(1), "{failed:?}");
    contains(&failed.stderr, "API server does not answer")?;
    lacks(&failed.stderr, "keep-alive timed out")?;
    ensure!(
        began.elapsed() < Duration::from_secs(35),
        "{:?}",
        began.elapsed()
    );
    let says = || async {
        let (status, body) = metrics::get(agent.admin, "/readyz").await?;
        ensure!(status == 503, "{status} {body}");
        anyhow::Ok(())
    };
    eventually(PATIENCE, "the agent is not ready", says).await?;
    way.open.send_replace(true);
    let ready = || async { metrics::ready(agent.admin).await };
    eventually(PATIENCE, "the agent is ready again", ready).await?;
    kubectl.ok(&["get", "pods"]).await.map(drop)
}

async fn stopped(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let cluster = unique("stop");
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = env.upstream.kubeconfig();
    let arguments = ["--drain-timeout", "1s"];
    let agent = Agent::start(dir.path(), &cluster, &token, kubeconfig, &arguments).await?;
    agent.connected().await?;
    let (_proxy, kubectl) = user(&env, dir.path(), &[&cluster]).await?;
    let script = format!("echo following; {}", pod::IDLE);
    let pod = Pod::start(&env.upstream, &env.namespace, &script).await?;
    let script = "echo ready; sleep 600";
    let mut exec = kubectl
        .command(&["exec", &pod.name, "--", "sh", "-c", script])
        .stderr(Stdio::piped())
        .spawn()?;
    let mut lines = BufReader::new(exec.stdout.take().context("no output")?).lines();
    ensure!(lines.next_line().await?.as_deref() == Some("ready"));
    let mut logs = kubectl
        .command(&["logs", "-f", &pod.name])
        .stderr(Stdio::piped())
        .spawn()?;
    let mut followed = BufReader::new(logs.stdout.take().context("no output")?).lines();
    ensure!(followed.next_line().await?.as_deref() == Some("following"));
    let began = Instant::now();
    agent.process.stop(PATIENCE).await?;
    ensure!(began.elapsed() >= Duration::from_secs(1), "it did not wait");
    let output = tokio::time::timeout(PATIENCE, exec.wait_with_output()).await??;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success(), "{error}");
    contains(&error, "its agent was stopped")?;
    // Nothing is added to a log; the reason is in HTTP/2's own last frame.
    let output = tokio::time::timeout(PATIENCE, logs.wait_with_output()).await??;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    contains(&error, "its agent was stopped")?;
    lacks(&error, "INTERNAL_ERROR")?;
    ensure!(
        followed.next_line().await?.is_none(),
        "something was added to the log"
    );
    pod.remove().await
}

/// kubectl takes nothing for 12 s, and pings meanwhile, while what it asked for has ended long ago.
async fn slow_reader(env: Arc<Environment>) -> Result<()> {
    const LINES: usize = 1_000_000;
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let script = format!("echo ready; seq 1 {LINES}; exit 7");
    let mut exec = env
        .newest()?
        .command(&["exec", &pod.name, "--", "sh", "-c", &script])
        .spawn()?;
    let mut lines = BufReader::new(exec.stdout.take().context("no output")?).lines();
    ensure!(lines.next_line().await?.as_deref() == Some("ready"));
    // What windows and sockets on the way do not take, the agent does (`ahead.rs` tests how much).
    tokio::time::sleep(Duration::from_secs(12)).await;
    for number in 1..=LINES {
        let line = lines.next_line().await?;
        let line = line.with_context(|| format!("line {number} is missing"))?;
        ensure!(line == number.to_string(), "line {number} is {line}");
    }
    ensure!(lines.next_line().await?.is_none());
    let status = exec.wait().await?;
    ensure!(status.code() == Some(7), "exec ended with {status}");
    let given_back = || async {
        let now = Metrics::of(env.agent.admin).await?;
        ensure!(now.has("throwline_agent_read_ahead_bytes"));
        ensure!(now.sum("throwline_agent_read_ahead_bytes", &[]) == 0.0);
        anyhow::Ok(())
    };
    eventually(
        Duration::from_secs(20),
        "the buffer is given back",
        given_back,
    )
    .await?;
    pod.remove().await
}

async fn another_replica(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let template = env.upstream.kubeconfig();
    let way = Way::start(server_of(template)?).await?;
    let (_admin, _name, flag) = secret(&env).await?;
    let cluster = unique("again");
    let token = env.relay.token(&["--cluster", &cluster]).await?;
    let kubeconfig = way.kubeconfig(template, dir.path())?;
    let arguments = ["--state-secret", &flag];
    let mut agents = Vec::new();
    for replica in ["a", "b"] {
        let dir = dir.path().join(replica);
        std::fs::create_dir_all(&dir)?;
        let agent = Agent::start(&dir, &cluster, &token, &kubeconfig, &arguments).await?;
        agent.connected().await?;
        agents.push(agent);
    }
    let (_proxy, kubectl) = user(&env, dir.path(), &[&cluster]).await?;
    kubectl.ok(&["get", "pods"]).await?;
    // The answer does not begin; meanwhile its agent dies.
    way.open.send_replace(false);
    let asking = tokio::spawn({
        let kubectl = kubectl.clone();
        async move { kubectl.run(&["get", "--raw", "/version"]).await }
    });
    let mut busy = None;
    for agent in &agents {
        let sessions = Metrics::of(agent.admin)
            .await?
            .sum("throwline_agent_sessions", &[]);
        if sessions > 0.0 {
            busy = Some(agent);
        }
    }
    let busy = busy.context("no agent has a session")?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    ensure!(!asking.is_finished(), "it was answered");
    busy.process.kill().await?;
    way.open.send_replace(true);
    let output = asking.await??;
    ensure!(output.code == Some(0), "{output:?}");
    contains(&output.text(), "gitVersion")
}

async fn goodbye(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let relay = throwline_e2e::Relay::start(dir.path(), &[]).await?;
    let token = relay.token(&["--user", "erin"]).await?;
    let erin = User::login(dir.path(), "erin", &token, &[]).await?;
    for _ in 0..5 {
        erin.clusters().await?;
    }
    let listed = || async {
        let log = relay.process.log();
        let down = log
            .lines()
            .filter(|line| line.contains("a carrier is down"));
        ensure!(down.count() >= 5, "{log}");
        lacks(&log, "by the network")
    };
    eventually(PATIENCE, "the relay saw each leave in order", listed).await
}
