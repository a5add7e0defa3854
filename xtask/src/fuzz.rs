//! Fuzzing on the stable compiler: libFuzzer with the coverage flags that `cargo fuzz` would set,
//! without the nightly-only sanitizers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run;
use crate::two_at_once::two_at_once;

/// Edge coverage as counters in the binary, the table that names them, and comparisons, which
/// lead the fuzzer through magic numbers and lengths.
const FLAGS: [&str; 7] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "--cfg=fuzzing",
];

/// More memory than any decoder of ours may take from an input of this size.
const MEMORY_MIB: u32 = 512;
/// Longer than any message a decoder takes in one piece.
const MAX_INPUT: u32 = 16 * 1024;

/// The targets: one file each in `testing/fuzz/targets`.
pub(crate) fn targets(root: &Path) -> Result<Vec<String>> {
    let dir = root.join("testing/fuzz/targets");
    let mut names = Vec::new();
    for entry in
        std::fs::read_dir(&dir).with_context(|| format!("could not read {}", dir.display()))?
    {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(stem) = path.file_stem()
        {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Builds all targets into `testing/fuzz/target`, apart from the workspace: the flags differ.
pub(crate) fn build(root: &Path) -> Result<bool> {
    run::shown(
        run::cargo(root)
            .args([
                "build",
                "--release",
                "--manifest-path",
                "testing/fuzz/Cargo.toml",
            ])
            .args(["--target-dir", "testing/fuzz/target", "--target", &host()?])
            .env("RUSTFLAGS", FLAGS.join(" ")),
    )
}

/// This machine's target triple. Naming it keeps the flags from build scripts and macros, which
/// could not be linked with them.
fn host() -> Result<String> {
    let version = run::quiet(Command::new("rustc").arg("-vV"))?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not name its host")?.to_owned())
}

/// Runs the named targets two at once, and returns for each whether it held.
pub(crate) fn run_all(root: &Path, names: &[String], each: Duration) -> Vec<(String, bool)> {
    two_at_once(names, |name| {
        let held = one(root, name, each).unwrap_or_else(|error| {
            println!("fuzz {name}: {error:#}");
            false
        });
        println!("fuzz {name} ... {}", if held { "ok" } else { "FAILED" });
        (name.clone(), held)
    })
}

fn one(root: &Path, name: &str, each: Duration) -> Result<bool> {
    let corpus = root.join("testing/fuzz/corpus").join(name);
    // What a run finds goes beside, so that the kept corpus changes only on purpose.
    let found = root.join("testing/fuzz/target/found").join(name);
    let artifacts = root.join("testing/fuzz/artifacts").join(name);
    for dir in [&corpus, &found, &artifacts] {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
    }
    let log = root.join("testing/fuzz/target").join(format!("{name}.log"));
    let output = std::fs::File::create(&log)?;
    let mut command = Command::new(binary(root, name)?);
    command
        .arg(format!("-max_total_time={}", each.as_secs()))
        .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg("-timeout=10")
        .arg("-print_final_stats=1")
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .arg(&found)
        .arg(&corpus)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    let status = command
        .status()
        .with_context(|| format!("could not start {name}"))?;
    let text = String::from_utf8_lossy(&std::fs::read(&log)?).into_owned();
    if !status.success() {
        let lines: Vec<&str> = text.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(40)..].join("\n"));
        println!("the input lies in {}", artifacts.display());
    } else if let Some(count) = text
        .lines()
        .find(|line| line.contains("number_of_executed_units"))
    {
        println!("fuzz {name}: {}", count.trim());
    }
    Ok(status.success())
}

fn binary(root: &Path, name: &str) -> Result<PathBuf> {
    Ok(root
        .join("testing/fuzz/target")
        .join(host()?)
        .join("release")
        .join(name))
}
