//! Fuzzing on the stable compiler: libFuzzer with the coverage flags that `cargo fuzz` would set,
//! without the nightly-only sanitizers.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run;

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

/// The targets: one file each in `fuzz/targets`.
pub(crate) fn targets(root: &Path) -> Result<Vec<String>> {
    let dir = root.join("fuzz/targets");
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

/// Builds all targets into `fuzz/target`, apart from the workspace: the flags differ.
pub(crate) fn build(root: &Path) -> Result<bool> {
    run::shown(
        run::cargo(root)
            .args(["build", "--release", "--manifest-path", "fuzz/Cargo.toml"])
            .args(["--target-dir", "fuzz/target", "--target", &host()?])
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

/// Runs the named targets two at once, and says for each whether it held.
pub(crate) fn run_all(root: &Path, names: &[String], each: Duration) -> Vec<(String, bool)> {
    two_at_once(names, |name| {
        let held = one(root, name, each).unwrap_or_else(|error| {
            println!("fuzz {name}: {error:#}");
            false
        });
        println!("fuzz {name} ... {}", if held { "ok" } else { "FAILED" });
        held
    })
}

fn two_at_once(names: &[String], run: impl Fn(&str) -> bool + Sync) -> Vec<(String, bool)> {
    let queue: Mutex<VecDeque<&String>> = Mutex::new(names.iter().collect());
    let outcomes = Mutex::new(Vec::new());
    // A function, so that the queue is free while a target runs.
    let next = || lock(&queue).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(name) = next() {
                    let held = run(name);
                    lock(&outcomes).push((name.clone(), held));
                }
            });
        }
    });
    outcomes
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
}

/// A poisoned lock only means that the other runner panicked; what it holds is whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn one(root: &Path, name: &str, each: Duration) -> Result<bool> {
    let corpus = root.join("fuzz/corpus").join(name);
    // What a run finds goes beside, so that the kept corpus changes only on purpose.
    let found = root.join("fuzz/target/found").join(name);
    let artifacts = root.join("fuzz/artifacts").join(name);
    for dir in [&corpus, &found, &artifacts] {
        std::fs::create_dir_all(dir)
            .with_context(|| format!("could not make {}", dir.display()))?;
    }
    let log = root.join("fuzz/target").join(format!("{name}.log"));
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
        .join("fuzz/target")
        .join(host()?)
        .join("release")
        .join(name))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn two_run_at_once() {
        let names = ["a", "b", "c", "d"].map(str::to_owned);
        // Passed only by two together.
        let both = Barrier::new(2);
        let outcomes = two_at_once(&names, |name| {
            both.wait();
            name != "c"
        });
        assert_eq!(outcomes.len(), 4);
        assert!(outcomes.contains(&("c".to_owned(), false)));
        assert!(outcomes.contains(&("d".to_owned(), true)));
    }
}
