//! A set of relays that are replaced and killed under load: requests go on.
//!
//! The size is small by default, and the balancer HAProxy; `cargo xtask fleet` tells the same
//! stories with many clusters and users behind each balancer.

use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use throwline_e2e::fleet::{Fleet, Front, Size};
use throwline_e2e::load::Load;
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::{Agent, Fixture, Suite, User, contains, eventually, metrics};
use tokio::io::AsyncWriteExt;
use tokio::process::Child;

/// How long a thing may take that is there to be waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// The promise: `throwline clusters` knows of a lost carrier within this, where TCP tells.
const KNOWN: Duration = Duration::from_secs(2);
/// The promise: agents are back at two relays within this.
const BACK: Duration = Duration::from_secs(30);
/// The promise: a client of a relay that died succeeds again within this.
const AGAIN: Duration = Duration::from_secs(3);
/// How many of the users run kubectl, beside the raw requests of all.
const KUBECTLS: usize = 3;

fn main() -> ExitCode {
    let minutes = |count: u64| Duration::from_secs(60 * count);
    Suite::new()
        .alone(
            "agents_are_at_two_relays_each",
            minutes(3),
            agents_are_at_two_relays,
        )
        .alone(
            "a_replica_that_dies_takes_its_own_lines_only",
            minutes(3),
            a_replica_dies,
        )
        .alone(
            "clusters_tells_the_truth_in_time",
            minutes(3),
            clusters_tells_the_truth,
        )
        .alone(
            "a_drained_relay_ends_when_all_have_moved",
            minutes(3),
            a_drained_relay_ends,
        )
        .alone(
            "the_database_is_away_under_load",
            minutes(4),
            the_database_is_away,
        )
        .alone(
            "a_rolling_restart_fails_no_request",
            minutes(6),
            a_rolling_restart,
        )
        .alone("a_killed_relay_is_replaced", minutes(4), a_killed_relay)
        .run(fixture)
}

struct Fixtures(Fleet);

async fn fixture() -> Result<Fixtures> {
    let arguments = ["--drain-spread", "2s", "--drain-timeout", "20s"];
    let (size, front) = (Size::from_environment(), Front::from_environment()?);
    println!("  {size:?} behind {front:?}");
    Ok(Fixtures(Fleet::start(size, front, &arguments).await?))
}

impl Fixture for Fixtures {
    fn diagnostics(&self) -> String {
        self.0.logs()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.0.upstream.clean().await }.boxed()
    }
}

async fn agents_are_at_two_relays(fixture: Arc<Fixtures>) -> Result<()> {
    let took = fixture.0.spread_over(2, BACK).await?;
    println!(
        "  {} agents at two relays each after {took:?}",
        fixture.0.agents.len()
    );
    // One that was replaced is let go a moment later.
    eventually(BACK, "each has two carriers", || async {
        let mut carriers = 0.0;
        for relay in &fixture.0.relays {
            let now = relay.lock().await.metrics().await?;
            carriers += now.sum("throwline_relay_carriers", &["role=\"agent\""]);
        }
        let expected = fixture.0.agents.len() * 2;
        ensure!(
            carriers == expected as f64,
            "{carriers} carriers, not {expected}"
        );
        Ok(())
    })
    .await
}

/// Two agents of one cluster share its lines; what goes by one does not depend on the other.
async fn a_replica_dies(fixture: Arc<Fixtures>) -> Result<()> {
    const EXECS: usize = 8;
    let fleet = &fixture.0;
    let replica = fleet.replica(0).await?;
    let first = fleet.agents[0].lock().await;
    let namespace = fleet.upstream.namespace("throwline-e2e-").await?;
    let pod = Pod::start(&fleet.upstream, &namespace, pod::IDLE).await?;
    let upgrades = async |agent: &Agent| {
        let now = metrics::Metrics::of(agent.admin).await?;
        anyhow::Ok(now.sum("throwline_agent_upgrades", &[]))
    };
    // A relay leads lines to the agents that it has itself before those at others, so how they are
    // shared depends on where the users are.
    let mut execs: Vec<Child> = Vec::new();
    for number in 0..EXECS {
        let users = fleet.users_of(0);
        let kubectl = fleet.kubectl(users[number % users.len()], 0).await?;
        let kubectl = kubectl.namespace(&namespace);
        let script = [
            "exec",
            "-i",
            &pod.name,
            "--",
            "sh",
            "-c",
            "read x; echo got-$x",
        ];
        let mut exec = kubectl.command(&script);
        exec.stdin(Stdio::piped()).stdout(Stdio::piped());
        execs.push(exec.kill_on_drop(true).spawn()?);
    }
    let (of_first, of_replica) = eventually(PATIENCE, "all are open", || async {
        let both = (upgrades(&first).await?, upgrades(&replica).await?);
        ensure!(both.0 + both.1 == EXECS as f64, "{both:?}");
        Ok(both)
    })
    .await?;
    println!("  of {EXECS} execs, {of_first} go by one agent and {of_replica} by the other");
    replica.process.kill().await?;
    let mut whole = 0.0;
    for mut exec in execs {
        let mut stdin = exec.stdin.take().context("no input")?;
        // Whose agent has died may not take it any more.
        let _ = stdin.write_all(b"ahoy\n").await;
        drop(stdin);
        let output = tokio::time::timeout(PATIENCE, exec.wait_with_output()).await??;
        if output.status.success() {
            contains(&String::from_utf8_lossy(&output.stdout), "got-ahoy")?;
            whole += 1.0;
        }
    }
    ensure!(whole == of_first, "{whole} of {of_first} went on");
    fleet
        .kubectl(fleet.users_of(0)[0], 0)
        .await?
        .ok(&["get", "namespaces"])
        .await?;
    pod.remove().await
}

/// Where TCP tells of an agent's end, every relay knows within two seconds, and of its return.
async fn clusters_tells_the_truth(fixture: Arc<Fixtures>) -> Result<()> {
    let fleet = &fixture.0;
    let connected = async |user: &User| {
        let listed = user.clusters().await?;
        let mut all = listed.as_array().context("no list")?.iter();
        let entry = all.find(|entry| entry["name"] == "cluster-0");
        let entry = entry.with_context(|| format!("{listed}"))?;
        entry["connected"].as_bool().context("not said")
    };
    let mut agent = fleet.agents[0].lock().await;
    let mut slowest = Duration::ZERO;
    // Each asks the relay to which the balancer leads it, and there are as many as relays.
    for user in fleet.users.iter().take(fleet.relays.len()) {
        ensure!(connected(user).await?, "it is not connected");
        agent.process.kill().await?;
        let killed = Instant::now();
        eventually(PATIENCE, "it is known", || async {
            ensure!(!connected(user).await?, "it is still connected");
            Ok(())
        })
        .await?;
        slowest = slowest.max(killed.elapsed());
        agent.restart().await?;
        eventually(KNOWN, "its return is known", || async {
            ensure!(connected(user).await?, "it is not connected");
            Ok(())
        })
        .await?;
    }
    println!("  the end of an agent was told after {slowest:?}");
    ensure!(slowest <= KNOWN, "it took {slowest:?}");
    drop(agent);
    fleet.spread_over(2, BACK).await.map(drop)
}

/// `POST /drain`: unready at once, empty soon, ended by itself.
async fn a_drained_relay_ends(fixture: Arc<Fixtures>) -> Result<()> {
    let fleet = &fixture.0;
    let load = Load::start(fleet, 1).await?;
    load.all_succeed(PATIENCE).await?;
    let mut relay = fleet.relays[0].lock().await;
    let began = Instant::now();
    relay.drain().await?;
    let (status, body) = metrics::get(relay.admin, "/readyz").await?;
    ensure!(
        status == 503 && body.contains("draining"),
        "{status} {body}"
    );
    let ended = relay.process.ended(PATIENCE).await?;
    ensure!(ended.success(), "{ended}");
    println!("  the relay was empty after {:?}", began.elapsed());
    let log = relay.process.log();
    ensure!(!log.contains("cut lines"), "lines were cut:\n{log}");
    fleet.spread_over(2, BACK).await?;
    relay.restart().await?;
    load.all_succeed(PATIENCE).await?;
    let done = load.stop().await?;
    println!("  {}", done.line());
    done.none_failed()
}

/// Case 24: what goes on goes on, and all is well by itself when the database is back.
async fn the_database_is_away(fixture: Arc<Fixtures>) -> Result<()> {
    let fleet = &fixture.0;
    let load = Load::start(fleet, KUBECTLS).await?;
    load.all_succeed(PATIENCE).await?;
    let mut database = fleet.database.lock().await;
    let address = database.address();
    database.stop().await?;
    let outage = outage();
    tokio::time::sleep(outage).await;
    load.all_succeed(PATIENCE).await?;
    database.start_at(address).await?;
    for relay in &fleet.relays {
        let relay = relay.lock().await;
        eventually(PATIENCE, "a relay is back at the database", || async {
            let now = relay.metrics().await?;
            ensure!(now.sum("throwline_relay_database_up", &[]) == 1.0);
            ensure!(now.sum("throwline_relay_database_owed_writes", &[]) == 0.0);
            Ok(())
        })
        .await?;
    }
    load.all_succeed(PATIENCE).await?;
    let done = load.stop().await?;
    println!("  the database away for {outage:?}: {}", done.line());
    done.none_failed()
}

/// How long it is away: `THROWLINE_E2E_OUTAGE` in seconds, else longer than a heartbeat.
fn outage() -> Duration {
    let told = std::env::var("THROWLINE_E2E_OUTAGE").ok();
    let seconds = told.and_then(|text| text.parse().ok()).unwrap_or(8);
    Duration::from_secs(seconds)
}

async fn a_rolling_restart(fixture: Arc<Fixtures>) -> Result<()> {
    let fleet = &fixture.0;
    fleet.spread_over(2, BACK).await?;
    let load = Load::start(fleet, KUBECTLS).await?;
    load.all_succeed(PATIENCE).await?;
    for relay in &fleet.relays {
        let mut relay = relay.lock().await;
        let began = Instant::now();
        let ended = relay.process.stop(PATIENCE).await?;
        ensure!(ended.success(), "{ended}");
        println!("  a relay was empty after {:?}", began.elapsed());
        relay.restart().await?;
        drop(relay);
        fleet.spread_over(2, BACK).await?;
    }
    load.all_succeed(PATIENCE).await?;
    let done = load.stop().await?;
    println!(
        "  rolling restart of {} relays: {}",
        fleet.relays.len(),
        done.line()
    );
    done.none_failed()
}

async fn a_killed_relay(fixture: Arc<Fixtures>) -> Result<()> {
    let fleet = &fixture.0;
    fleet.spread_over(2, BACK).await?;
    let load = Load::start(fleet, KUBECTLS).await?;
    load.all_succeed(PATIENCE).await?;
    let before = load.failures().len();
    ensure!(before == 0, "{before} failures before anything happened");
    let mut relay = fleet.relays[1].lock().await;
    relay.process.kill().await?;
    let killed = Instant::now();
    let slowest = load.all_succeed(PATIENCE).await?;
    ensure!(
        slowest <= AGAIN,
        "a request failed {slowest:?} after the kill"
    );
    let back = fleet.spread_over(2, BACK).await?;
    println!(
        "  kill -9: the last failure came {slowest:?} after it, agents were back at two relays after {back:?} more"
    );
    relay.restart().await?;
    eventually(PATIENCE, "the relay knows the others", || async {
        let now = relay.metrics().await?;
        ensure!(now.sum("throwline_relay_remote_tunnels", &[]) >= 1.0);
        Ok(())
    })
    .await?;
    load.all_succeed(PATIENCE).await?;
    let done = load.stop().await?;
    // Only what was under way at that moment, or was waiting for the same dead relay.
    let late: Vec<&str> = done
        .failed
        .iter()
        .filter(|failed| failed.at > killed + AGAIN)
        .map(|failed| failed.why.as_str())
        .collect();
    ensure!(late.is_empty(), "{late:?}");
    println!("  {}", done.line());
    Ok(())
}
