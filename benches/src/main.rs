//! Side-by-side measurements: the same client and the same upstream, directly, through Throwline
//! and through other tunnels, interleaved in one run. What counts is the ratio.

mod capacity;
mod client;
mod delay;
mod helper;
mod idle;
mod measure;
mod narrow;
mod openssh;
mod percentile;
mod proc;
mod report;
mod rows;
mod upstream;
mod ways;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use throwline_e2e::suite::Skipped;
use throwline_e2e::tools;

use crate::measure::{Measurement, Sizes};
use crate::report::Report;
use crate::rows::{DIRECT, Figures, Row};
use crate::ways::{Site, THROWLINE, Way};

/// Measure Throwline and other tunnels beside a direct connection.
#[derive(Parser)]
struct Args {
    /// A short run, to see that everything measures; its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// How many times each row is measured on each way. Default 5; with --quick 1.
    #[arg(long)]
    rounds: Option<usize>,
    /// Leave README.md and its picture as they are.
    #[arg(long)]
    dry: bool,
    /// Measure only this way beside the direct one, e.g. "Throwline". Implies --dry.
    #[arg(long)]
    only: Option<String>,
    /// Measure only rows whose name has this in it, e.g. "bulk". Implies --dry.
    #[arg(long)]
    row: Option<String>,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// What an idle agent and an idle line cost in memory, by part.
    Idle {
        #[arg(long, default_value_t = 5_000)]
        agents: usize,
    },
    /// How cost grows with busy lines and with agents.
    Capacity {
        /// As many at most.
        #[arg(long, default_value_t = 5_000)]
        agents: usize,
    },
    /// Keystrokes and small commands beside bulk, on slow, lossy and long links. Needs root, and Linux'
    /// network namespaces.
    Narrow(narrow::Options),
    /// The upstream's own process.
    #[command(hide = true)]
    Upstream,
    /// A process of the same in one of its namespaces.
    #[command(hide = true)]
    NarrowPart {
        #[command(subcommand)]
        part: narrow::Part,
    },
    /// Idle agents' own process.
    #[command(hide = true)]
    Agents {
        #[arg(long)]
        state: PathBuf,
        #[arg(long)]
        public: String,
        #[arg(long)]
        prefix: String,
        #[arg(long)]
        count: usize,
    },
    /// A wide-area path's own process.
    #[command(hide = true)]
    Delay {
        #[arg(long)]
        to: SocketAddr,
        #[arg(long)]
        round_trip_ms: u64,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    // For the servers too, which inherit it.
    throwline_ops::limits::raise_open_files();
    match args.role {
        Some(Role::Upstream) => return upstream::serve().await,
        Some(Role::Delay { to, round_trip_ms }) => {
            return delay::serve(to, Duration::from_millis(round_trip_ms));
        }
        Some(Role::Idle { agents }) => return idle::run(agents).await,
        Some(Role::Narrow(options)) => return narrow::run(&options).await,
        Some(Role::NarrowPart { part }) => return narrow::serve(part).await,
        Some(Role::Capacity { agents }) => return capacity::run(agents).await,
        Some(Role::Agents {
            state,
            public,
            prefix,
            count,
        }) => return idle::agents(&state, &public, &prefix, count).await,
        None => {}
    }
    let sizes = if args.quick {
        Sizes::QUICK
    } else {
        Sizes::FULL
    };
    let rounds = args.rounds.unwrap_or(sizes.rounds);
    let names = ways::NAMES.into_iter();
    let names = names.filter(|name| match &args.only {
        Some(only) => *name == DIRECT || name == only,
        None => true,
    });

    let site = Site::start().await?;
    let mut left_out = Vec::new();
    let mut ways = Vec::new();
    for name in names {
        match ways::start(name, &site, sizes.rest).await {
            Ok(way) => {
                println!("{name}: {}", way.version);
                ways.push(way);
            }
            Err(error) if name != THROWLINE && error.is::<Skipped>() => {
                println!("{name} is left out: {error:#}");
                left_out.push(format!(
                    "{name} was not installed: run cargo xtask install --peers."
                ));
            }
            Err(error) => return Err(error),
        }
    }
    let is_wanted = |row: &Row| match &args.row {
        Some(part) => row.name().contains(part),
        None => true,
    };
    let measurements: Vec<_> = Measurement::ALL
        .into_iter()
        .filter(|measurement| measurement.rows().iter().any(is_wanted))
        .collect();
    let mut figures = Figures::default();
    if is_wanted(&Row::RelayIdleAgent) {
        let names = ways.iter().map(|way| way.name);
        let (agents, settle) = (sizes.idle_agents, sizes.idle_settle);
        idle::beside(names, &site, agents, settle, &mut figures).await;
    }
    measured(&ways, &measurements, &sizes, rounds, &mut figures).await;
    let report = Report {
        figures: &figures,
        ways: &ways,
        rounds,
        left_out: &left_out,
    };
    println!("\n{}", report.tables());
    if !args.quick && !args.dry && args.only.is_none() && args.row.is_none() {
        let dir = tools::root().join("benches");
        report.publish(&dir)?;
        println!("written to {}", dir.join("README.md").display());
    }
    // That a peer cannot do something is a finding; that we cannot is a fault.
    let fault = figures
        .failures()
        .find(|(_, way, _)| args.quick || [DIRECT, THROWLINE].contains(way));
    match fault {
        Some((row, way, why)) => Err(anyhow::anyhow!("{way}, {}: {why}", row.name())),
        None => Ok(()),
    }
}

/// All ways side by side: each measurement on each of them before the next, so that what else the
/// machine does falls on all.
async fn measured(
    ways: &[Way],
    measurements: &[Measurement],
    sizes: &Sizes,
    rounds: usize,
    figures: &mut Figures,
) {
    for way in ways {
        if let Some(idle) = way.idle_agent_mib {
            figures.add(Row::IdleAgent, way.name, idle);
        }
    }
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for measurement in measurements {
            for turn in 0..ways.len() {
                // None is always the first.
                let way = &ways[(turn + round) % ways.len()];
                match measurement.run(way, sizes).await {
                    Ok(found) => {
                        for (row, value) in found {
                            figures.add(row, way.name, value);
                        }
                    }
                    Err(error) => {
                        figures.fail(measurement.rows()[0], way.name, format!("{error:#}"));
                    }
                }
            }
        }
    }
}
