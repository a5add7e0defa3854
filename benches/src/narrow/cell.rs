//! One cell of the report: on one link, beside one bulk transfer, by one way.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::bulk::{Bulk, Ends, Flow};
use super::link::Link;
use super::typing::Typing;
use super::ways::Way;

/// How much is measured.
#[derive(Debug)]
pub(super) struct Sizes {
    pub(super) keystrokes: usize,
    pub(super) gets: usize,
    /// From the first bytes of bulk until the first keystroke: buffers fill, windows grow.
    pub(super) settle: Duration,
}

impl Sizes {
    pub(super) const FULL: Self = Self {
        keystrokes: 60,
        gets: 8,
        settle: Duration::from_secs(3),
    };
    /// Enough to see that everything measures; the figures mean nothing.
    pub(super) const QUICK: Self = Self {
        keystrokes: 10,
        gets: 2,
        settle: Duration::from_secs(1),
    };
}

/// Longest that a cell may take: a way that does not answer must not stop the others.
const LIMIT: Duration = Duration::from_secs(120);
/// Of the link's rate, what bulk must take at least to count as bulk. One connection of TCP that backs
/// off at each loss takes a few per cent of a fast link.
const FLOWS: f64 = 0.01;

/// What one run of a cell found.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    pub(super) echoes: Vec<Duration>,
    /// Of whole commands, each a new kubectl.
    pub(super) gets: Vec<Duration>,
    /// Of bulk, while the others were measured. In Mbit/s; none where there was no bulk.
    pub(super) rates: Vec<f64>,
}

pub(super) async fn measure(
    way: &Way,
    link: Link,
    bulk: Bulk,
    ends: &Ends,
    sizes: &Sizes,
) -> anyhow::Result<Sample> {
    let measured = tokio::time::timeout(LIMIT, sampled(way, link, bulk, ends, sizes)).await;
    measured.with_context(|| format!("it took more than {} s", LIMIT.as_secs()))?
}

async fn sampled(
    way: &Way,
    link: Link,
    bulk: Bulk,
    ends: &Ends,
    sizes: &Sizes,
) -> anyhow::Result<Sample> {
    let mut typing = Typing::start(&way.kubectl, &ends.pod).await?;
    let mut flow = Flow::start(bulk, &way.kubectl, ends).await?;
    if flow.is_some() {
        tokio::time::sleep(sizes.settle).await;
    }
    let (began, before) = (Instant::now(), arrived(flow.as_ref()));
    // One after the other: a new kubectl takes a whole core for a while.
    let echoes = typing.echoes(sizes.keystrokes).await?;
    let mut gets = Vec::with_capacity(sizes.gets);
    for _ in 0..sizes.gets {
        let started = Instant::now();
        way.kubectl.ok(&["get", "--raw", "/version"]).await?;
        gets.push(started.elapsed());
    }
    let mut rates = Vec::new();
    if let Some(mut flow) = flow.take() {
        flow.ended().await?;
        let bytes = flow.arrived() - before;
        let rate = bytes as f64 * 8.0 / began.elapsed().as_secs_f64();
        ensure!(
            rate >= link.bits_a_second() * FLOWS,
            "bulk did not flow: {bytes} bytes arrived while the others were measured"
        );
        rates.push(rate / 1e6);
        flow.stop().await?;
    }
    Ok(Sample {
        echoes,
        gets,
        rates,
    })
}

fn arrived(flow: Option<&Flow>) -> u64 {
    flow.map_or(0, Flow::arrived)
}
