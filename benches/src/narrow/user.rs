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
    let measured = Measuring {
        network: &network,
        ends: &ends,
        sizes: &sizes,
        figures: &mut figures,
    }
    .all(&cells, &mut ways, usize::from(options.rounds))
    .await;
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
    // What was found until then is worth a look all the same.
    measured?;
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

struct Measuring<'a> {
    network: &'a Network,
    ends: &'a Ends,
    sizes: &'a Sizes,
    figures: &'a mut Figures,
}

impl Measuring<'_> {
    /// Each cell by each way before the next, so that what else the machine does falls on all.
    ///
    /// # Errors
    /// A way does not come back, after a change of the link or a cell that failed.
    async fn all(&mut self, cells: &[Cell], ways: &mut [Way], rounds: usize) -> anyhow::Result<()> {
        for round in 0..rounds {
            eprintln!("round {} of {rounds}", round + 1);
            let mut link = None;
            for (index, cell) in cells.iter().enumerate() {
                if link.replace(cell.0) != Some(cell.0) {
                    self.network.become_link(cell.0)?;
                    for way in ways.iter_mut() {
                        way.reconnect().await?;
                    }
                }
                for turn in 0..ways.len() {
                    // None is always the first.
                    let at = (turn + round + index) % ways.len();
                    if let Some(way) = ways.get_mut(at) {
                        self.one(*cell, way).await?;
                    }
                }
            }
        }
        Ok(())
    }

    /// A cell by one way, and a quiet link for the next.
    async fn one(&mut self, cell: Cell, way: &mut Way) -> anyhow::Result<()> {
        let (link, bulk) = cell;
        let measured = cell::measure(way, link, bulk, self.ends, self.sizes).await;
        let drained = traffic::ends(DRAIN).await;
        let whole = measured.and_then(|sample| drained.map(|()| sample));
        match whole {
            Ok(sample) => {
                self.figures.add(cell, way.name, sample);
                self.show(cell, way.name);
                Ok(())
            }
            Err(error) => {
                eprintln!("{link}, {bulk}, {}: {error:#}", way.name);
                self.figures.fail(cell, way.name, format!("{error:#}"));
                way.reconnect().await
            }
        }
    }

    fn show(&self, cell: Cell, way: &'static str) {
        let value = |measure| self.figures.value(cell, way, measure).map(figure);
        let echoes: Vec<String> = ECHOES.into_iter().filter_map(value).collect();
        eprintln!(
            "{}, {}, {way}: echo {} ms, get {} ms, bulk {} Mbit/s",
            cell.0,
            cell.1,
            echoes.join(" / "),
            value(Measure::Get).unwrap_or_default(),
            value(Measure::Rate).unwrap_or_else(|| "–".to_owned()),
        );
    }
}
