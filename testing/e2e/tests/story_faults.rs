//! Each fault has a clear, distinct message and leaves nothing behind.

use std::os::unix::fs::PermissionsExt;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use rustix::process::Signal;
use throwline_e2e::backend::Backend;
use throwline_e2e::client::Target;
use throwline_e2e::environment::{Builder, CLUSTER, private_dir, said};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{
    Agent, Environment, Kubectl, Proxy, Relay, Suite, User, contains, eventually, lacks, tools,
    unique,
};
use tokio::io::AsyncReadExt;

fn main() -> ExitCode {
    let limit = Duration::from_secs(180);
    Suite::new()
        .story("an_unknown_cluster", an_unknown_cluster)
        .story("not_signed_in", not_signed_in)
        .story("a_token_is_good_once", a_token_is_good_once)
        .story("a_damaged_token", a_damaged_token)
        .story("the_wrong_authority", the_wrong_authority)
        .story("an_expired_certificate", an_expired_certificate)
        .story("a_busy_port_is_stepped_over", a_busy_port_is_stepped_over)
        .story("an_unwritable_kubeconfig", an_unwritable_kubeconfig)
        .story("a_broken_kubeconfig_is_left_as_it_is", a_broken_kubeconfig)
        .story(
            "an_agent_without_an_api_server",
            an_agent_without_an_api_server,
        )
        .story("a_cut_answer_is_an_error_not_a_short_success", a_cut_answer)
        .alone(
            "kubectl_killed_in_mid_exec_leaves_nothing",
            limit,
            kubectl_killed,
        )
        .alone("a_cluster_whose_agent_is_offline", limit, an_offline_agent)
        .alone(
            "a_relay_killed_during_logs_and_cp_is_never_a_short_success",
            limit,
            a_killed_relay,
        )
        .alone(
            "a_relay_that_is_down_and_comes_back",
            limit,
            a_relay_that_comes_back,
        )
        .alone("everything_stops_on_sigterm", limit, everything_stops)
        .run(Environment::start)
}

/// A kubectl with the environment's kubeconfig and another context.
fn elsewhere(proxy: &Proxy, dir: &std::path::Path, cluster: &str) -> Result<Kubectl> {
    Ok(
        Kubectl::new(&tools::newest_kubectl()?, &proxy.kubeconfig, dir)
            .context(&format!("throwline-{cluster}")),
    )
}

async fn an_unknown_cluster(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--user", "ulla"]).await?;
    let user = User::login(dir.path(), "ulla", &token, &[]).await?;
    // Saying so at once, or to kubectl: either is clear.
    match Proxy::start(&user, &["nowhere"], &[]).await {
        Ok(proxy) => {
            let refused = elsewhere(&proxy, dir.path(), "nowhere")?
                .fails(&["get", "pods"])
                .await?;
            contains(&refused.stderr, "nowhere")?;
            contains(&refused.stderr, "no cluster")?;
        }
        Err(error) => contains(&format!("{error:?}"), "nowhere")?,
    }
    Ok(())
}

async fn not_signed_in(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let user = User::nobody(dir.path(), "nobody")?;
    for arguments in [&["clusters"][..], &["proxy"]] {
        let output = user.run(arguments).await?;
        ensure!(
            output.status.code() == Some(1),
            "{arguments:?}: {}",
            said(&output)
        );
        contains(&said(&output), "throwline login")?;
    }
    Ok(())
}

async fn a_token_is_good_once(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--user", "twice"]).await?;
    User::login(dir.path(), "first", &token, &[]).await?;
    let second = User::login(dir.path(), "second", &token, &[]).await;
    let error = format!("{:#}", second.err().context("a token was redeemed twice")?);
    contains(&error, "redeemed before")?;
    lacks(&error, &token)?;
    let short = env.relay.token(&["--user", "late", "--ttl", "1s"]).await?;
    let expired = || async {
        let user = User::login(dir.path(), &unique("late"), &short, &[]).await;
        let error = format!("{:#}", user.err().context("redeemed")?);
        contains(&error, "expired")
    };
    tokio::time::sleep(Duration::from_secs(2)).await;
    expired().await
}

async fn a_damaged_token(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    for token in ["", "hello", "tl1.", "tl1.AAAA", "tl9.AAAA"] {
        let user = User::login(dir.path(), &unique("d"), token, &[]).await;
        let error = format!(
            "{:#}",
            user.err().with_context(|| format!("{token:?} was taken"))?
        );
        contains(&error, "token")?;
        lacks(&error, "panicked")?;
    }
    Ok(())
}

/// A token of one relay, at another that answers on the same address.
async fn the_wrong_authority(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let first = Relay::start(&dir.path().join("first"), &[]).await?;
    let token = first.token(&["--user", "wrong"]).await?;
    first.process.stop(Duration::from_secs(20)).await?;
    let other = Relay::at(
        &dir.path().join("other"),
        first.listen,
        &first.public_url,
        &[],
    )
    .await?;
    let user = User::login(dir.path(), "wrong", &token, &[]).await;
    let error = format!("{:#}", user.err().context("another authority was trusted")?);
    lacks(&error, &token)?;
    contains(&error.to_lowercase(), "authority")
        .or_else(|_| contains(&error.to_lowercase(), "pin"))
        .or_else(|_| contains(&error.to_lowercase(), "certificate"))?;
    other.process.check_running().await
}

async fn an_expired_certificate(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let relay = Relay::start(dir.path(), &["--user-certificate-life", "2s"]).await?;
    let token = relay.token(&["--user", "brief"]).await?;
    let user = User::login(dir.path(), "brief", &token, &[]).await?;
    let expired = || async {
        let output = user.run(&["clusters"]).await?;
        ensure!(
            output.status.code() == Some(1),
            "not refused: {}",
            said(&output)
        );
        contains(&said(&output), "expired")?;
        contains(&said(&output), "throwline login")
    };
    eventually(
        Duration::from_secs(90),
        "the certificate has expired",
        expired,
    )
    .await
}

async fn a_busy_port_is_stepped_over(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env
        .relay
        .token(&["--user", "busy", "--group", env.upstream.group()])
        .await?;
    let user = User::login(dir.path(), "busy", &token, &[]).await?;
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0))?;
    let port = taken.local_addr()?.port().to_string();
    let kubeconfig = dir.path().join("kubeconfig");
    let file = kubeconfig.display().to_string();
    let mut command = user.command(&["proxy", CLUSTER, "--port", &port, "--kubeconfig", &file])?;
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let written = || async {
        let target = Target::read(&kubeconfig, &format!("throwline-{CLUSTER}"))?;
        ensure!(
            !target.address.ends_with(&format!(":{port}")),
            "{}",
            target.address
        );
        target.get("/version", &[]).await
    };
    let (code, answer) =
        eventually(Duration::from_secs(20), "another port serves", written).await?;
    ensure!(code == 200, "{answer}");
    child.kill().await?;
    Ok(())
}

async fn an_unwritable_kubeconfig(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--user", "unwritable"]).await?;
    let user = User::login(dir.path(), "unwritable", &token, &[]).await?;
    // Below a file there can be no directory, not even for root.
    let file = dir.path().join("a-file");
    std::fs::write(&file, "")?;
    let kubeconfig = file.join("kubeconfig").display().to_string();
    let output = user
        .run(&["proxy", CLUSTER, "--kubeconfig", &kubeconfig])
        .await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    contains(&said(&output), &kubeconfig)
}

async fn a_broken_kubeconfig(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let token = env.relay.token(&["--user", "broken"]).await?;
    let user = User::login(dir.path(), "broken", &token, &[]).await?;
    let kubeconfig = dir.path().join("kubeconfig");
    let broken = "apiVersion: v1\nclusters: [{{{ not yaml\n";
    std::fs::write(&kubeconfig, broken)?;
    let file = kubeconfig.display().to_string();
    let output = user.run(&["proxy", CLUSTER, "--kubeconfig", &file]).await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    contains(&said(&output), &file)?;
    ensure!(
        std::fs::read_to_string(&kubeconfig)? == broken,
        "it was changed"
    );
    // One that can be read keeps all that is not ours, and its rights.
    let foreign = "apiVersion: v1\nkind: Config\ncurrent-context: mine\nx-unknown: {kept: true}\n\
                   contexts:\n- name: mine\n  context: {cluster: mine, user: mine}\n";
    std::fs::write(&kubeconfig, foreign)?;
    std::fs::set_permissions(&kubeconfig, std::fs::Permissions::from_mode(0o600))?;
    let mut command = user.command(&["proxy", CLUSTER, "--kubeconfig", &file])?;
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let written = || async {
        contains(
            &std::fs::read_to_string(&kubeconfig)?,
            &format!("throwline-{CLUSTER}"),
        )
    };
    eventually(Duration::from_secs(20), "our context is there", written).await?;
    child.kill().await?;
    let text = std::fs::read_to_string(&kubeconfig)?;
    let config: serde_json::Value = serde_norway::from_str(&text)?;
    ensure!(config["current-context"] == "mine", "{text}");
    ensure!(config["x-unknown"]["kept"] == true, "{text}");
    ensure!(
        config["contexts"]
            .as_array()
            .is_some_and(|all| all.len() == 2),
        "{text}"
    );
    ensure!(std::fs::metadata(&kubeconfig)?.permissions().mode() & 0o777 == 0o600);
    Ok(())
}

async fn an_agent_without_an_api_server(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let kubeconfig = backend.kubeconfig.clone();
    // There is no listener from now on.
    drop(backend);
    let name = unique("gone-");
    let token = env.relay.token(&["--cluster", &name]).await?;
    let agent = Agent::start(dir.path(), &name, &token, &kubeconfig, &[]).await?;
    let token = env
        .relay
        .token(&["--user", "gone", "--group", env.upstream.group()])
        .await?;
    let user = User::login(dir.path(), "gone", &token, &[]).await?;
    let proxy = Proxy::start(&user, &[&name], &[]).await?;
    let kubectl = elsewhere(&proxy, dir.path(), &name)?;
    let clear = || async {
        // With discovery, of which kubectl keeps less, and without it.
        for arguments in [&["get", "nodes"][..], &["get", "--raw", "/api/v1/nodes"]] {
            let refused = kubectl.fails(arguments).await?;
            contains(&refused.stderr.to_lowercase(), "api server")?;
        }
        Ok(())
    };
    eventually(
        Duration::from_secs(30),
        "the error names the API server",
        clear,
    )
    .await?;
    agent.process.check_running().await
}

/// Case 8 for the API session: the answer breaks off in the middle.
async fn a_cut_answer(_: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let env = Builder::default()
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    let kubectl = env.newest()?;
    let whole = kubectl.ok(&["get", "--raw", "/test/bytes/3000000"]).await?;
    ensure!(whole.trim_end().len() == 3_000_000, "{} bytes", whole.len());
    for length in [0, 1, 100_000, 3_000_000] {
        let path = format!("/test/cut/{length}");
        let cut = kubectl.run(&["get", "--raw", &path]).await?;
        ensure!(
            cut.code.is_some_and(|code| code != 0),
            "cut at {length}: a short success"
        );
    }
    throwline_e2e::Fixture::close(&env).await
}

/// What the three processes hold that an ended kubectl must give back.
async fn held(env: &Environment) -> Result<(usize, f64)> {
    let mut descriptors = 0;
    for process in env.processes() {
        descriptors += process.descriptors()?;
    }
    let lines = env.relay.metrics().await?.sum("throwline_relay_lines", &[]);
    Ok((descriptors, lines))
}

async fn kubectl_killed(env: Arc<Environment>) -> Result<()> {
    let pod = Pod::start(&env.upstream, &env.namespace, pod::IDLE).await?;
    let kubectl = env.newest()?;
    // The API session, its connections and a spare are warm before the baseline is taken.
    for _ in 0..3 {
        kubectl.ok(&["exec", &pod.name, "--", "true"]).await?;
    }
    let settle = || async {
        let first = held(&env).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let second = held(&env).await?;
        ensure!(first == second, "{first:?} became {second:?}");
        Ok(first)
    };
    let before = eventually(Duration::from_secs(30), "it is quiet", settle).await?;
    let marker = unique("/tmp/throwline-e2e-");
    let script = format!("echo started; sleep 300; echo never > {marker}");
    let killed = (0..8).map(|_| async {
        let mut child = kubectl
            .command(&["exec", &pod.name, "--", "sh", "-c", &script])
            .spawn()?;
        let mut byte = [0; 7];
        child
            .stdout
            .take()
            .context("no output")?
            .read_exact(&mut byte)
            .await?;
        child.kill().await?;
        anyhow::Ok(())
    });
    try_join_all(killed).await?;
    let back = || async {
        let (descriptors, lines) = held(&env).await?;
        // Two more descriptors than before: a connection may be pooled that was not then.
        ensure!(
            descriptors <= before.0 + 6,
            "{descriptors} descriptors after {}",
            before.0
        );
        ensure!(lines <= before.1 + 1.0, "{lines} lines after {}", before.1);
        Ok(())
    };
    eventually(Duration::from_secs(60), "all is given back", back).await?;
    pod.remove().await
}

async fn an_offline_agent(env: Arc<Environment>) -> Result<()> {
    let dir = private_dir()?;
    let name = unique("off-");
    let token = env.relay.token(&["--cluster", &name]).await?;
    let mut agent = Agent::start(dir.path(), &name, &token, env.upstream.kubeconfig(), &[]).await?;
    agent.connected().await?;
    let token = env
        .relay
        .token(&["--user", "off", "--group", env.upstream.group()])
        .await?;
    let user = User::login(dir.path(), "off", &token, &[]).await?;
    let proxy = Proxy::start(&user, &[&name], &[]).await?;
    let kubectl = elsewhere(&proxy, dir.path(), &name)?;
    kubectl.ok(&["get", "namespaces"]).await?;
    agent.process.kill().await?;
    let offline = || async {
        let refused = kubectl.fails(&["get", "namespaces"]).await?;
        contains(&refused.stderr, "offline")?;
        contains(&refused.stderr, &name)
    };
    eventually(Duration::from_secs(30), "kubectl says it", offline).await?;
    let listed = user.clusters().await?;
    let entry = listed
        .as_array()
        .and_then(|all| all.iter().find(|entry| entry["name"] == name.as_str()));
    let entry = entry.with_context(|| format!("{listed}"))?;
    ensure!(
        entry["connected"] == false && entry["since"].is_string(),
        "{entry}"
    );
    agent.restart().await?;
    let served = || async { kubectl.ok(&["get", "namespaces"]).await };
    eventually(Duration::from_secs(60), "it serves again", served).await?;
    Ok(())
}

/// Case 8 for upgraded requests: the relay dies in the middle of `logs -f`, of exec, of `cp`.
async fn a_killed_relay(_: Arc<Environment>) -> Result<()> {
    // The relay stays away for longer than a line may wait for it.
    let mut env = Builder::default()
        .proxy_arguments(&["--detached-life", "3s"])
        .start()
        .await?;
    let kubectl = env.newest()?;
    let pod = Pod::start(
        &env.upstream,
        &env.namespace,
        "i=0; while :; do echo $i; i=$((i+1)); sleep 0.1; done",
    )
    .await?;
    let endless = "while :; do echo more; sleep 0.1; done";
    let mut running = Vec::new();
    for arguments in [
        &["logs", "-f", pod.name.as_str()][..],
        &["exec", &pod.name, "--", "sh", "-c", endless],
        // What `cp` runs: a stream of bytes as fast as it goes.
        &["exec", &pod.name, "--", "cat", "/dev/zero"],
    ] {
        let mut child = kubectl.command(arguments).spawn()?;
        let mut stdout = child.stdout.take().context("no output")?;
        let mut first = [0; 2];
        let read = tokio::time::timeout(Duration::from_secs(20), stdout.read_exact(&mut first));
        read.await
            .with_context(|| format!("{arguments:?} prints nothing"))??;
        tokio::spawn(async move { tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await });
        running.push((arguments[0].to_owned(), child));
    }
    env.relay.process.kill().await?;
    for (what, mut child) in running {
        let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
        let status = ended.with_context(|| format!("{what} hangs"))??;
        ensure!(!status.success(), "{what} was cut and exited with {status}");
    }
    env.relay.restart().await?;
    let served = || async { kubectl.ok(&["get", "namespaces"]).await };
    eventually(Duration::from_secs(90), "it serves again", served).await?;
    pod.remove().await?;
    throwline_e2e::Fixture::close(&env).await
}

async fn a_relay_that_comes_back(_: Arc<Environment>) -> Result<()> {
    let mut env = Environment::start().await?;
    let kubectl = env.newest()?;
    kubectl.ok(&["get", "namespaces"]).await?;
    env.relay.process.stop(Duration::from_secs(40)).await?;
    let down = || async {
        let refused = kubectl.fails(&["get", "namespaces"]).await?;
        contains(&refused.stderr, "relay")
    };
    eventually(Duration::from_secs(30), "kubectl names the relay", down).await?;
    let output = env.user.run(&["clusters"]).await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    contains(&said(&output), "relay")?;
    env.relay.restart().await?;
    let served = || async { kubectl.ok(&["get", "namespaces"]).await };
    eventually(Duration::from_secs(90), "it serves again", served).await?;
    throwline_e2e::Fixture::close(&env).await
}

async fn everything_stops(_: Arc<Environment>) -> Result<()> {
    let env = Environment::start().await?;
    env.newest()?.ok(&["get", "namespaces"]).await?;
    throwline_e2e::Fixture::close(&env).await?;
    for process in env.processes() {
        process.signal(Signal::TERM);
        let status = process.ended(Duration::from_secs(30)).await?;
        ensure!(
            status.success(),
            "{} ended with {status}: {}",
            process.name(),
            process.log()
        );
        lacks(&process.log(), "panicked")?;
        // The proxy, which goes first, has ended its sessions: the agent waits for none.
        lacks(&process.log(), "sessions are cut off")?;
    }
    // A kubectl whose proxy has gone gets a connection refused, not a hang.
    let refused = env.newest()?.fails(&["get", "namespaces"]).await?;
    contains(&refused.stderr, "refused")?;
    Ok(())
}
