//! What each subcommand does, step by step.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::tally::Tally;
use crate::{executables, fuzz, prose, run, structure, tools};

/// What lints look at.
const EVERYTHING: [&str; 2] = ["--workspace", "--all-targets"];

/// What is built and run. All of the workspace, so that each crate is compiled once: naming single
/// packages would unify features differently and build the dependencies again. Without the benches,
/// which lints have compiled, and without documentation's tests, which are a run of their own.
const TESTED: [&str; 3] = ["--workspace", "--bins", "--tests"];

/// The end-to-end stories, apart from the crates' own tests.
const STORIES: [&str; 2] = ["--test", "story_*"];

/// Everything, in the order in which a mistake is found cheapest.
pub(crate) fn test(root: &Path, per_target: Duration) -> Result<ExitCode> {
    let start = Instant::now();
    let mut tally = Tally::default();

    let report = tools::install(root)?;
    report.print();
    if in_ci() {
        tally.check("tools", report.missing.is_empty());
    } else if !report.missing.is_empty() {
        println!("the stories that need what is missing are skipped; under CI=true they fail");
    }

    tally.check(
        "formatting",
        run::shown(run::cargo(root).args(["fmt", "--all", "--check"]))?,
    );
    tally.check(
        "formatting of the fuzz targets",
        run::shown(run::cargo(root).args([
            "fmt",
            "--manifest-path",
            "testing/fuzz/Cargo.toml",
            "--check",
        ]))?,
    );
    tally.check("prose", prose::check(root)?);
    tally.check("structure", structure::check(root)?);
    if run::on_path("cargo-deny").is_some() {
        tally.check(
            "cargo deny",
            run::shown(run::cargo(root).args(["deny", "check"]))?,
        );
    } else {
        println!("cargo-deny is not installed: licences and bans are not checked here");
    }
    let lints = run::shown(
        run::cargo(root)
            .arg("clippy")
            .args(EVERYTHING)
            .args(["--", "--deny", "warnings"]),
    )?;
    tally.check("lints", lints);
    // As it is deployed. The whole workspace is named, so that its dependencies are those of above.
    let without = run::shown(
        run::cargo(root)
            .args(["clippy", "--workspace", "--bin", "throwline"])
            .args(["--no-default-features", "--", "--deny", "warnings"]),
    )?;
    tally.check("lints without the demo", without);

    // The libraries': the documentation of a binary is its help text.
    let documented = run::shown(
        run::cargo(root)
            .args(["doc", "--workspace", "--no-deps", "--lib"])
            .env("RUSTDOCFLAGS", "--deny warnings"),
    )?;
    tally.check("documentation", documented);

    let built = executables::build(root, &TESTED)?;
    tally.check("build", built.is_some());
    if let Some(all) = &built {
        let (results, good) = executables::run_all(all)?;
        tally.tests("tests", &results, good);
        let mut command = run::cargo(root);
        command.args(["test", "--workspace", "--doc", "--no-fail-fast"]);
        let (results, good) = run::tests(&mut command)?;
        tally.tests("examples in the documentation", &results, good);
    }

    fuzz_into(&mut tally, root, &fuzz::targets(root)?, per_target)?;
    if built.is_some() {
        let quick = run::shown(measuring(root, "debug").arg("--quick"))?;
        tally.check("quick bench", quick);
    }

    let minutes = start.elapsed().as_secs() / 60;
    println!("\ntook {minutes} min");
    Ok(finish(&tally))
}

pub(crate) fn e2e(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    tools::install(root)?.print();
    let mut tally = Tally::default();
    // The stories drive the real binary, built with the same features as they are.
    let mut build = run::cargo(root);
    build
        .args(["build", "--workspace", "--bin", "throwline"])
        .args(STORIES);
    if run::shown(&mut build)? {
        let mut command = run::cargo(root);
        command
            .args(["test", "--workspace", "--no-fail-fast"])
            .args(STORIES)
            .arg("--")
            .args(arguments);
        let (results, good) = run::tests(&mut command)?;
        tally.tests("stories", &results, good);
    } else {
        tally.check("build", false);
    }
    Ok(finish(&tally))
}

pub(crate) fn fuzz(root: &Path, arguments: &[String], per_target: Duration) -> Result<ExitCode> {
    let all = fuzz::targets(root)?;
    let chosen: Vec<String> = match arguments {
        [] => all,
        [name] if all.contains(name) => vec![name.clone()],
        _ => bail!(
            "no such target: {}; there are: {}",
            arguments.join(" "),
            all.join(", ")
        ),
    };
    let mut tally = Tally::default();
    fuzz_into(&mut tally, root, &chosen, per_target)?;
    Ok(finish(&tally))
}

/// What is measured is what is deployed: this profile, of the binary and of what measures it.
const MEASURED: &str = "dist";

/// Measurements mean something only when optimised.
pub(crate) fn bench(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let quick = arguments.iter().any(|argument| argument == "--quick");
    let alone = arguments
        .first()
        .is_some_and(|first| !first.starts_with('-'));
    // Without its tools it measures nothing, so they are installed for a quick one, too.
    let is_narrow = arguments.first().is_some_and(|first| first == "narrow");
    let mut build = run::cargo(root);
    build.args(["build", "--workspace"]);
    build.args(["--bin", "throwline", "--bin", "throwline-benches"]);
    build.args(["--bin", "layers"]);
    if !quick {
        build.args(["--profile", MEASURED]);
        if !alone {
            tools::install_peers(root)?;
        }
    }
    if is_narrow {
        tools::install_narrow(root)?;
    }
    if is_narrow || !quick {
        tools::install(root)?.print();
    }
    if !run::shown(&mut build)? {
        return exit(false);
    }
    let profile = if quick { "debug" } else { MEASURED };
    exit(run::shown(measuring(root, profile).args(arguments))?)
}

/// The benches, with the binary of their profile, or that of `THROWLINE_BIN`, which logs as it does by
/// default.
fn measuring(root: &Path, profile: &str) -> std::process::Command {
    let built = root.join("target").join(profile);
    let mut bench = std::process::Command::new(built.join("throwline-benches"));
    bench.env("THROWLINE_LOG", "info");
    if std::env::var_os("THROWLINE_BIN").is_none() {
        bench.env("THROWLINE_BIN", built.join("throwline"));
    }
    bench
}

/// The size of a fleet by its flags, as the stories' environment names it.
const FLEET: [(&str, &str, &str); 2] = [
    ("--agents", "THROWLINE_E2E_AGENTS", "30"),
    ("--proxies", "THROWLINE_E2E_PROXIES", "20"),
];

/// Each balancer once, and both ways of TLS.
const FRONTS: [&str; 3] = ["haproxy-passthrough", "nginx-terminate", "envoy-terminate"];

/// The stories of a fleet in full size and with a long outage, behind each balancer.
pub(crate) fn fleet(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let mut sizes = FLEET.map(|(_, _, default)| default);
    let mut fronts = FRONTS.to_vec();
    for pair in arguments.chunks(2) {
        let [flag, value] = pair else {
            bail!("{} needs a value", pair.join(" "));
        };
        let known = FLEET.iter().position(|(name, _, _)| name == flag);
        match (known, value.parse::<usize>()) {
            (Some(at), Ok(1..)) => sizes[at] = value,
            _ if flag == "--front" => fronts = vec![value],
            _ => bail!("no such size: {flag} {value}"),
        }
    }
    tools::install(root)?.print();
    let mut build = run::cargo(root);
    build.args(["build", "--workspace", "--bin", "throwline"]);
    let mut good = run::shown(&mut build)?;
    for front in fronts {
        let mut command = run::cargo(root);
        command.args(["test", "--workspace", "--test", "story_fleet"]);
        command.env("THROWLINE_E2E_FRONT", front);
        command.env("THROWLINE_E2E_OUTAGE", "60");
        for ((_, variable, _), size) in FLEET.iter().zip(sizes) {
            command.env(variable, size);
        }
        good &= run::shown(&mut command)?;
    }
    exit(good)
}

/// Writes docs/configuration.md: the test that compares it does, when it is asked to.
pub(crate) fn options(root: &Path) -> Result<ExitCode> {
    let mut command = run::cargo(root);
    command
        .args(["test", "--workspace", "--bin", "throwline"])
        .arg("the_document_has_every_option")
        .env("THROWLINE_UPDATE_DOCS", "1");
    exit(run::shown(&mut command)?)
}

/// Random faults under load.
pub(crate) fn soak(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    // What relays carry is read from their logs; of the others, what an operator would see.
    in_faults(root, "soak", arguments, "info,throwline_relay=debug")
}

/// Random faults against what people do.
pub(crate) fn chaos(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    let log = "info,throwline_relay=debug,throwline_agent=debug,throwline_local_proxy=debug,throwline_uplink=debug";
    in_faults(root, "chaos", arguments, log)
}

/// As the stories are built, so that nothing is compiled twice.
fn in_faults(root: &Path, name: &str, arguments: &[String], log: &str) -> Result<ExitCode> {
    tools::install(root)?.print();
    let mut build = run::cargo(root);
    build.args(["build", "--workspace", "--bin", "throwline", "--bin", name]);
    if !run::shown(&mut build)? {
        return exit(false);
    }
    let mut command = std::process::Command::new(root.join("target/debug").join(name));
    command
        .args(arguments)
        .env("THROWLINE_BIN", root.join("target/debug/throwline"))
        .env("THROWLINE_LOG", log);
    exit(run::shown(&mut command)?)
}

/// Thousands of agents that lose their relay.
pub(crate) fn storm(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    measured(root, "storm", arguments)
}

/// A thousand lines that rest.
pub(crate) fn lines(root: &Path, arguments: &[String]) -> Result<ExitCode> {
    measured(root, "lines", arguments)
}

/// A measurement, so optimised.
fn measured(root: &Path, name: &str, arguments: &[String]) -> Result<ExitCode> {
    tools::install(root)?.print();
    let mut build = run::cargo(root);
    build.args(["build", "--workspace", "--profile", MEASURED]);
    build.args(["--bin", "throwline", "--bin", name]);
    if !run::shown(&mut build)? {
        return exit(false);
    }
    let built = root.join("target").join(MEASURED);
    let mut command = std::process::Command::new(built.join(name));
    command
        .args(arguments)
        .env("THROWLINE_BIN", built.join("throwline"))
        // Thousands of handshakes are not to be logged one by one.
        .env("THROWLINE_LOG", "warn");
    exit(run::shown(&mut command)?)
}

fn exit(good: bool) -> Result<ExitCode> {
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn fuzz_into(tally: &mut Tally, root: &Path, names: &[String], each: Duration) -> Result<()> {
    if !fuzz::build(root)? {
        tally.check("build of the fuzz targets", false);
        return Ok(());
    }
    if each.is_zero() {
        tally.check("build of the fuzz targets", true);
        return Ok(());
    }
    for (name, held) in fuzz::run_all(root, names, each) {
        tally.check(&format!("fuzz {name}"), held);
    }
    Ok(())
}

fn finish(tally: &Tally) -> ExitCode {
    for failure in tally.failures() {
        println!("failed: {failure}");
    }
    println!("{tally}");
    if tally.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}
