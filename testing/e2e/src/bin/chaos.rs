//! Rounds of random faults against what people do with kubectl: every byte must be there, once and
//! in order, and every exit code right. Run it by `cargo xtask chaos`.
//!
//! The last line is the result; the exit code is 1 on any corruption or loss. Before it come the
//! pauses, by fault and by operation: the longest wait for a sign of progress (see
//! [`throwline_e2e::latency`]) that was each fault's. The seed draws the operations, the faults and
//! the moments: with the same seed the same ones come in the same order.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use throwline_e2e::fault_plan::FaultPlan;
use throwline_e2e::faults::BACK;
use throwline_e2e::fleet::{Fleet, Front, Size};
use throwline_e2e::latency::{Pauses, Table, median};
use throwline_e2e::metrics;
use throwline_e2e::operations::{self, Ground, Operation, Running};

const SIZE: Size = Size::ONE_USER;

/// How long an agent may take to be at two relays again between rounds: its back-off, at most.
const REST: Duration = Duration::from_secs(120);

struct Options {
    rounds: u64,
    seed: u64,
    front: String,
}

#[derive(Default)]
struct Outcome {
    rounds: u64,
    corrupted: u64,
    lost: u64,
    /// The longest of each round.
    pauses: Vec<Duration>,
    by_fault: Table,
    by_operation: Table,
}

impl Outcome {
    fn count(&mut self, operation: Operation, happened: &[(Instant, &str)], pauses: &Pauses) {
        self.pauses.push(pauses.longest());
        let began: Vec<Instant> = happened.iter().map(|(began, _)| *began).collect();
        for ((_, kind), pause) in happened.iter().zip(pauses.longest_for(&began)) {
            println!("      {kind}: {} ms", pause.as_millis());
            self.by_fault.add(kind, pause);
            self.by_operation.add(operation.name(), pause);
        }
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = match options() {
        // Whatever ends it, the fleet's processes end with it.
        Ok(options) => tokio::select! {
            outcome = chaos(options) => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        },
        Err(error) => Err(error),
    };
    match outcome {
        Ok(outcome) => {
            println!("the longest wait of each fault:\n{}", outcome.by_fault);
            println!("the same by what was done:\n{}", outcome.by_operation);
            let worst = outcome.pauses.iter().max().copied().unwrap_or_default();
            println!(
                "rounds={} corrupted={} lost={} pause_ms_median={} pause_ms_worst={}",
                outcome.rounds,
                outcome.corrupted,
                outcome.lost,
                median(outcome.pauses).as_millis(),
                worst.as_millis(),
            );
            match outcome.corrupted + outcome.lost {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options {
        rounds: 100,
        seed: rand::random(),
        front: "haproxy-passthrough".to_owned(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next();
        let value = value.with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--rounds" => options.rounds = value.parse().context("--rounds needs a number")?,
            "--seed" => options.seed = value.parse().context("--seed needs a number")?,
            "--front" => options.front = value,
            _ => bail!("no such flag: {flag}"),
        }
    }
    Ok(options)
}

async fn chaos(options: Options) -> Result<Outcome> {
    throwline_ops::limits::raise_open_files();
    let Options {
        rounds,
        seed,
        front,
    } = options;
    println!("seed {seed}, {rounds} rounds behind {front}");
    let front = Front::parse(&front)?;
    let arguments = ["--drain-spread", "1s", "--drain-timeout", "30s"];
    let fleet = Fleet::with_links(SIZE, front, &arguments).await?;
    fleet.spread_over(2, BACK).await?;
    let ground = Ground::in_fleet(&fleet).await?;
    let mut rng = StdRng::seed_from_u64(seed);
    let mut outcome = Outcome::default();
    for round in 0..rounds {
        outcome.rounds += 1;
        let began = Instant::now();
        let operation = Operation::draw(&mut rng);
        let happening: Vec<(Duration, FaultPlan)> = (0..rng.random_range(1..=3))
            .map(|_| {
                let after = Duration::from_millis(rng.random_range(0..1500));
                (after, FaultPlan::draw(&mut rng, SIZE))
            })
            .collect();
        let told: Vec<String> = happening.iter().map(|(_, plan)| plan.to_string()).collect();
        println!("{round:>4}  {operation:?}: {}", told.join("; "));
        let running = Running::start(operation, &ground).await?;
        let mut happened = Vec::new();
        for (after, plan) in happening {
            tokio::time::sleep(after).await;
            let plan = plan.aim(&fleet).await?;
            happened.push((Instant::now(), plan.kind()));
            // How soon an agent that was hit again and again is at two relays is not what is asked.
            if let Err(error) = plan.make(&fleet).await {
                println!("      {error:#}");
            }
        }
        match running.end().await {
            Ok(pauses) => {
                outcome.count(operation, &happened, &pauses);
                println!(
                    "      well after {:?}, longest wait {:?}",
                    began.elapsed(),
                    pauses.longest()
                );
            }
            Err(operations::Fault::Corrupted(what)) => {
                outcome.corrupted += 1;
                println!("      CORRUPTED: {what}\n{}", fleet.logs());
            }
            Err(operations::Fault::Lost(error)) => {
                outcome.lost += 1;
                println!("      LOST: {error:#}\n{}", fleet.logs());
            }
        }
        fleet.spread_over(2, REST).await?;
    }
    tell_of_lines(&fleet).await?;
    fleet.upstream.clean().await?;
    Ok(outcome)
}

/// What the local proxy itself counted.
async fn tell_of_lines(fleet: &Fleet) -> Result<()> {
    let proxy = fleet.proxies.first().context("a proxy")?.lock().await;
    let now = metrics::Metrics::of(proxy.admin).await?;
    let sum = |name: &str| now.sum(&format!("throwline_local_proxy_{name}"), &[]);
    println!(
        "the local proxy resumed {} lines, in {:.1} s of pauses, sent {} KiB again, gave up {}",
        sum("line_resumptions_total"),
        sum("line_pause_seconds_sum"),
        sum("line_replayed_bytes_total") / 1024.0,
        sum("lines_given_up_total").abs(),
    );
    Ok(())
}
