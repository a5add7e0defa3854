//! A set of relays that are replaced and killed under load: requests go on.
//!
//! The size is small by default; `cargo xtask soak` tells the same stories with many clusters and
//! users.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures::future::{BoxFuture, FutureExt};
use throwline_e2e::fleet::{Fleet, Load, Size};
use throwline_e2e::forwarder::Forwarder;
use throwline_e2e::{Stage, Suite, eventually, metrics};

/// How long a thing may take that is there to be waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// The promise: agents are back at two relays within this.
const BACK: Duration = Duration::from_secs(30);
/// The promise: whoever came through a relay that died succeeds again within this.
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
            "a_drained_relay_ends_when_all_have_moved",
            minutes(3),
            a_drained_relay_ends,
        )
        .alone(
            "a_rolling_restart_fails_no_request",
            minutes(6),
            a_rolling_restart,
        )
        .alone("a_killed_relay_is_replaced", minutes(4), a_killed_relay)
        .run(stage)
}

struct Stages(Fleet);

async fn stage() -> Result<Stages> {
    let arguments = ["--drain-spread", "2s", "--drain-timeout", "20s"];
    let fleet = Fleet::start(Size::from_environment(), &arguments, async |_, places| {
        Forwarder::start(places.front, &places.relays).await
    })
    .await?;
    Ok(Stages(fleet))
}

impl Stage for Stages {
    fn evidence(&self) -> String {
        self.0.logs()
    }

    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { self.0.upstream.clean().await }.boxed()
    }
}

async fn agents_are_at_two_relays(stage: Arc<Stages>) -> Result<()> {
    let took = stage.0.spread_over(2, BACK).await?;
    println!(
        "  {} agents at two relays each after {took:?}",
        stage.0.agents.len()
    );
    let mut carriers = 0.0;
    for relay in &stage.0.relays {
        let now = relay.lock().await.metrics().await?;
        carriers += now.sum("throwline_relay_carriers", &["role=\"agent\""]);
    }
    let expected = stage.0.agents.len() * 2;
    ensure!(
        carriers == expected as f64,
        "{carriers} carriers, not {expected}"
    );
    Ok(())
}

/// `POST /drain`: unready at once, empty soon, ended by itself.
async fn a_drained_relay_ends(stage: Arc<Stages>) -> Result<()> {
    let fleet = &stage.0;
    let load = Load::start(fleet, 1)?;
    load.all_succeed(PATIENCE).await?;
    let mut relay = fleet.relays[0].lock().await;
    let began = Instant::now();
    let (status, _) = metrics::post(relay.admin, "/drain").await?;
    ensure!(status == 202, "{status}");
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

async fn a_rolling_restart(stage: Arc<Stages>) -> Result<()> {
    let fleet = &stage.0;
    fleet.spread_over(2, BACK).await?;
    let load = Load::start(fleet, KUBECTLS)?;
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

async fn a_killed_relay(stage: Arc<Stages>) -> Result<()> {
    let fleet = &stage.0;
    fleet.spread_over(2, BACK).await?;
    let load = Load::start(fleet, KUBECTLS)?;
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
