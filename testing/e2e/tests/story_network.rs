//! What the network and the machine do to a relay and an agent: a link that goes dead without a
//! word, no descriptors left.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use throwline_e2e::environment::{USER, no_cluster, private_dir, throwline, write_secret};
use throwline_e2e::namespace::Namespace;
use throwline_e2e::{
    Agent, Process, Relay, Suite, User, contains, eventually, free_address, metrics, tools,
};
use tokio::net::TcpStream;
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(60);
/// The promise: both ends know of a dead link within this.
const KNOWN: Duration = Duration::from_secs(60);
const CLUSTER: &str = "far";

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone("a_link_that_goes_dead", minutes(4), |_| {
            a_link_that_goes_dead()
        })
        .alone("a_relay_without_descriptors", minutes(3), |_| {
            a_relay_without_descriptors()
        })
        .run(|| async { Ok(()) })
}

/// Case 9: packets vanish, and no connection is closed.
async fn a_link_that_goes_dead() -> Result<()> {
    let dir = private_dir()?;
    let there = Namespace::new().await?;
    let listen = SocketAddr::new(there.address.into(), free_address()?.port());
    let relay = Relay::at(dir.path(), listen, &format!("https://{listen}"), &[]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    let token_file = dir.path().join("token");
    write_secret(&token_file, &token)?;
    let token = relay.token(&["--user", USER]).await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    let kubeconfig = no_cluster(dir.path())?;

    let agent = throwline(&dir.path().join("home"))?;
    let mut agent = there.inside(agent.as_std());
    agent.arg("agent").arg("--token-file").arg(&token_file);
    agent.arg("--state-dir").arg(dir.path().join("agent-state"));
    agent.arg("--kubeconfig").arg(&kubeconfig);
    agent.args(["--cluster-uid", "uid-of-nobody"]);
    let agent = Process::start("agent", dir.path(), agent)?;
    let carriers = || async {
        agent.check_running().await?;
        let now = relay.metrics().await?;
        anyhow::Ok(now.sum("throwline_relay_carriers", &["role=\"agent\""]))
    };
    eventually(PATIENCE, "the agent is connected", || async {
        ensure!(carriers().await? == 1.0);
        Ok(())
    })
    .await?;

    let listed = user.clusters().await?;
    ensure!(listed[0]["connected"] == true, "{listed}");
    there.link("down").await?;
    let cut = Instant::now();
    eventually(KNOWN, "the relay has taken the route out", || async {
        ensure!(carriers().await? == 0.0);
        Ok(())
    })
    .await?;
    println!("  the relay knew after {:?}", cut.elapsed());
    let listed = user.clusters().await?;
    ensure!(listed[0]["connected"] == false, "{listed}");
    ensure!(cut.elapsed() <= KNOWN, "`clusters` told the truth too late");
    let left = KNOWN.saturating_sub(cut.elapsed());
    eventually(left, "the agent knows", || async {
        contains(&agent.log(), "the carrier to the relay was lost")
    })
    .await?;
    println!("  both knew after {:?}", cut.elapsed());

    there.link("up").await?;
    eventually(PATIENCE, "the agent is back by itself", || async {
        ensure!(carriers().await? == 1.0);
        Ok(())
    })
    .await
}

/// Case 25: strangers hold every descriptor; the admin listener answers, and an agent joins.
async fn a_relay_without_descriptors() -> Result<()> {
    const MOST: u64 = 96;
    let dir = private_dir()?;
    let relay = Relay::start(dir.path(), &[]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    limit_descriptors(relay.process.pid(), MOST).await?;

    let strangers: Vec<TcpStream> =
        try_join_all((0..2 * MOST).map(|_| TcpStream::connect(relay.listen))).await?;
    eventually(PATIENCE, "the relay has run out of descriptors", || async {
        // Its own listener is the first witness: it answers meanwhile, or soon.
        let now = relay.metrics().await?;
        ensure!(now.sum("throwline_relay_accept_errors_total", &[]) > 0.0);
        Ok(())
    })
    .await?;
    let (status, _) = eventually(PATIENCE, "the admin listener answers", || async {
        metrics::get(relay.admin, "/healthz").await
    })
    .await?;
    ensure!(status == 200, "{status}");
    let kubeconfig = no_cluster(dir.path())?;
    let agent = Agent::start(dir.path(), CLUSTER, &token, &kubeconfig, &[]).await?;
    agent.connected().await?;
    drop(strangers);
    let after = relay.metrics().await?;
    ensure!(after.sum("throwline_relay_half_open_shed_total", &[]) > 0.0);
    contains(&relay.process.log(), "cannot accept connections")
}

async fn limit_descriptors(pid: u32, most: u64) -> Result<()> {
    let limit = format!("--nofile={most}:{most}");
    let output = Command::new(tools::find("prlimit")?)
        .args(["--pid", &pid.to_string(), &limit])
        .output()
        .await
        .context("prlimit")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "prlimit: {error}");
    Ok(())
}
