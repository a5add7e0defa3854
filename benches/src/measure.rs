//! What is measured on one way in one round.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::client::Target;

/// How much each measurement does.
pub(crate) struct Sizes {
    pub(crate) kept: usize,
    pub(crate) fresh: usize,
    pub(crate) download: u64,
    pub(crate) upload: usize,
    pub(crate) together: Duration,
}

impl Sizes {
    pub(crate) const FULL: Self = Self {
        kept: 3_000,
        fresh: 300,
        download: 512 << 20,
        upload: 256 << 20,
        together: Duration::from_secs(3),
    };
    /// Enough to see that everything measures; the figures mean nothing.
    pub(crate) const QUICK: Self = Self {
        kept: 50,
        fresh: 10,
        download: 16 << 20,
        upload: 8 << 20,
        together: Duration::from_millis(300),
    };
}

/// One figure of one row.
pub(crate) struct Sample {
    pub(crate) row: &'static str,
    pub(crate) value: f64,
}

/// The rows, in the order of the report: name, unit, whether less is better.
pub(crate) const ROWS: [(&str, &str, bool); 8] = [
    (KEPT_P50, "µs", true),
    (KEPT_P99, "µs", true),
    (FRESH_P50, "µs", true),
    (FRESH_P99, "µs", true),
    (DOWNLOAD, "MB/s", false),
    (CPU, "s/GiB", true),
    (UPLOAD, "MB/s", false),
    (TOGETHER, "requests/s", false),
];

const KEPT_P50: &str = "small GET, kept connection, p50";
const KEPT_P99: &str = "small GET, kept connection, p99";
const FRESH_P50: &str = "small GET, new TCP and TLS each, p50";
const FRESH_P99: &str = "small GET, new TCP and TLS each, p99";
const DOWNLOAD: &str = "bulk download, one connection";
/// Of relay, agent and local proxy together; a direct connection has none of them.
const CPU: &str = "CPU of the three processes, download";
const UPLOAD: &str = "bulk upload, one connection";
const TOGETHER: &str = "64 connections, 1 KiB answers";

const CONNECTIONS: usize = 64;

/// Measures every row once; `cpu` reads the CPU seconds that the product has used so far.
pub(crate) async fn round(
    target: &Target,
    sizes: &Sizes,
    cpu: impl Fn() -> f64,
) -> anyhow::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let mut sample = |row, value| samples.push(Sample { row, value });

    let mut kept = target.connect().await?;
    kept.get(64).await?;
    let mut times = Vec::with_capacity(sizes.kept);
    for _ in 0..sizes.kept {
        times.push(kept.get(64).await?);
    }
    sample(KEPT_P50, percentile(&mut times, 50));
    sample(KEPT_P99, percentile(&mut times, 99));

    let mut times = Vec::with_capacity(sizes.fresh);
    for _ in 0..sizes.fresh {
        let started = Instant::now();
        target.connect().await?.get(64).await?;
        times.push(started.elapsed());
    }
    sample(FRESH_P50, percentile(&mut times, 50));
    sample(FRESH_P99, percentile(&mut times, 99));

    let before = cpu();
    let took = kept.get(sizes.download).await?;
    sample(DOWNLOAD, megabytes_a_second(sizes.download, took));
    sample(
        CPU,
        (cpu() - before) / (sizes.download as f64 / f64::from(1 << 30)),
    );

    let body = Bytes::from(vec![0x5a; sizes.upload]);
    let took = kept.post(body).await?;
    sample(UPLOAD, megabytes_a_second(sizes.upload as u64, took));

    sample(TOGETHER, together(target, sizes.together).await?);
    Ok(samples)
}

/// Requests a second over many kept connections at once.
async fn together(target: &Target, span: Duration) -> anyhow::Result<f64> {
    let mut connections = Vec::with_capacity(CONNECTIONS);
    for _ in 0..CONNECTIONS {
        connections.push(target.connect().await?);
    }
    let started = Instant::now();
    let workers: Vec<_> = connections
        .into_iter()
        .map(|mut connection| {
            tokio::spawn(async move {
                let mut answered = 0_u64;
                while started.elapsed() < span {
                    connection.get(1024).await?;
                    answered += 1;
                }
                anyhow::Ok(answered)
            })
        })
        .collect();
    let mut answered = 0;
    for worker in workers {
        answered += worker.await??;
    }
    Ok(answered as f64 / started.elapsed().as_secs_f64())
}

fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    let rank = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times
        .get(rank)
        .map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
}

fn megabytes_a_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / 1e6 / took.as_secs_f64()
}
