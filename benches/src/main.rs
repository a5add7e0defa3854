//! Side-by-side measurements: the same client and the same upstream, once directly and once
//! through relay, agent and local proxy, interleaved in one run. What counts is the ratio.

mod client;
mod measure;
mod report;
mod stack;
mod upstream;

use std::path::PathBuf;

use anyhow::Context;
use clap::Parser;

use crate::measure::Sizes;
use crate::report::Report;
use crate::stack::Stack;

/// Measure Throwline against a direct connection.
#[derive(Parser)]
struct Args {
    /// A short run, to see that everything measures; its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// The binary to measure. By default the one built beside this program.
    #[arg(long, value_name = "FILE", env = "THROWLINE_BIN")]
    throwline: Option<PathBuf>,
    /// How many times each row is measured on each way.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[command(subcommand)]
    role: Option<Role>,
}

#[derive(clap::Subcommand)]
enum Role {
    /// The upstream's own process.
    #[command(hide = true)]
    Upstream,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(Role::Upstream) = args.role {
        return upstream::serve().await;
    }
    let throwline = match args.throwline {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("throwline"),
    };
    anyhow::ensure!(
        throwline.exists(),
        "{} is missing; build it in the same profile first",
        throwline.display()
    );
    let (rounds, sizes) = if args.quick {
        (1, Sizes::QUICK)
    } else {
        (args.rounds, Sizes::FULL)
    };
    let stack = Stack::start(&throwline).await?;
    let mut report = Report::default();
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        let cpu = || stack.cpu_seconds();
        report.direct(
            measure::round(&stack.direct, &sizes, cpu)
                .await
                .context("measuring the direct way")?,
        );
        report.unkept(
            measure::round(&stack.unkept, &sizes, cpu)
                .await
                .context("measuring through the line without resumption")?,
        );
        report.through(
            measure::round(&stack.through, &sizes, cpu)
                .await
                .context("measuring through the line")?,
        );
    }
    println!("{}", report.markdown());
    for (part, mib) in stack.peak_resident_mib() {
        println!("{part}: {mib:.1} MiB resident at most");
    }
    Ok(())
}
