//! Through a real nginx that ends TLS and cuts what is silent.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use throwline_e2e::environment::{CLUSTER, USER, private_dir, said, tail, write_secret};
use throwline_e2e::nginx::Nginx;
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Fixture, Kubectl, Proxy, Relay, Suite, User, contains, eventually, free_address, tools,
    unique,
};
use tokio::io::{AsyncBufReadExt, BufReader};

fn main() -> ExitCode {
    Suite::new()
        .story(
            "a_watch_that_is_quiet_for_30_s_still_delivers",
            a_quiet_watch,
        )
        .story(
            "an_exec_that_is_quiet_for_30_s_still_ends_well",
            a_quiet_exec,
        )
        .story("small_commands_pass", small_commands_pass)
        .story("without_the_balancers_ca_login_is_refused", without_the_ca)
        .run(Balanced::start)
}

/// What nginx lets be silent, and how often we speak.
const IDLE_SECONDS: u32 = 5;
const PING: &str = "2s";
const QUIET: Duration = Duration::from_secs(30);

struct Balanced {
    proxy: Proxy,
    agent: Agent,
    relay: Relay,
    nginx: Nginx,
    upstream: Upstream,
    namespace: String,
    dir: tempfile::TempDir,
}

impl Balanced {
    async fn start() -> Result<Self> {
        let dir = private_dir()?;
        let upstream = Upstream::start(dir.path()).await?;
        let (front, back) = (free_address()?, free_address()?);
        let nginx = Nginx::start(dir.path(), front, back, IDLE_SECONDS).await?;
        let url = format!("https://localhost:{}", front.port());
        let relay = Relay::at(
            dir.path(),
            back,
            &url,
            &["--plaintext", "--ping-interval", PING],
        )
        .await?;
        let ca_file = nginx.ca_file.display().to_string();
        let ca = ["--ca-file", ca_file.as_str()];
        let token = relay.token(&["--cluster", CLUSTER]).await?;
        let agent = Agent::start(dir.path(), CLUSTER, &token, upstream.kubeconfig(), &ca).await?;
        agent.connected().await?;
        let token = relay
            .token(&["--user", USER, "--group", upstream.group()])
            .await?;
        let user = User::login(dir.path(), USER, &token, &ca).await?;
        let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
        let namespace = upstream.namespace("throwline-e2e-").await?;
        Ok(Self {
            proxy,
            agent,
            relay,
            nginx,
            upstream,
            namespace,
            dir,
        })
    }

    fn kubectl(&self) -> Result<Kubectl> {
        Ok(Kubectl::new(
            &tools::newest_kubectl()?,
            &self.proxy.kubeconfig,
            self.dir.path(),
        )
        .context(&format!("throwline-{CLUSTER}"))
        .namespace(&self.namespace))
    }

    /// How often a carrier was let in so far: once each, unless one was lost.
    async fn carriers_accepted(&self) -> Result<f64> {
        let name = "throwline_relay_handshakes_total";
        let metrics = self.relay.metrics().await?;
        ensure!(metrics.has(name), "no {name}: {}", metrics.text());
        Ok(metrics.sum(name, &["accepted"]))
    }
}

impl Fixture for Balanced {
    fn diagnostics(&self) -> String {
        let processes = [
            &self.proxy.process,
            &self.relay.process,
            &self.agent.process,
            &self.nginx.process,
        ];
        processes
            .map(|process| tail(process.name(), &process.log()))
            .concat()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.upstream.clean().await }.boxed()
    }
}

async fn a_quiet_watch(fixture: Arc<Balanced>) -> Result<()> {
    let (kubectl, admin) = (
        fixture.kubectl()?,
        fixture.upstream.admin()?.namespace(&fixture.namespace),
    );
    let arguments = ["get", "secrets", "-w", "-o", "name"];
    let mut child = kubectl
        .command(&arguments)
        .stderr(Stdio::inherit())
        .spawn()?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let (before, after) = (unique("before-"), unique("after-"));
    admin.ok(&["create", "secret", "generic", &before]).await?;
    let mut next = async |name: String| -> Result<()> {
        let read = async {
            while let Some(line) = lines.next_line().await? {
                if line.contains(&name) {
                    return Ok(());
                }
            }
            anyhow::bail!("the watch ended")
        };
        tokio::time::timeout(Duration::from_secs(10), read)
            .await
            .context("nothing came")?
    };
    next(before).await.context("the watch does not work")?;
    let accepted = fixture.carriers_accepted().await?;
    // The silence is what is tested: several times what nginx bears.
    tokio::time::sleep(QUIET).await;
    admin.ok(&["create", "secret", "generic", &after]).await?;
    next(after).await.context("after the silence")?;
    ensure!(child.try_wait()?.is_none(), "the watch ended");
    let now = fixture.carriers_accepted().await?;
    ensure!(
        now == accepted,
        "a carrier was lost and replaced in the silence"
    );
    child.kill().await?;
    Ok(())
}

async fn a_quiet_exec(fixture: Arc<Balanced>) -> Result<()> {
    let pod = Pod::start(&fixture.upstream, &fixture.namespace, pod::IDLE).await?;
    let kubectl = fixture.kubectl()?;
    let script = format!("echo begin; sleep {}; echo end; exit 3", QUIET.as_secs());
    let output = kubectl
        .run(&["exec", &pod.name, "--", "sh", "-c", &script])
        .await?;
    ensure!(
        output.text() == "begin\nend\n" && output.code == Some(3),
        "{output:?}"
    );
    pod.remove().await
}

async fn small_commands_pass(fixture: Arc<Balanced>) -> Result<()> {
    let kubectl = fixture.kubectl()?;
    for number in 0..10 {
        let name = format!("small-{number}");
        kubectl.ok(&["create", "configmap", &name]).await?;
        kubectl.ok(&["get", "configmap", &name]).await?;
        kubectl.ok(&["delete", "configmap", &name]).await?;
    }
    let accesses = || async { contains(&fixture.nginx.accesses(), "/v1/enroll") };
    eventually(
        Duration::from_secs(5),
        "it all went through nginx",
        accesses,
    )
    .await
}

async fn without_the_ca(fixture: Arc<Balanced>) -> Result<()> {
    let token = fixture.relay.token(&["--user", "eve"]).await?;
    let user = User::nobody(fixture.dir.path(), "eve")?;
    let file = fixture.dir.path().join("eve.token");
    write_secret(&file, &token)?;
    let file = file.display().to_string();
    let output = user.run(&["login", "--token-file", &file]).await?;
    ensure!(output.status.code() == Some(1), "{}", said(&output));
    let said = said(&output);
    throwline_e2e::lacks(&said, &token)?;
    ensure!(
        said.contains("--ca-file") || said.contains("certificate"),
        "not clear: {said}"
    );
    // The token was not used up by the refusal.
    let ca_file = fixture.nginx.ca_file.display().to_string();
    let output = user
        .run(&["login", "--token-file", &file, "--ca-file", &ca_file])
        .await?;
    ensure!(
        output.status.success(),
        "{}",
        throwline_e2e::environment::said(&output)
    );
    Ok(())
}
