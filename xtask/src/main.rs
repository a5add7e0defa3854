//! The project's own chores. `cargo xtask test` is what a newcomer and the CI both run.

#![warn(clippy::mod_module_files)]

#[cfg(test)]
mod claims;
mod executables;
mod fuzz;
mod prose;
mod run;
mod steps;
mod structure;
mod tally;
mod tools;
mod two_at_once;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
Usage: cargo xtask COMMAND

Commands:
  test [--fuzz-seconds N]   install what is needed, then formatting, lints, all tests,
                            each fuzz target for a minute, a quick bench; ends with a sum
  install [--peers]         only install the tools that the end-to-end stories drive; with
                            --peers also what the benches measure beside Throwline
  e2e [FILTER]              the end-to-end stories, those whose name holds FILTER
  fuzz [TARGET] [--fuzz-seconds N]
                            the fuzz targets on the kept corpus, two at once
  prose [FILTER]            the personified words in comments and Markdown, by file and line, of
                            files whose path holds FILTER; then the budgets (CONTRIBUTING.md)
  structure                 which crate and which file may import which (ARCHITECTURE.md,
                            Invariants); prints each circle of files
  options                   writes docs/configuration.md from the definition of the command line
  bench [--quick] [--rounds N] [--dry] [--only WAY]
                            the side-by-side measurements, optimised: direct, ssh -R, rathole,
                            wstunnel, nginx around rathole, Throwline; writes benches/README.md.
                            --quick only sees that they run
  bench idle [--agents N]   memory of an idle agent and an idle line, by part, with 5,000 or N
  bench capacity [--agents N]
                            requests a second, CPU and memory by lines and agents; writes
                            docs/operating.md
  bench narrow [--quick] [--rounds N] [--dry] [--all] [--link NAME] [--bulk NAME] [--only WAY]
                            keystrokes and small commands beside bulk on slow, lossy and long
                            links: direct, ssh, Throwline; needs root and network namespaces;
                            writes benches/README.md
  soak [--minutes N] [--seed N] [--relays N] [--agents N] [--proxies N] [--front FRONT]
                            10 min of random kills, drains, cut links and slow readers under
                            load, of 3 relays, 30 agents and 20 proxies; then counts
                            unexpected failures and leaks
  fleet [--agents N] [--proxies N] [--front FRONT]
                            the stories of three relays that are drained and killed under
                            load, with 30 agents and 20 proxies by default, behind
                            HAProxy, nginx and Envoy (FRONT: one of them, as nginx-terminate)
  chaos [--rounds N] [--seed N] [--front FRONT]
                            rounds of random faults against exec, cp, port-forward, logs, watch
                            and lists: every byte must be there, once and in order
  lines [--lines N]         what an idle line (an exec, a port-forward) costs each process, of
                            1,000 of them or N
  storm [--agents N]        5,000 agents, or N, lose their relay at once and come to another
  help                      this text

Environment:
  CI=true                   a tool that could not be installed fails `test`
  THROWLINE_BIN             the benches measure this binary, not the one that they build
  THROWLINE_E2E_KUBECONFIG  run the stories against this cluster, not the demo cluster
  THROWLINE_E2E_IMAGE       the image of the stories' pods there (default: busybox)";

fn main() -> ExitCode {
    match dispatch() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch() -> Result<ExitCode> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let command = if arguments.is_empty() {
        "help".to_owned()
    } else {
        arguments.remove(0)
    };
    let per_target = take_fuzz_seconds(&mut arguments)?;
    let root = run::root()?;
    match command.as_str() {
        "test" => {
            refuse_rest(&arguments)?;
            steps::test(&root, per_target)
        }
        "install" => {
            if arguments.first().is_some_and(|first| first == "--peers") {
                arguments.remove(0);
                tools::install_peers(&root)?;
                tools::install_narrow(&root)?;
            }
            refuse_rest(&arguments)?;
            let report = tools::install(&root)?;
            report.print();
            Ok(if report.missing.is_empty() {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        "e2e" => steps::e2e(&root, &arguments),
        "fuzz" => steps::fuzz(&root, &arguments, per_target),
        "prose" => {
            let filter = match arguments.is_empty() {
                true => String::new(),
                false => arguments.remove(0),
            };
            refuse_rest(&arguments)?;
            prose::list(&root, &filter)?;
            Ok(if prose::check(&root)? {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        "structure" => {
            refuse_rest(&arguments)?;
            Ok(if structure::check(&root)? {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        "options" => {
            refuse_rest(&arguments)?;
            steps::options(&root)
        }
        "bench" => steps::bench(&root, &arguments),
        "fleet" => steps::fleet(&root, &arguments),
        "soak" => steps::soak(&root, &arguments),
        "chaos" => steps::chaos(&root, &arguments),
        "lines" => steps::lines(&root, &arguments),
        "storm" => steps::storm(&root, &arguments),
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        other => bail!("no such command: {other}\n\n{USAGE}"),
    }
}

fn refuse_rest(arguments: &[String]) -> Result<()> {
    match arguments.first() {
        None => Ok(()),
        Some(unexpected) => bail!("unexpected argument: {unexpected}\n\n{USAGE}"),
    }
}

/// Takes `--fuzz-seconds N` out of the arguments. Default: 60 seconds a target; 0 only builds.
fn take_fuzz_seconds(arguments: &mut Vec<String>) -> Result<Duration> {
    let Some(at) = arguments
        .iter()
        .position(|argument| argument == "--fuzz-seconds")
    else {
        return Ok(Duration::from_secs(60));
    };
    let value = arguments
        .get(at + 1)
        .context("--fuzz-seconds needs a number")?;
    let seconds = value
        .parse()
        .with_context(|| format!("--fuzz-seconds: not a number: {value}"))?;
    arguments.drain(at..=at + 1);
    Ok(Duration::from_secs(seconds))
}
