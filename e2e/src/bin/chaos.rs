//! Rounds of random faults against what people do with kubectl: every byte must be there, once and
//! in order, and every exit code right. Run it by `cargo xtask chaos`.
//!
//! The last line is the result; the exit code is 1 on any corruption or loss. The seed draws the
//! operations, the faults and the moments: with the same seed the same ones come in the same order.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use throwline_e2e::excuse::Excuses;
use throwline_e2e::faults::{self, Asked, BACK, Fault};
use throwline_e2e::fleet::{Fleet, Front, Size};
use throwline_e2e::link::State;
use throwline_e2e::metrics;
use throwline_e2e::operations::{self, Ground, Operation, Running};

/// One cluster and one user: it is lines that are looked at, not crowds.
const SIZE: Size = Size {
    relays: 3,
    agents: 1,
    proxies: 1,
};

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
    pauses: Vec<Duration>,
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
        Ok(mut outcome) => {
            outcome.pauses.sort_unstable();
            let median = outcome.pauses.get(outcome.pauses.len() / 2);
            let ms = |pause: Option<&Duration>| pause.map_or(0, Duration::as_millis);
            println!(
                "rounds={} corrupted={} lost={} pause_ms_median={} pause_ms_worst={}",
                outcome.rounds,
                outcome.corrupted,
                outcome.lost,
                ms(median),
                ms(outcome.pauses.last()),
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

/// What can happen to a line that it must outlive.
enum Harm {
    Fault(Fault),
    /// kill -9 of the balancer.
    Balancer {
        down: Duration,
    },
}

impl std::fmt::Display for Harm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fault(fault) => fault.fmt(f),
            Self::Balancer { down } => write!(f, "kill -9 of the balancer, down for {down:?}"),
        }
    }
}

impl Harm {
    async fn make(self, fleet: &Fleet) -> Result<()> {
        match self {
            Self::Fault(fault) => {
                let fault = aimed(fault, fleet).await?;
                fault.make(fleet, &Excuses::default(), &[]).await
            }
            Self::Balancer { down } => {
                fleet.restart_balancer(down).await?;
                fleet.spread_over(2, BACK).await.map(drop)
            }
        }
    }
}

fn draw(rng: &mut StdRng) -> Harm {
    let relay = rng.random_range(0..SIZE.relays);
    let ms =
        |rng: &mut StdRng, from: u64, to: u64| Duration::from_millis(rng.random_range(from..to));
    let state = match rng.random_bool(0.5) {
        true => State::Silent,
        false => State::Closed,
    };
    if rng.random_range(0..11) == 0 {
        return Harm::Balancer {
            down: ms(rng, 200, 3000),
        };
    }
    Harm::Fault(match rng.random_range(0..10) {
        0..=3 => Fault::KillRelay {
            relay,
            down: ms(rng, 500, 5000),
        },
        4..=5 => Fault::DrainRelay {
            relay,
            asked: Asked::Signal,
        },
        6..=7 => Fault::CutProxy {
            proxy: 0,
            state,
            lasts: ms(rng, 200, 15_000),
        },
        8 => Fault::CutAgent {
            agent: 0,
            state,
            lasts: ms(rng, 200, 15_000),
        },
        _ => Fault::RollingRestart,
    })
}

/// A relay that carries nothing is no fault of lines: takes one that does, if there is one.
async fn aimed(fault: Fault, fleet: &Fleet) -> Result<Fault> {
    let (Fault::KillRelay { relay, .. } | Fault::DrainRelay { relay, .. }) = fault else {
        return Ok(fault);
    };
    let mut at = relay;
    for number in (0..SIZE.relays).map(|turn| (relay + turn) % SIZE.relays) {
        if !faults::ways_over(fleet, number).await?.is_empty() {
            at = number;
            break;
        }
    }
    Ok(match fault {
        Fault::KillRelay { down, .. } => Fault::KillRelay { relay: at, down },
        Fault::DrainRelay { asked, .. } => Fault::DrainRelay { relay: at, asked },
        other => other,
    })
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
        let happening: Vec<(Duration, Harm)> = (0..rng.random_range(1..=3))
            .map(|_| {
                let after = Duration::from_millis(rng.random_range(0..1500));
                (after, draw(&mut rng))
            })
            .collect();
        let told: Vec<String> = happening
            .iter()
            .map(|(_, fault)| fault.to_string())
            .collect();
        println!("{round:>4}  {operation:?}: {}", told.join("; "));
        let running = Running::start(operation, &ground).await?;
        for (after, fault) in happening {
            tokio::time::sleep(after).await;
            // How soon an agent that was hit again and again is at two relays is not what is asked.
            if let Err(error) = fault.make(&fleet).await {
                println!("      {error:#}");
            }
        }
        match running.end().await {
            Ok(pause) => {
                outcome.pauses.extend(pause);
                let pause =
                    pause.map_or(String::new(), |pause| format!(", longest pause {pause:?}"));
                println!("      well after {:?}{pause}", began.elapsed());
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
