//! What an idle carrier and an idle line cost: thousands of agents that have nothing to do at one
//! relay, and hundreds of upgraded requests that stand still.

use std::time::Duration;

use anyhow::Context;
use throwline_e2e::simulated::{Enrolled, Simulated};
use throwline_e2e::{Relay, tools};

use crate::report;
use crate::ways::{Side, Site};
use crate::{proc, ways};

/// Agents that dial at once: fewer than a relay shakes hands with in a second.
const BATCH: usize = 150;
const PATIENCE: Duration = Duration::from_secs(120);
/// From the last connection until memory is read: longer than buffers are kept for, 5 s without a byte
/// that are looked for each 5 s.
const SETTLE: Duration = Duration::from_secs(12);
/// Idle lines of one user to one agent.
const LINES: usize = 500;
const KIB: f64 = 1024.0;

pub(crate) async fn run(agents: usize) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let carriers = carriers(agents).await?;
    let layers = layers().await?;
    let lines = lines(LINES).await?;
    let text = format!(
        "### An idle agent on the relay\n\n{}\n\n### An idle line\n\n{}",
        carriers.table(&layers),
        lines
    );
    println!("\n{text}");
    let readme = tools::root().join("benches/README.md");
    let old = std::fs::read_to_string(&readme)?;
    let text = format!("{}\n\n{text}", report::described()?);
    std::fs::write(&readme, report::put(&old, "idle", &text)?)?;
    Ok(())
}

struct Carriers {
    agents: usize,
    /// Resident KiB of the relay for each agent.
    each_kib: f64,
    relay_mib: f64,
}

async fn carriers(agents: usize) -> anyhow::Result<Carriers> {
    let dir = throwline_e2e::environment::private_dir()?;
    let relay = Relay::start(dir.path(), &[]).await?;
    println!("enrolling {agents} agents");
    let mut enrolled = Enrolled::at(&relay, None, agents).await?;
    println!("connecting them");
    let mut simulated = Simulated::new()?;
    // The first ones make what all share.
    let first = (agents / 50).max(1);
    simulated.dial(enrolled.split_off(first), &relay.public_url)?;
    simulated.all_connected(PATIENCE).await?;
    tokio::time::sleep(SETTLE).await;
    let before = relay.process.resident_kib()?;
    connect(&mut simulated, enrolled, &relay.public_url).await?;
    tokio::time::sleep(SETTLE).await;
    let after = relay.process.resident_kib()?;
    let failed = simulated.stop().await;
    if failed > 0 {
        println!("{failed} dials had failed");
    }
    Ok(Carriers {
        agents,
        each_kib: after.saturating_sub(before) as f64 / (agents - first).max(1) as f64,
        relay_mib: after as f64 / KIB,
    })
}

/// In batches, so that a relay's limits delay none of them.
pub(crate) async fn connect(
    simulated: &mut Simulated,
    mut enrolled: Enrolled,
    public: &str,
) -> anyhow::Result<()> {
    while !enrolled.is_empty() {
        simulated.dial(enrolled.split_off(BATCH), public)?;
        simulated.all_connected(PATIENCE).await?;
    }
    Ok(())
}

/// Bytes of each layer for one idle carrier, as `src/bin/layers.rs` counts them.
#[derive(serde::Deserialize)]
struct Layers {
    socket: f64,
    tls: f64,
    websocket: f64,
    multiplexer: f64,
    whole: f64,
}

async fn layers() -> anyhow::Result<Layers> {
    let counting = std::env::current_exe()?.with_file_name("layers");
    let output = tokio::process::Command::new(&counting)
        .stderr(std::process::Stdio::inherit())
        .output()
        .await
        .with_context(|| format!("{} is not built", counting.display()))?;
    let text = String::from_utf8(output.stdout)?;
    serde_json::from_str(&text).context("the layers were not counted")
}

impl Carriers {
    fn table(&self, layers: &Layers) -> String {
        let known = layers.socket + layers.tls + layers.websocket + layers.multiplexer;
        let pages = self.each_kib * KIB - layers.whole;
        let mut text = format!(
            "{} agents with a carrier each: the relay is {:.1} MiB resident, **{:.1} KiB an agent**.\n\n\
             | part | KiB |\n|---|---|\n",
            self.agents, self.relay_mib, self.each_kib
        );
        for (part, bytes) in [
            ("socket (the runtime's, not the kernel's)", layers.socket),
            ("TLS", layers.tls),
            ("WebSocket", layers.websocket),
            ("multiplexer, driver's task, channels", layers.multiplexer),
            (
                "session's task, registry, HTTP upgrade, admission",
                layers.whole - known,
            ),
            ("all that is allocated", layers.whole),
            ("beyond it: the allocator's own, pages partly used", pages),
        ] {
            text.push_str(&format!("| {part} | {:.1} |\n", bytes / KIB));
        }
        text
    }
}

/// A table of what one idle line costs each process.
async fn lines(count: usize) -> anyhow::Result<String> {
    let site = Site::start().await?;
    let (way, _) = ways::throwline_with_relay(&site).await?;
    let mut open = Vec::with_capacity(count);
    // The first ones make what all share.
    for _ in 0..20 {
        open.push(way.target.upgrade().await?);
    }
    tokio::time::sleep(SETTLE).await;
    let sides = [Side::Relay, Side::Agent, Side::Local];
    let before = sides.map(|side| way.resident_mib(side));
    for _ in 0..count {
        let mut line = way.target.upgrade().await?;
        line.ask(b"ahoy").await?;
        open.push(line);
    }
    tokio::time::sleep(SETTLE).await;
    let after = sides.map(|side| way.resident_mib(side));
    drop(open);
    let mut text = format!(
        "{count} upgraded requests that stand still, as `exec` does between keystrokes.\n\n\
         | process | KiB a line |\n|---|---|\n"
    );
    for (place, name) in ["relay", "agent", "local proxy"].into_iter().enumerate() {
        let each = (after[place] - before[place]) * KIB / count as f64;
        text.push_str(&format!("| {name} | {each:.1} |\n"));
    }
    Ok(text)
}

/// Idle agents in this process, while the caller counts what a relay holds for them. Prints a line when
/// all of them are connected, and runs until it is stopped.
pub(crate) async fn agents(
    state: &std::path::Path,
    public: &str,
    prefix: &str,
    count: usize,
) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let public = public.trim_end_matches('/');
    let enrolled = Enrolled::by(state, None, public, prefix, count).await?;
    let mut simulated = Simulated::new()?;
    connect(&mut simulated, enrolled, public).await?;
    println!(
        "connected, {:.0} KiB",
        proc::resident_kib(std::process::id())
    );
    std::future::pending().await
}
