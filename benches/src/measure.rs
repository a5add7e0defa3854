//! What is done to measure each row, on one way in one round.

use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use throwline_e2e::kubectl::Kubectl;
use tokio::task::JoinSet;

use crate::client::{Connection, Target};
use crate::idle;
use crate::percentile::percentile;
use crate::rows::Row;
use crate::ways::{Route, Side, Way};

/// How much each measurement does.
#[derive(Debug)]
pub(crate) struct Sizes {
    /// Default number of rounds.
    pub(crate) rounds: usize,
    /// Small requests on a kept connection.
    kept: usize,
    /// The same, each on a new connection.
    fresh: usize,
    /// Bytes; a GiB, so that a peak of memory is one of a GiB.
    download: u64,
    upload: usize,
    /// How long requests a second are counted.
    together: Duration,
    /// Small requests beside what disturbs them.
    amid: usize,
    far_requests: usize,
    /// Of the path, before an answer.
    far_rest: Duration,
    far_download: u64,
    far_upload: usize,
    far_kubectl: usize,
    /// From a way's start until it counts as idle.
    pub(crate) rest: Duration,
    /// Agents that do nothing at one server.
    pub(crate) idle_agents: usize,
    /// From the last one's connection until memory is read.
    pub(crate) idle_settle: Duration,
}

impl Sizes {
    pub(crate) const FULL: Self = Self {
        rounds: 5,
        kept: 3_000,
        fresh: 300,
        download: 1 << 30,
        upload: 512 << 20,
        together: Duration::from_secs(2),
        amid: 400,
        far_requests: 5,
        far_rest: Duration::from_secs(3),
        far_download: 192 << 20,
        far_upload: 192 << 20,
        far_kubectl: 1,
        rest: Duration::from_secs(5),
        idle_agents: 200,
        idle_settle: idle::SETTLE,
    };
    /// Enough to see that everything measures; the figures mean nothing.
    pub(crate) const QUICK: Self = Self {
        rounds: 1,
        kept: 30,
        fresh: 3,
        download: 8 << 20,
        upload: 4 << 20,
        together: Duration::from_millis(100),
        amid: 5,
        far_requests: 1,
        far_rest: Duration::ZERO,
        far_download: 1 << 20,
        far_upload: 1 << 20,
        far_kubectl: 1,
        rest: Duration::ZERO,
        idle_agents: 10,
        idle_settle: Duration::ZERO,
    };
}

/// Longest that one measurement may take: a way that does not answer must not stop the others.
const LIMIT: Duration = Duration::from_secs(90);
/// Longest that a small request beside others may take; some never end.
const ONE: Duration = Duration::from_secs(10);

const SMALL: u64 = 64;
/// A few dozen pods.
const LIST: u64 = 128 * 1024;
const CONNECTIONS: usize = 64;
const DOWNLOADS: usize = 8;
const STALLED: usize = 20;
/// More than any way can hold.
const ENDLESS: u64 = 1 << 40;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Measurement {
    Kept,
    Fresh,
    Download,
    EightDownloads,
    Upload,
    Together1,
    Together40,
    AmidDownloads,
    AmidStalled,
    FarRequests,
    FarRested,
    FarDownload,
    FarUpload,
    FarKubectl,
}

type Found = Vec<(Row, f64)>;

impl Measurement {
    pub(crate) const ALL: [Self; 14] = [
        Self::Kept,
        Self::Fresh,
        Self::Download,
        Self::EightDownloads,
        Self::Upload,
        Self::Together1,
        Self::Together40,
        Self::AmidDownloads,
        Self::AmidStalled,
        Self::FarRequests,
        Self::FarRested,
        Self::FarDownload,
        Self::FarUpload,
        Self::FarKubectl,
    ];

    /// The rows that it has figures for, where the way has them; it is called by the first where it fails.
    pub(crate) fn rows(self) -> &'static [Row] {
        match self {
            Self::Kept => &[Row::KeptMedian, Row::KeptTail, Row::RelayKept],
            Self::Fresh => &[Row::Fresh],
            Self::Download => &[
                Row::Download,
                Row::Cpu,
                Row::RelayDownload,
                Row::PeakRelay,
                Row::PeakAgent,
                Row::PeakLocal,
            ],
            Self::EightDownloads => &[Row::EightDownloads],
            Self::Upload => &[Row::Upload],
            Self::Together1 => &[Row::Together1, Row::RelayTogether],
            Self::Together40 => &[Row::Together40],
            Self::AmidDownloads => &[Row::AmidDownloads],
            Self::AmidStalled => &[Row::AmidStalled],
            Self::FarRequests => &[Row::FarFirst, Row::FarKept],
            Self::FarRested => &[Row::FarRested],
            Self::FarDownload => &[Row::FarDownload],
            Self::FarUpload => &[Row::FarUpload],
            Self::FarKubectl => &[Row::FarKubectl],
        }
    }

    pub(crate) async fn run(self, way: &Way, sizes: &Sizes) -> anyhow::Result<Found> {
        let measured = tokio::time::timeout(LIMIT, self.measure(way, sizes)).await;
        measured.with_context(|| format!("it took more than {} s", LIMIT.as_secs()))?
    }

    async fn measure(self, way: &Way, sizes: &Sizes) -> anyhow::Result<Found> {
        let near = &way.near.target;
        let far = &way.far.target;
        match self {
            Self::Kept => kept(&way.near, sizes.kept).await,
            Self::Fresh => fresh(near, sizes.fresh).await,
            Self::Download => download(&way.near, sizes.download).await,
            Self::EightDownloads => eight_downloads(near, sizes.download).await,
            Self::Upload => {
                let rate = upload(near, sizes.upload).await?;
                Ok(vec![(Row::Upload, rate)])
            }
            Self::Together1 => {
                let (rate, relay) = together(&way.near, 1024, sizes.together).await?;
                let relay = relay.map(|cpu| (Row::RelayTogether, cpu));
                Ok([Some((Row::Together1, rate)), relay]
                    .into_iter()
                    .flatten()
                    .collect())
            }
            Self::Together40 => {
                let (rate, _) = together(&way.near, 40 * 1024, sizes.together).await?;
                Ok(vec![(Row::Together40, rate)])
            }
            Self::AmidDownloads => amid_downloads(near, sizes.amid).await,
            Self::AmidStalled => amid_stalled(near, sizes.amid).await,
            Self::FarRequests => far_requests(far, sizes.far_requests).await,
            Self::FarRested => far_rested(far, sizes.far_rest).await,
            Self::FarDownload => {
                // On a separate connection: that of a `kubectl cp`.
                let took = far.connect().await?.get(sizes.far_download).await?;
                let rate = megabytes_a_second(sizes.far_download, took);
                Ok(vec![(Row::FarDownload, rate)])
            }
            Self::FarUpload => {
                let rate = upload(far, sizes.far_upload).await?;
                Ok(vec![(Row::FarUpload, rate)])
            }
            Self::FarKubectl => match &way.far.kubectl {
                Some(kubectl) => get_pods(kubectl, sizes.far_kubectl).await,
                None => Ok(Vec::new()),
            },
        }
    }
}

async fn kept(route: &Route, count: usize) -> anyhow::Result<Found> {
    let mut connection = route.target.connect().await?;
    connection.get(SMALL).await?;
    let relay = RelayCpu::start(route);
    let mut times = repeated(&mut connection, count).await?;
    let relay = relay.each_micros(count as u64);
    let mut found = vec![
        (Row::KeptMedian, percentile(&mut times, 50) * 1e6),
        (Row::KeptTail, percentile(&mut times, 99) * 1e6),
    ];
    found.extend(relay.map(|cpu| (Row::RelayKept, cpu)));
    Ok(found)
}

async fn repeated(connection: &mut Connection, count: usize) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let answered = tokio::time::timeout(ONE, connection.get(SMALL)).await;
        times.push(answered.context("never answered")??);
    }
    Ok(times)
}

async fn fresh(target: &Target, count: usize) -> anyhow::Result<Found> {
    let mut times = connecting(target, count).await?;
    Ok(vec![(Row::Fresh, percentile(&mut times, 50) * 1e6)])
}

/// One small request each on a new connection, its handshakes counted.
async fn connecting(target: &Target, count: usize) -> anyhow::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        target.connect().await?.get(SMALL).await?;
        times.push(started.elapsed());
    }
    Ok(times)
}

async fn download(route: &Route, size: u64) -> anyhow::Result<Found> {
    let mut connection = route.target.connect().await?;
    connection.get(SMALL).await?;
    route.forget_peaks();
    let relay = RelayCpu::start(route);
    let before = route.cpu_seconds();
    let took = connection.get(size).await?;
    let gibibytes = size as f64 / f64::from(1 << 30);
    let mut found = vec![(Row::Download, megabytes_a_second(size, took))];
    if let Some(relay) = relay.seconds() {
        found.push((Row::Cpu, (route.cpu_seconds() - before) / gibibytes));
        found.push((Row::RelayDownload, relay / gibibytes));
    }
    for (row, side) in [
        (Row::PeakRelay, Side::Relay),
        (Row::PeakAgent, Side::Agent),
        (Row::PeakLocal, Side::Local),
    ] {
        if route.has(side) {
            found.push((row, route.peak_mib(side)));
        }
    }
    Ok(found)
}

async fn eight_downloads(target: &Target, together: u64) -> anyhow::Result<Found> {
    let each = together / DOWNLOADS as u64;
    let mut connections = connected(target, DOWNLOADS).await?;
    let started = Instant::now();
    let mut running = JoinSet::new();
    for mut connection in connections.drain(..) {
        running.spawn(async move { connection.get(each).await });
    }
    while let Some(done) = running.join_next().await {
        done??;
    }
    let rate = megabytes_a_second(each * DOWNLOADS as u64, started.elapsed());
    Ok(vec![(Row::EightDownloads, rate)])
}

/// MB/s.
async fn upload(target: &Target, size: usize) -> anyhow::Result<f64> {
    let body = Bytes::from(vec![0x5a; size]);
    let took = target.connect().await?.post(body).await?;
    Ok(megabytes_a_second(size as u64, took))
}

/// Requests a second over many kept connections at once, and the relay's CPU for each in µs.
async fn together(route: &Route, size: u64, span: Duration) -> anyhow::Result<(f64, Option<f64>)> {
    let connections = connected(&route.target, CONNECTIONS).await?;
    let relay = RelayCpu::start(route);
    let started = Instant::now();
    let mut workers = JoinSet::new();
    for mut connection in connections {
        workers.spawn(async move {
            let mut answered = 0_u64;
            while started.elapsed() < span {
                connection.get(size).await?;
                answered += 1;
            }
            anyhow::Ok(answered)
        });
    }
    let mut answered = 0;
    while let Some(worker) = workers.join_next().await {
        answered += worker??;
    }
    let rate = answered as f64 / started.elapsed().as_secs_f64();
    Ok((rate, relay.each_micros(answered)))
}

/// CPU of the relay's side alone, from a moment on.
struct RelayCpu<'a> {
    route: &'a Route,
    before: f64,
}

impl<'a> RelayCpu<'a> {
    fn start(route: &'a Route) -> Self {
        let before = route.cpu_of(Side::Relay);
        Self { route, before }
    }

    /// `None` for a way without a relay.
    fn seconds(&self) -> Option<f64> {
        let has_any = self.route.has(Side::Relay);
        has_any.then(|| self.route.cpu_of(Side::Relay) - self.before)
    }

    /// For each of so many requests.
    fn each_micros(&self, requests: u64) -> Option<f64> {
        Some(self.seconds()? * 1e6 / requests.max(1) as f64)
    }
}

/// Downloads that go on until they are dropped.
async fn amid_downloads(target: &Target, count: usize) -> anyhow::Result<Found> {
    let mut connection = target.connect().await?;
    connection.get(SMALL).await?;
    let mut running = JoinSet::new();
    for mut busy in connected(target, DOWNLOADS).await? {
        running.spawn(async move { busy.get(ENDLESS).await });
    }
    let mut times = repeated(&mut connection, count).await?;
    // One that has ended by now was none that disturbed.
    if let Some(ended) = running.try_join_next() {
        ended?.context("a download beside the small requests ended")?;
    }
    Ok(vec![(Row::AmidDownloads, percentile(&mut times, 99) * 1e3)])
}

async fn amid_stalled(target: &Target, count: usize) -> anyhow::Result<Found> {
    let mut connection = target.connect().await?;
    connection.get(SMALL).await?;
    let mut stalled = Vec::with_capacity(STALLED);
    for _ in 0..STALLED {
        stalled.push(target.stall(ENDLESS).await?);
    }
    // Until every buffer on the way is full.
    let settled = Duration::from_millis(300);
    tokio::time::sleep(settled).await;
    let mut times = repeated(&mut connection, count).await?;
    drop(stalled);
    Ok(vec![(Row::AmidStalled, percentile(&mut times, 99) * 1e6)])
}

async fn far_requests(target: &Target, count: usize) -> anyhow::Result<Found> {
    // Whatever the way keeps warm is warm.
    let mut connection = target.connect().await?;
    connection.get(SMALL).await?;
    let mut first = connecting(target, count).await?;
    let mut kept = repeated(&mut connection, count).await?;
    Ok(vec![
        (Row::FarFirst, percentile(&mut first, 50) * 1e3),
        (Row::FarKept, percentile(&mut kept, 50) * 1e3),
    ])
}

/// What kubectl gets of a cluster of some size, on a kept connection whose windows have shrunk.
async fn far_rested(target: &Target, rest: Duration) -> anyhow::Result<Found> {
    let mut connection = target.connect().await?;
    let mut times = Vec::with_capacity(3);
    for _ in 0..3 {
        connection.get(SMALL).await?;
        tokio::time::sleep(rest).await;
        times.push(connection.get(LIST).await?);
    }
    Ok(vec![(Row::FarRested, percentile(&mut times, 50) * 1e3)])
}

/// A real kubectl that knows nothing of its cluster yet.
async fn get_pods(kubectl: &Kubectl, count: usize) -> anyhow::Result<Found> {
    // The way is warm, as for all other rows.
    kubectl.ok(&["get", "--raw", "/version"]).await?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let cache = tempfile::Builder::new()
            .prefix("throwline-bench-cache-")
            .tempdir()?;
        let cache_dir = format!("--cache-dir={}", cache.path().display());
        let arguments = ["get", "pods", "--all-namespaces", &cache_dir];
        let started = Instant::now();
        kubectl.ok(&arguments).await?;
        times.push(started.elapsed());
    }
    Ok(vec![(Row::FarKubectl, percentile(&mut times, 50) * 1e3)])
}

async fn connected(target: &Target, count: usize) -> anyhow::Result<Vec<Connection>> {
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        let mut connection = target.connect().await?;
        connection.get(1).await?;
        connections.push(connection);
    }
    Ok(connections)
}

fn megabytes_a_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_row_is_of_one_measurement_but_those_of_idle_agents() {
        for row in Row::ALL {
            let all = Measurement::ALL.into_iter();
            let of_row = all.filter(|measurement| measurement.rows().contains(&row));
            let expected = match row {
                Row::IdleAgent | Row::RelayIdleAgent => 0,
                _ => 1,
            };
            assert_eq!(of_row.count(), expected, "{}", row.name());
        }
    }
}
