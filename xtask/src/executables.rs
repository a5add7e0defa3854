//! The test executables of the workspace: found in cargo's messages, and run.
//!
//! `cargo test` runs one after another. The tests of a crate use all processors, so that is right for
//! them; a story mostly waits, so stories run two at once. What one prints is shown when it is over.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::run;
use crate::tally::Results;
use crate::two_at_once::{lock, two_at_once};

/// Stories that take minutes: first, so that the last to end is a short one.
const LONG: [&str; 6] = [
    "story_lines",
    "story_output",
    "story_faults",
    "story_fleet",
    "story_fairness",
    "story_balancers",
];

/// One test executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Executable {
    /// Its target's name, as `cargo test --test NAME` takes it.
    name: String,
    file: PathBuf,
    /// Where cargo would run it.
    package: PathBuf,
}

impl Executable {
    fn is_story(&self) -> bool {
        self.name.starts_with("story_")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.file);
        command
            .current_dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package)
            .stdin(Stdio::null());
        command
    }
}

/// What cargo prints of each thing that it has built, as far as it matters here.
#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    reason: String,
    executable: Option<PathBuf>,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds what the arguments of `cargo build` name, tests among it; nothing if that failed.
pub(crate) fn build(root: &Path, arguments: &[&str]) -> Result<Option<Vec<Executable>>> {
    let mut command = run::cargo(root);
    command.arg("build").args(arguments);
    command.args(["--message-format", "json-render-diagnostics"]);
    let (output, good) = run::captured(&mut command)?;
    good.then(|| executables(&output)).transpose()
}

/// Reads cargo's messages, a line each.
fn executables(output: &str) -> Result<Vec<Executable>> {
    let mut found = Vec::new();
    for line in output.lines().filter(|line| line.starts_with('{')) {
        let message: Message =
            serde_json::from_str(line).with_context(|| format!("cargo printed {line}"))?;
        let is_test = message.profile.is_some_and(|profile| profile.test);
        if message.reason == "compiler-artifact"
            && is_test
            && let (Some(file), Some(manifest), Some(target)) =
                (message.executable, message.manifest_path, message.target)
        {
            let package = manifest.parent().context("a manifest without a folder")?;
            found.push(Executable {
                name: target.name,
                file,
                package: package.to_owned(),
            });
        }
    }
    found.sort_by(|a, b| (&a.package, &a.name).cmp(&(&b.package, &b.name)));
    Ok(found)
}

/// Runs all; what was counted, and whether each ended well.
pub(crate) fn run_all(all: &[Executable]) -> Result<(Results, bool)> {
    let (stories, others): (Vec<_>, Vec<_>) = all.iter().partition(|one| one.is_story());
    let mut sum = Sum {
        results: Results::default(),
        good: true,
    };
    for one in others {
        sum.good &= run::tests_into(&mut sum.results, &mut one.command())?;
    }
    let sum = Mutex::new(sum);
    two_at_once(in_order(stories), |story| {
        let start = Instant::now();
        let output = story.command().stderr(Stdio::inherit()).output();
        // Under the lock, so that the outputs of two are not mixed.
        lock(&sum).add(story, output, start.elapsed());
    });
    let sum = sum.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok((sum.results, sum.good))
}

/// The long ones first, each group by name.
fn in_order(mut stories: Vec<&Executable>) -> Vec<&Executable> {
    stories.sort_by_key(|story| {
        let long = LONG.iter().position(|name| *name == story.name);
        (long.unwrap_or(LONG.len()), story.name.clone())
    });
    stories
}

/// What all runs come to.
struct Sum {
    results: Results,
    good: bool,
}

impl Sum {
    /// Shows and counts one story's output.
    fn add(&mut self, story: &Executable, output: io::Result<Output>, time: Duration) {
        println!("\n── {}", story.name);
        let is_good = match output {
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stdout);
                print!("{text}");
                for line in text.lines() {
                    self.results.line(line);
                }
                if !output.status.success() {
                    println!("{} ended with {}", story.name, output.status);
                }
                output.status.success()
            }
            Err(error) => {
                println!("could not start {}: {error}", story.file.display());
                false
            }
        };
        self.good &= is_good;
        println!("── took {} s", time.as_secs());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn executable(name: &str, command: &str) -> Executable {
        Executable {
            name: name.to_owned(),
            file: command.into(),
            package: "/".into(),
        }
    }

    #[test]
    fn test_executables_are_read_from_cargo() {
        let lines = [
            "a line of a build script",
            r#"{"reason":"compiler-artifact","manifest_path":"/w/b/Cargo.toml","target":{"name":"story_x"},"profile":{"test":true},"executable":"/t/story_x-1"}"#,
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"name":"a"},"profile":{"test":true},"executable":"/t/a-1"}"#,
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"name":"a"},"profile":{"test":false},"executable":"/t/a"}"#,
            r#"{"reason":"compiler-artifact","manifest_path":"/w/a/Cargo.toml","target":{"name":"a"},"profile":{"test":false},"executable":null}"#,
            r#"{"reason":"build-finished","success":true}"#,
        ];
        let found = executables(&lines.join("\n")).unwrap();
        let names: Vec<_> = found.iter().map(|one| &*one.name).collect();
        assert_eq!(names, ["a", "story_x"]);
        assert_eq!(found[1].package, Path::new("/w/b"));
        assert!(executables("{").is_err());
    }

    #[test]
    fn long_stories_go_first() {
        let all = ["story_a", "story_output", "story_lines"].map(|name| executable(name, "true"));
        let order: Vec<_> = in_order(all.iter().collect())
            .into_iter()
            .map(|one| one.name.as_str())
            .collect();
        assert_eq!(order, ["story_lines", "story_output", "story_a"]);
    }

    #[test]
    fn a_failure_of_any_is_one_of_all() {
        let run = |names: &[(&str, &str)]| {
            let all: Vec<_> = names.iter().map(|(n, c)| executable(n, c)).collect();
            run_all(&all).unwrap().1
        };
        assert!(run(&[
            ("a", "true"),
            ("story_a", "true"),
            ("story_b", "true")
        ]));
        assert!(!run(&[
            ("a", "true"),
            ("story_a", "false"),
            ("story_b", "true")
        ]));
        assert!(!run(&[("a", "false"), ("story_a", "true")]));
        assert!(!run(&[("story_a", "/nowhere/at/all")]));
    }
}
