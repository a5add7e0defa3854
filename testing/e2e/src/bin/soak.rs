//! A fleet under constant load to which random faults happen: a request that no fault affects must not fail,
//! and nothing may leak. Run it by `cargo xtask soak`.
//!
//! It prints what it does. The last line is the result; the exit code is 1 unless nothing failed
//! and nothing leaked. The seed draws the faults and the pauses between them: with the same seed
//! the same ones come in the same order, though not at the same moments. The failures
//! that a fault explains are in the module `expected_failures`; `leak_check` counts leaks.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use throwline_e2e::expected_failures::ExpectedFailures;
use throwline_e2e::faults::{self, BACK, Fault};
use throwline_e2e::fleet::{BALANCED, Fleet, Front, Size};
use throwline_e2e::leak_check::{ResourceCounts, leaks, settled};
use throwline_e2e::load::Load;
use tokio::task::JoinSet;

const PATIENCE: Duration = Duration::from_secs(120);
/// How many of the users run kubectl, beside the raw requests of all.
const KUBECTLS: usize = 3;
/// The longest pause between two faults, in seconds.
const PAUSE: u64 = 8;
/// How long the load runs before the baseline is taken: all that is made once has been made.
const WARM: Duration = Duration::from_secs(10);
/// How long what is over may take to be gone.
const GONE: Duration = Duration::from_secs(120);
/// How many faults of clients may last at once.
const AT_ONCE: usize = 6;

struct Options {
    minutes: u64,
    seed: u64,
    size: Size,
    front: Front,
}

struct Outcome {
    requests: u64,
    failed: usize,
    leaked: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    let outcome = match options() {
        // Whatever ends it, the fleet's processes end with it.
        Ok(options) => tokio::select! {
            outcome = soak(options) => outcome,
            _ = tokio::signal::ctrl_c() => Err(anyhow!("interrupted")),
        },
        Err(error) => Err(error),
    };
    match outcome {
        Ok(Outcome {
            requests,
            failed,
            leaked,
        }) => {
            println!("requests={requests} failed={failed} leaked={leaked}");
            match failed + leaked {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            }
        }
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn options() -> Result<Options> {
    let mut options = Options {
        minutes: 10,
        seed: rand::random(),
        size: Size {
            relays: BALANCED,
            agents: 30,
            proxies: 20,
        },
        front: Front::Plain,
    };
    let mut front = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments.next();
        let value = value.with_context(|| format!("{flag} needs a value"))?;
        let number = || {
            value
                .parse::<usize>()
                .with_context(|| format!("{flag} {value}"))
        };
        match flag.as_str() {
            "--minutes" => options.minutes = value.parse().context("--minutes needs a number")?,
            "--seed" => options.seed = value.parse().context("--seed needs a number")?,
            "--relays" => options.size.relays = number()?,
            "--agents" => options.size.agents = number()?,
            "--proxies" => options.size.proxies = number()?,
            "--front" => front = Some(Front::parse(&value)?),
            _ => bail!("no such flag: {flag}"),
        }
    }
    let size = options.size;
    if size.relays < 2 || size.agents < 1 || size.proxies < 1 {
        bail!("a soak needs two relays, an agent and a proxy at least");
    }
    options.front = match front {
        Some(front) => front,
        None if size.relays == BALANCED => Front::parse("haproxy-passthrough")?,
        None => Front::Plain,
    };
    Ok(options)
}

async fn soak(options: Options) -> Result<Outcome> {
    throwline_ops::limits::raise_open_files();
    let Options {
        minutes,
        seed,
        size,
        front,
    } = options;
    println!("seed {seed}, {minutes} min, {size:?} behind {front:?}");
    let arguments = ["--drain-spread", "2s", "--drain-timeout", "20s"];
    let fleet = Arc::new(Fleet::with_links(size, front, &arguments).await?);
    let outcome = in_the_fleet(&fleet, minutes, seed).await;
    let failed = outcome
        .as_ref()
        .map_or(1, |outcome| outcome.failed + outcome.leaked);
    if failed > 0 && std::env::var_os("THROWLINE_E2E_KEEP").is_none() {
        println!("set THROWLINE_E2E_KEEP to keep all logs");
    }
    fleet.upstream.clean().await?;
    outcome
}

async fn in_the_fleet(fleet: &Arc<Fleet>, minutes: u64, seed: u64) -> Result<Outcome> {
    faults::prepare_slow_readers(fleet).await?;
    fleet.spread_over(2, BACK).await?;

    println!("warming up, for the baseline");
    let load = Load::start(fleet, KUBECTLS).await?;
    load.all_succeed(PATIENCE).await?;
    tokio::time::sleep(WARM).await;
    let warm = load.stop().await?;
    println!("  {}", warm.line());
    let proxies = settled(GONE, async || ResourceCounts::of_proxies(fleet).await).await?;
    fleet.stop_people().await?;
    let rest = settled(GONE, async || ResourceCounts::of_the_rest(fleet).await).await?;
    fleet.start_people().await?;

    let expected = Arc::new(ExpectedFailures::default());
    let load = Load::start(fleet, KUBECTLS).await?;
    load.all_succeed(PATIENCE).await?;
    let end = Instant::now() + Duration::from_secs(60 * minutes);
    let broken = happen(fleet, &expected, &load, seed, end).await;
    let all_well = async {
        fleet.spread_over(2, BACK).await?;
        load.all_succeed(PATIENCE).await
    };
    let mut promises: Vec<String> = broken;
    if let Err(error) = all_well.await {
        promises.push(format!("not all is well again: {error:#}"));
    }
    let done = load.stop().await?;
    let requests = done.raw + done.kubectl + warm.raw + warm.kubectl;
    println!("{}", done.line());
    let classified = expected.classify(done.failed);
    for (fault, count) in &classified.expected {
        println!("  {count} expected after: {fault}");
    }
    for failure in classified.unexpected.iter().chain(&warm.failed) {
        println!(
            "  FAILED {:?} after {:?}: {}",
            failure.way,
            failure.at - failure.began,
            failure.why
        );
    }
    for promise in &promises {
        println!("  FAILED {promise}");
    }

    println!("counting leaks");
    let count = async || ResourceCounts::of_proxies(fleet).await;
    let mut left = leaks(GONE, &proxies, count).await?;
    fleet.stop_people().await?;
    let count = async || ResourceCounts::of_the_rest(fleet).await;
    left.extend(leaks(GONE, &rest, count).await?);
    for (what, count) in &left {
        println!("  LEAKED {what}: {count}");
    }
    Ok(Outcome {
        requests,
        failed: classified.unexpected.len() + warm.failed.len() + promises.len(),
        leaked: left.values().sum::<f64>() as usize,
    })
}

/// Lets faults happen until the end, and waits until all are undone. Gives back the promises
/// that were broken, beside failed requests.
async fn happen(
    fleet: &Arc<Fleet>,
    expected: &Arc<ExpectedFailures>,
    load: &Load,
    seed: u64,
    end: Instant,
) -> Vec<String> {
    let mut rng = StdRng::seed_from_u64(seed);
    let began = Instant::now();
    let hit: Arc<Mutex<BTreeSet<(&'static str, usize)>>> = Arc::default();
    let lock = |hit: &Mutex<BTreeSet<_>>| -> BTreeSet<(&'static str, usize)> {
        hit.lock().unwrap_or_else(PoisonError::into_inner).clone()
    };
    let mut lasting: JoinSet<Option<String>> = JoinSet::new();
    let mut broken = Vec::new();
    while Instant::now() < end && broken.is_empty() {
        let fault = Fault::draw(&mut rng, fleet.size());
        let pause = Duration::from_millis(rng.random_range(500..=PAUSE * 1000));
        let client = fault.client();
        let now = lock(&hit);
        // Relays do not hear of an agent that returns while their database is away.
        let unheard = matches!(fault, Fault::DatabaseAway { .. }) && !agents_of(&now).is_empty();
        let busy = unheard || client.is_some_and(|client| now.contains(&client));
        let at = began.elapsed().as_secs();
        if busy || lasting.len() >= AT_ONCE {
            println!("{at:>5} s  left out: {fault}");
            continue;
        }
        println!(
            "{at:>5} s  {} requests, {} failures so far; {fault}",
            load.requests(),
            load.failures().len()
        );
        if fault.is_of_relays() {
            let away = agents_of(&now);
            let done = of_relays(&fault, fleet, expected, &away).await;
            if let Err(error) = done {
                broken.push(format!("{fault}: {error:#}"));
            }
        } else {
            let (fleet, expected, hit) =
                (Arc::clone(fleet), Arc::clone(expected), Arc::clone(&hit));
            if let Some(client) = client {
                let mut hit = hit.lock().unwrap_or_else(PoisonError::into_inner);
                hit.insert(client);
            }
            lasting.spawn(async move {
                let done = fault.make(&fleet, &expected, &[]).await;
                if let Some(client) = client {
                    let mut hit = hit.lock().unwrap_or_else(PoisonError::into_inner);
                    hit.remove(&client);
                }
                done.err().map(|error| format!("{fault}: {error:#}"))
            });
        }
        while let Some(done) = lasting.try_join_next() {
            broken.extend(ended(done));
        }
        tokio::time::sleep(pause).await;
    }
    println!("{:>5} s  no more faults", began.elapsed().as_secs());
    while let Some(done) = lasting.join_next().await {
        broken.extend(ended(done));
    }
    broken
}

fn ended(done: Result<Option<String>, tokio::task::JoinError>) -> Option<String> {
    done.unwrap_or_else(|error| Some(error.to_string()))
}

fn agents_of(hit: &BTreeSet<(&'static str, usize)>) -> Vec<usize> {
    let agents = hit.iter().filter(|(kind, _)| *kind == "agent");
    agents.map(|(_, number)| *number).collect()
}

/// A fault of relays begins and ends with all agents at two of them, but those that are cut off.
async fn of_relays(
    fault: &Fault,
    fleet: &Fleet,
    expected: &ExpectedFailures,
    away: &[usize],
) -> Result<()> {
    fault.make(fleet, expected, away).await?;
    let others = faults::all_but(fleet, away);
    let back = fleet.these_spread_over(&others, 2, BACK).await?;
    println!("    agents were at two relays each {back:?} after that");
    Ok(())
}
