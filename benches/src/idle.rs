//! What an idle carrier and an idle line cost: thousands of agents that have nothing to do at one
//! relay, hundreds of them beside those of the peers' servers, and hundreds of upgraded requests that
//! stand still.

use std::time::Duration;

use anyhow::Context;
use futures::future::join_all;
use throwline_e2e::simulated::{Enrolled, Simulated};
use throwline_e2e::tools;

use crate::rows::{Figures, Row};
use crate::ways::{IdleAgents, Side, Site, THROWLINE};
use crate::{proc, report, ways};

/// From the last connection until memory is read: longer than buffers are kept for, 5 s without a byte
/// that are looked for each 5 s.
pub(crate) const SETTLE: Duration = Duration::from_secs(12);
/// Idle lines of one user to one agent.
const LINES: usize = 500;
const KIB: f64 = 1024.0;

pub(crate) async fn run(agents: usize) -> anyhow::Result<()> {
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
    held: Held,
}

async fn carriers(count: usize) -> anyhow::Result<Carriers> {
    let site = Site::start().await?;
    println!("enrolling {count} agents, then connecting them");
    let agents = IdleAgents::of(THROWLINE, &site, count).await?;
    let agents = agents.context("there is no relay")?;
    Ok(Carriers {
        agents: count,
        held: held(agents, count, SETTLE).await?,
    })
}

/// What idle agents hold at their server.
struct Held {
    /// For each of them.
    each_kib: f64,
    server_kib: f64,
}

async fn held(mut agents: IdleAgents, count: usize, settle: Duration) -> anyhow::Result<Held> {
    // The first ones make what all share, and as many handshakes at once as there ever are.
    let first = (count / 50).max(50).min(count / 2);
    agents.connect(first).await?;
    tokio::time::sleep(settle).await;
    let before = agents.server_kib();
    agents.connect(count - first).await?;
    tokio::time::sleep(settle).await;
    let after = agents.server_kib();
    Ok(Held {
        each_kib: (after - before) / (count - first).max(1) as f64,
        server_kib: after,
    })
}

/// What idle agents hold at the servers of these ways, of so many at each. All at the same time: memory does
/// not depend on what else the machine does.
pub(crate) async fn beside(
    names: impl Iterator<Item = &'static str>,
    site: &Site,
    count: usize,
    settle: Duration,
    figures: &mut Figures,
) {
    let each = names.map(|name| async move {
        let found = match IdleAgents::of(name, site, count).await {
            Ok(Some(agents)) => held(agents, count, settle).await.map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        (name, found)
    });
    for (name, found) in join_all(each).await {
        match found {
            Ok(Some(held)) => figures.add(Row::RelayIdleAgent, name, held.each_kib),
            Ok(None) => {}
            Err(error) => figures.fail(Row::RelayIdleAgent, name, format!("{error:#}")),
        }
    }
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
        let pages = self.held.each_kib * KIB - layers.whole;
        let mut text = format!(
            "{} agents with a carrier each: the relay is {:.1} MiB resident, **{:.1} KiB an agent**.\n\n\
             | part | KiB |\n|---|---|\n",
            self.agents,
            self.held.server_kib / KIB,
            self.held.each_kib
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
    let public = public.trim_end_matches('/');
    let enrolled = Enrolled::by(state, None, public, prefix, count).await?;
    let mut simulated = Simulated::new()?;
    ways::connect(&mut simulated, enrolled, public).await?;
    println!(
        "connected, {:.0} KiB",
        proc::resident_kib(std::process::id())
    );
    std::future::pending().await
}
