//! Runs the stories of one file in one shared environment and prints what `cargo test` would.
//!
//! The standard test runner has no place to tear a shared environment down, and its processes would
//! outlive it. This one has: [`Fixture::close`] is always called.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};

use crate::kubectl::Version;
use crate::tools;

/// What the stories of a file share.
pub trait Fixture: Send + Sync + 'static {
    /// Logs and the like, printed when a story fails.
    fn diagnostics(&self) -> String {
        String::new()
    }

    /// Removes what `Drop` cannot.
    fn close(&self) -> BoxFuture<'_, Result<()>> {
        async { Ok(()) }.boxed()
    }
}

/// For stories that build environments of their own.
impl Fixture for () {}

/// A story that cannot run here: a tool is missing. Under `CI=true` that is a failure.
#[derive(Debug)]
pub struct Skipped(pub String);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// A story that needs a feature of the demo cluster, which a real one lacks. It runs on the demo
/// cluster, so that is no failure anywhere.
#[derive(Debug)]
pub struct NeedsDemo(pub &'static str);

impl std::fmt::Display for NeedsDemo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "for the demo cluster alone: {}", self.0)
    }
}

impl std::error::Error for NeedsDemo {}

struct Story<S> {
    name: String,
    alone: bool,
    limit: Duration,
    run: Box<dyn Fn(Arc<S>) -> BoxFuture<'static, Result<()>> + Send + Sync>,
}

/// The stories of one file.
pub struct Suite<S> {
    stories: Vec<Story<S>>,
}

enum Verdict {
    Passed,
    Skipped(String),
    Failed(String),
}

/// Stories that run at once. Each mostly waits for kubectl, which a machine of two cores can bear.
const AT_ONCE: usize = 4;
/// How long an ordinary story may take, cold caches and a busy machine included.
const LIMIT: Duration = Duration::from_secs(180);

impl<S: Fixture> Default for Suite<S> {
    fn default() -> Self {
        Self {
            stories: Vec::new(),
        }
    }
}

impl<S: Fixture> Suite<S> {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a story that may run beside others.
    pub fn story<F, Fut>(self, name: &str, run: F) -> Self
    where
        F: Fn(Arc<S>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.add(name, false, LIMIT, run)
    }

    /// Adds a story that runs by itself, after the others: it measures, or it breaks things.
    pub fn alone<F, Fut>(self, name: &str, limit: Duration, run: F) -> Self
    where
        F: Fn(Arc<S>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.add(name, true, limit, run)
    }

    /// Adds a story once for each kubectl: `NAME::old`, `NAME::machine`, `NAME::newest`.
    pub fn each<F, Fut>(mut self, name: &str, run: F) -> Self
    where
        F: Fn(Arc<S>, Version) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        for which in tools::KUBECTLS {
            let run = run.clone();
            self = self.story(&format!("{name}::{which}"), move |fixture| {
                let version = tools::kubectl(which);
                let running = version.map(|version| run(fixture, version));
                async move { running?.await }
            });
        }
        self
    }

    fn add<F, Fut>(mut self, name: &str, alone: bool, limit: Duration, run: F) -> Self
    where
        F: Fn(Arc<S>) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        let run = Box::new(move |fixture| run(fixture).boxed());
        self.stories.push(Story {
            name: name.to_owned(),
            alone,
            limit,
            run,
        });
        self
    }

    /// Sets up the fixture, runs the stories that the arguments choose, and prints the result.
    pub fn run<F, Fut>(self, set_up: F) -> ExitCode
    where
        F: FnOnce() -> Fut,
        Fut: Future<Output = Result<S>>,
    {
        let arguments = Arguments::read();
        let chosen: Vec<Story<S>> = self
            .stories
            .into_iter()
            .filter(|story| arguments.choose(&story.name))
            .collect();
        if arguments.list {
            chosen
                .iter()
                .for_each(|story| println!("{}: test", story.name));
            return ExitCode::SUCCESS;
        }
        println!("\nrunning {} tests", chosen.len());
        let start = Instant::now();
        let runtime = match tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => {
                println!("no runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
        let (passed, failed, skipped) = runtime.block_on(run_all(chosen, &arguments, set_up));
        // A story that was given up may still hold a blocking thread.
        runtime.shutdown_timeout(Duration::from_secs(2));
        println!(
            "\ntest result: {}. {passed} passed; {failed} failed; {skipped} ignored; 0 measured; \
             {} filtered out; finished in {:.2}s\n",
            if failed == 0 { "ok" } else { "FAILED" },
            arguments.left_out.get(),
            start.elapsed().as_secs_f64(),
        );
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

async fn run_all<S, F, Fut>(
    chosen: Vec<Story<S>>,
    arguments: &Arguments,
    set_up: F,
) -> (usize, usize, usize)
where
    S: Fixture,
    F: FnOnce() -> Fut,
    Fut: Future<Output = Result<S>>,
{
    if chosen.is_empty() {
        return (0, 0, 0);
    }
    let count = chosen.len();
    let fixture = match set_up().await {
        Ok(fixture) => Arc::new(fixture),
        Err(error) => {
            let verdict = judge(Ok(Err(error.context("the fixture could not be set up"))));
            return match verdict {
                Verdict::Skipped(why) => {
                    println!("all skipped: {why}");
                    (0, 0, count)
                }
                Verdict::Passed | Verdict::Failed(_) => {
                    for story in &chosen {
                        println!("test {} ... FAILED", story.name);
                    }
                    if let Verdict::Failed(why) = verdict {
                        println!("{why}");
                    }
                    (0, count, 0)
                }
            };
        }
    };
    let (alone, together): (Vec<_>, Vec<_>) = chosen.into_iter().partition(|story| story.alone);
    let mut sums = (0, 0, 0);
    let mut add = |outcome: &Verdict| match outcome {
        Verdict::Passed => sums.0 += 1,
        Verdict::Failed(_) => sums.1 += 1,
        Verdict::Skipped(_) => sums.2 += 1,
    };
    let mut running = stream::iter(together)
        .map(|story| run_story(story, fixture.clone()))
        .buffer_unordered(arguments.at_once);
    while let Some(outcome) = running.next().await {
        add(&outcome);
    }
    drop(running);
    for story in alone {
        add(&run_story(story, fixture.clone()).await);
    }
    if let Err(error) = fixture.close().await {
        println!("test close ... FAILED\n{}", causes(&error));
        sums.1 += 1;
    }
    sums
}

async fn run_story<S: Fixture>(story: Story<S>, fixture: Arc<S>) -> Verdict {
    let start = Instant::now();
    let running = AssertUnwindSafe((story.run)(fixture.clone())).catch_unwind();
    let outcome = tokio::time::timeout(story.limit, running).await;
    let verdict = judge(match outcome {
        Ok(Ok(result)) => Ok(result),
        Ok(Err(panic)) => Err(panic_text(&*panic)),
        Err(_) => Err(format!("did not finish within {:?}", story.limit)),
    });
    let seconds = start.elapsed().as_secs_f64();
    match &verdict {
        Verdict::Passed => println!("test {} ... ok", story.name),
        Verdict::Skipped(why) => println!("test {} ... ignored, {why}", story.name),
        Verdict::Failed(why) => {
            println!("test {} ... FAILED", story.name);
            println!(
                "---- {} after {seconds:.1} s\n{why}\n{}",
                story.name,
                fixture.diagnostics()
            );
            // Once more and in one line, at the end of a long output.
            println!("failed {}: {}", story.name, brief(why));
        }
    }
    verdict
}

fn judge(outcome: Result<Result<()>, String>) -> Verdict {
    match outcome {
        Ok(Ok(())) => Verdict::Passed,
        Ok(Err(error)) => {
            let elsewhere = error.downcast_ref::<NeedsDemo>();
            let missing = error.downcast_ref::<Skipped>().filter(|_| !in_ci());
            match (elsewhere, missing) {
                (Some(why), _) => Verdict::Skipped(why.to_string()),
                (_, Some(why)) => Verdict::Skipped(why.to_string()),
                _ => Verdict::Failed(causes(&error)),
            }
        }
        Err(text) => Verdict::Failed(text),
    }
}

/// An error with its causes, a line each. A backtrace through the runtime would hide them.
fn causes(error: &anyhow::Error) -> String {
    let each: Vec<String> = error.chain().map(ToString::to_string).collect();
    each.join("\ncaused by: ")
}

fn brief(why: &str) -> String {
    let words: Vec<&str> = why.split_whitespace().collect();
    words.join(" ").chars().take(400).collect()
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
    format!(
        "panicked: {}",
        text.unwrap_or_else(|| "(no text)".to_owned())
    )
}

fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

/// Those of the standard runner's arguments that make sense here; others are accepted and ignored.
#[derive(Debug)]
struct Arguments {
    filters: Vec<String>,
    exact: bool,
    list: bool,
    at_once: usize,
    left_out: std::cell::Cell<usize>,
}

impl Arguments {
    fn read() -> Self {
        Self::parse(std::env::args().skip(1))
    }

    fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut this = Self {
            filters: Vec::new(),
            exact: false,
            list: false,
            at_once: AT_ONCE,
            left_out: std::cell::Cell::new(0),
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--list" => this.list = true,
                "--exact" => this.exact = true,
                "--test-threads" => {
                    let value = arguments
                        .next()
                        .context("a number")
                        .and_then(|text| text.parse().map_err(|error| anyhow!("{text}: {error}")));
                    this.at_once = value.unwrap_or(AT_ONCE).max(1);
                }
                flag if flag.starts_with('-') => {}
                _ => this.filters.push(argument),
            }
        }
        this
    }

    fn choose(&self, name: &str) -> bool {
        let chosen = self.filters.is_empty()
            || self.filters.iter().any(|filter| {
                if self.exact {
                    name == filter
                } else {
                    name.contains(filter.as_str())
                }
            });
        if !chosen {
            self.left_out.set(self.left_out.get() + 1);
        }
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        Arguments::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn filters_choose_by_part_or_exactly() {
        assert!(arguments(&["exec"]).choose("exec_with_stdin"));
        assert!(!arguments(&["exec", "--exact"]).choose("exec_with_stdin"));
        assert!(arguments(&["--nocapture", "--test-threads", "1"]).choose("anything"));
        assert_eq!(arguments(&["--test-threads", "1"]).at_once, 1);
    }

    #[test]
    fn an_error_is_shown_with_its_causes_and_in_brief() {
        let error = anyhow!("refused").context("no\n carrier");
        let text = causes(&error);
        assert_eq!(text, "no\n carrier\ncaused by: refused");
        assert_eq!(brief(&text), "no carrier caused by: refused");
    }

    #[test]
    fn a_story_for_the_demo_cluster_is_skipped_on_another() {
        let error = anyhow::Error::new(NeedsDemo("of its option")).context("the fixture");
        assert!(matches!(judge(Ok(Err(error))), Verdict::Skipped(_)));
    }

    #[test]
    fn a_panic_and_an_error_are_failures() {
        assert!(matches!(
            judge(Err("panicked".to_owned())),
            Verdict::Failed(_)
        ));
        assert!(matches!(judge(Ok(Err(anyhow!("no")))), Verdict::Failed(_)));
        assert!(matches!(judge(Ok(Ok(()))), Verdict::Passed));
    }
}
