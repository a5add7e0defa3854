//! Lines that move while nothing is broken, each cause alone, and one whose agent was long away.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use throwline_e2e::fleet::{Fleet, Front, Size};
use throwline_e2e::link::State;
use throwline_e2e::metrics::Metrics;
use throwline_e2e::operations::{Ground, Operation, Running};
use throwline_e2e::{Builder, Environment, Fixture, Suite, eventually};

fn main() -> ExitCode {
    let limit = Duration::from_secs(240);
    Suite::new()
        .alone("a_carrier_that_grew_old_is_a_short_pause", limit, rotation)
        .alone("a_renewed_certificate_is_a_short_pause", limit, renewal)
        .alone(
            "a_line_waits_for_its_agent_and_not_for_a_back_off",
            limit,
            an_agent_that_was_away,
        )
        .run(|| async { Ok(()) })
}

/// Types into an exec until `happened`, and looks at how long its line was between two streams.
async fn types_through(
    env: &Environment,
    happened: fn(&Environment, &Metrics) -> Result<()>,
) -> Result<()> {
    let ground = Arc::new(Ground {
        upstream: env.upstream.clone(),
        namespace: env.namespace.clone(),
        kubectl: env.newest()?,
    });
    let running = Running::start(Operation::Exec, &ground).await?;
    eventually(Duration::from_secs(120), "it has moved", || async {
        happened(env, &Metrics::of(env.proxy.admin).await?)
    })
    .await?;
    let ended = running.end().await;
    let pauses = ended.map_err(|fault| anyhow::anyhow!("{fault:?}\n{}", env.diagnostics()))?;
    let now = Metrics::of(env.proxy.admin).await?;
    let name = |part: &str| format!("throwline_local_proxy_line_pause_seconds_{part}");
    let (sum, count) = (now.sum(&name("sum"), &[]), now.sum(&name("count"), &[]));
    let below = |bound: &str| now.sum(&name("bucket"), &[&format!("le=\"{bound}\"")]);
    println!(
        "    {count} moves, {:.1} ms each, {} above 0.2 s, longest wait {:?}",
        sum / count * 1000.0,
        count - below("0.2"),
        pauses.longest()
    );
    ensure!(sum / count < 0.2, "{sum} s in {count} moves");
    // On a machine that does other things as well, one may take longer, but none as a loss would.
    ensure!(below("2") == count, "{}", now.text());
    ensure!(
        pauses.longest() < Duration::from_secs(5),
        "{:?}",
        pauses.longest()
    );
    Ok(())
}

async fn rotation(_: Arc<()>) -> Result<()> {
    let often = ["--carrier-life", "3s"];
    let env = Builder::default()
        .agent_arguments(&often)
        .proxy_arguments(&often)
        .start()
        .await?;
    let moved = |_: &Environment, now: &Metrics| {
        let resumed = now.sum("throwline_local_proxy_line_resumptions_total", &[]);
        let carriers = now.sum("throwline_local_proxy_carriers_total", &[]);
        ensure!(resumed >= 12.0 && carriers >= 4.0, "{resumed}, {carriers}");
        Ok(())
    };
    types_through(&env, moved).await?;
    env.close().await
}

/// A certificate is back-dated by a minute, so one of 66 s is due after 24 s.
async fn renewal(_: Arc<()>) -> Result<()> {
    let short = [
        "--user-certificate-life",
        "66s",
        "--agent-certificate-life",
        "66s",
    ];
    let env = Builder::default().relay_arguments(&short).start().await?;
    let renewed = |env: &Environment, now: &Metrics| {
        for (process, said) in [
            (&env.proxy.process, "certificate renewed"),
            (&env.agent.process, "certificate was renewed"),
        ] {
            let log = process.log();
            ensure!(log.contains(said), "{} has renewed nothing", process.name());
        }
        let resumed = now.sum("throwline_local_proxy_line_resumptions_total", &[]);
        ensure!(resumed >= 2.0, "{resumed} resumptions");
        Ok(())
    };
    types_through(&env, renewed).await?;
    env.close().await
}

/// Twice, so that its back-off has grown: alone, it would be half a minute.
async fn an_agent_that_was_away(_: Arc<()>) -> Result<()> {
    const AWAY: Duration = Duration::from_secs(25);
    let fleet = Fleet::with_links(Size::ONE_USER, Front::Plain, &[]).await?;
    let ground = Ground::in_fleet(&fleet).await?;
    for _ in 0..2 {
        let running = Running::start(Operation::Exec, &ground).await?;
        let link = fleet.agent_links.first().expect("a link for each agent");
        link.set(State::Closed);
        tokio::time::sleep(AWAY).await;
        link.set(State::Whole);
        let since = Instant::now();
        let ended = running.end().await;
        let pauses = ended.map_err(|fault| anyhow::anyhow!("{fault:?}\n{}", fleet.logs()))?;
        println!(
            "    longest wait {:?}, of an agent that was away for {AWAY:?}; over {:?} after",
            pauses.longest(),
            since.elapsed()
        );
        ensure!(pauses.longest() > AWAY / 2, "{:?}", pauses.longest());
        ensure!(
            pauses.longest() < AWAY + Duration::from_secs(10),
            "{:?}\n{}",
            pauses.longest(),
            fleet.logs()
        );
    }
    fleet.upstream.clean().await
}
