//! The user's side of the link, a process in its namespace: all that is measured is measured here.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use throwline_e2e::tools;

use super::bulk::Ends;
use super::cell::{self, Sizes};
use super::figures::{Cell, ECHOES, Figures, Measure};
use super::network::Network;
use super::options::Options;
use super::report::Report;
use super::site::Site;
use super::traffic;
use super::ways::{self, Way};
use crate::report::figure;
use crate::rows::DIRECT;
use crate::ways::THROWLINE;

/// How long what a way has buffered may flow on once its bulk was stopped.
const DRAIN: Duration = Duration::from_secs(60);

/// Measures, prints and publishes. `owner` has made the network, `dir` is for files of this side.
pub(super) async fn run(
    options: &Options,
    owner: u32,
    site: &Site,
    dir: &Path,
) -> anyhow::Result<()> {
    let cells = options.cells()?;
    let sizes = options.sizes();
    let network = Network::of(owner);
    let (first, _) = cells.first().context("no cells")?;
    network.become_link(*first)?;
    let (mut ways, left_out) = ways::start(&options.ways()?, site, dir).await?;
    for way in &ways {
        println!("{}: {}", way.name, way.version);
    }
    for missing in &left_out {
        println!("left out: {missing}");
    }
    let ends = Ends {
        pod: site.pod.clone(),
        source_port: site.source_port,
        dir: dir.to_owned(),
    };
    let mut figures = Figures::default();
    for round in 0..usize::from(options.rounds) {
        eprintln!("round {} of {}", round + 1, options.rounds);
        let mut link = None;
        for (index, cell) in cells.iter().enumerate() {
            if link.replace(cell.0) != Some(cell.0) {
                network.become_link(cell.0)?;
                for way in &mut ways {
                    way.reconnect().await?;
                }
            }
            for turn in 0..ways.len() {
                // None is always the first.
                let at = (turn + round + index) % ways.len();
                let Some(way) = ways.get_mut(at) else {
                    continue;
                };
                one(&mut figures, *cell, way, &ends, &sizes).await?;
            }
        }
    }
    let report = Report {
        figures: &figures,
        cells: &cells,
        ways: &ways,
        rounds: options.rounds,
        keystrokes: sizes.keystrokes,
        gets: sizes.gets,
        left_out: &left_out,
    };
    println!("\n{}\n\n{}", report.described()?, report.tables());
    if options.is_published() {
        let dir = tools::root().join("benches");
        report.publish(&dir)?;
        println!("written to {}", dir.join("README.md").display());
    }
    // That a peer cannot do something is a finding; that we cannot is a fault.
    let fault = figures
        .failures()
        .find(|(_, way, _)| [DIRECT, THROWLINE].contains(way));
    match fault {
        Some(((link, bulk), way, why)) => bail!("{way}, {link}, {bulk}: {why}"),
        None => Ok(()),
    }
}

/// A cell by one way, and a quiet link for the next.
async fn one(
    figures: &mut Figures,
    cell: Cell,
    way: &mut Way,
    ends: &Ends,
    sizes: &Sizes,
) -> anyhow::Result<()> {
    let (link, bulk) = cell;
    let measured = cell::measure(way, link, bulk, ends, sizes).await;
    let drained = traffic::ends(DRAIN).await;
    let is_whole = measured.is_ok() && drained.is_ok();
    match measured.and_then(|sample| drained.map(|()| sample)) {
        Ok(sample) => figures.add(cell, way.name, sample),
        Err(error) => {
            eprintln!("{link}, {bulk}, {}: {error:#}", way.name);
            figures.fail(cell, way.name, format!("{error:#}"));
        }
    }
    if !is_whole {
        way.reconnect().await?;
        return Ok(());
    }
    let value = |measure| figures.value(cell, way.name, measure).map(figure);
    let echoes: Vec<String> = ECHOES.into_iter().filter_map(value).collect();
    eprintln!(
        "{link}, {bulk}, {}: echo {} ms, get {} ms, bulk {} Mbit/s",
        way.name,
        echoes.join(" / "),
        value(Measure::Get).unwrap_or_default(),
        value(Measure::Rate).unwrap_or_else(|| "–".to_owned()),
    );
    Ok(())
}
