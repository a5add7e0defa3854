//! How cost grows: with lines that are busy at once, and with agents that are connected.

use std::time::{Duration, Instant};

use anyhow::Context;
use throwline_e2e::simulated::{Enrolled, Simulated};
use throwline_e2e::tools;
use tokio::task::JoinSet;

use crate::client::Target;
use crate::report::{self, figure};
use crate::ways::{self, Route, Side, Site, connect};

/// How long each step is under load.
const SPAN: Duration = Duration::from_secs(4);
const SETTLE: Duration = Duration::from_secs(4);
/// Connections that ask beside the idle agents.
const ASKING: usize = 16;
const LINES: [usize; 4] = [1, 10, 100, 1000];
const AGENTS: [usize; 3] = [100, 1000, 5000];
const MESSAGE: [u8; 64] = [7; 64];

pub(crate) async fn run(most_agents: usize) -> anyhow::Result<()> {
    let site = Site::start().await?;
    let (route, relay) = ways::throwline_with_relay(&site).await?;
    let mut text = format!(
        "Measured by `cargo xtask bench capacity`: {}. CPU is of relay, agent and local proxy, for one request.\n\n",
        report::described()?
    );

    text.push_str(
        "| busy lines (upgraded, 64 bytes there and back) | round trips/s | CPU µs each: relay, agent, local proxy | \
         resident MiB: relay, agent, local proxy |\n|---|---|---|---|\n",
    );
    let mut open = Vec::new();
    for lines in LINES {
        while open.len() < lines {
            open.push(route.target.upgrade().await.context("another line")?);
        }
        let mut asking = JoinSet::new();
        let meter = Meter::start(&route);
        let until = Instant::now() + SPAN;
        for mut line in open.drain(..) {
            asking.spawn(async move {
                let mut answered = 0_u64;
                while Instant::now() < until {
                    line.ask(&MESSAGE).await?;
                    answered += 1;
                }
                anyhow::Ok((line, answered))
            });
        }
        let mut answered = 0;
        while let Some(done) = asking.join_next().await {
            let (line, count) = done??;
            answered += count;
            open.push(line);
        }
        text.push_str(&meter.row(&lines.to_string(), answered));
    }
    drop(open);
    tokio::time::sleep(SETTLE).await;

    text.push_str(
        "\n| agents connected (idle, but for the one that is asked) | requests/s (small GET, 16 connections) | \
         CPU µs each: relay, agent, local proxy | resident MiB: relay, agent, local proxy |\n|---|---|---|---|\n",
    );
    let mut simulated = Simulated::new()?;
    let mut connected = 0;
    for agents in AGENTS.into_iter().filter(|agents| *agents <= most_agents) {
        println!("connecting {agents} agents");
        let prefix = format!("up-to-{agents}-");
        let more = agents - connected;
        let enrolled = Enrolled::by(&relay.state, None, &relay.public_url, &prefix, more).await?;
        connect(&mut simulated, enrolled, &relay.public_url).await?;
        connected = agents;
        tokio::time::sleep(SETTLE).await;
        let meter = Meter::start(&route);
        let answered = asked(&route.target).await?;
        text.push_str(&meter.row(&agents.to_string(), answered));
    }
    println!("\n{text}");
    let document = tools::root().join("docs/operating.md");
    let old = std::fs::read_to_string(&document)?;
    std::fs::write(&document, report::put(&old, "sizing", &text)?)?;
    simulated.stop().await;
    Ok(())
}

/// How many small requests were answered.
async fn asked(target: &Target) -> anyhow::Result<u64> {
    let mut asking = JoinSet::new();
    let until = Instant::now() + SPAN;
    for _ in 0..ASKING {
        let mut connection = target.connect().await?;
        asking.spawn(async move {
            let mut answered = 0_u64;
            while Instant::now() < until {
                connection.get(64).await?;
                answered += 1;
            }
            anyhow::Ok(answered)
        });
    }
    let mut answered = 0;
    while let Some(done) = asking.join_next().await {
        answered += done??;
    }
    Ok(answered)
}

const SIDES: [Side; 3] = [Side::Relay, Side::Agent, Side::Local];

struct Meter<'a> {
    route: &'a Route,
    began: Instant,
    cpu: [f64; 3],
}

impl<'a> Meter<'a> {
    fn start(route: &'a Route) -> Self {
        Self {
            route,
            began: Instant::now(),
            cpu: SIDES.map(|side| route.cpu_of(side)),
        }
    }

    fn row(&self, label: &str, answered: u64) -> String {
        let rate = answered as f64 / self.began.elapsed().as_secs_f64();
        let each = |place: usize| {
            let used = self.route.cpu_of(SIDES[place]) - self.cpu[place];
            figure(used * 1e6 / answered.max(1) as f64)
        };
        let resident = SIDES.map(|side| figure(self.route.resident_mib(side)));
        format!(
            "| {label} | {rate:.0} | {}, {}, {} | {} |\n",
            each(0),
            each(1),
            each(2),
            resident.join(", ")
        )
    }
}
