//! A process's metrics, from its admin listener.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// One GET over plain HTTP/1.1: the status and the body.
pub async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    ask("GET", address, path, "").await
}

/// One POST without a body, with these header lines, each with its end.
pub async fn post(address: SocketAddr, path: &str, headers: &str) -> Result<(u16, String)> {
    ask("POST", address, path, headers).await
}

async fn ask(
    method: &str,
    address: SocketAddr,
    path: &str,
    headers: &str,
) -> Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)
        .await
        .with_context(|| format!("{address}"))?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\n{headers}Content-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    Ok((status.context("no HTTP status")?, body.to_owned()))
}

pub async fn ready(address: SocketAddr) -> Result<()> {
    let (status, body) = get(address, "/readyz").await?;
    ensure!(status == 200, "not ready: {status} {body}");
    Ok(())
}

/// A scrape.
#[derive(Debug, Clone)]
pub struct Metrics(String);

impl Metrics {
    pub async fn of(address: SocketAddr) -> Result<Self> {
        let (status, body) = get(address, "/metrics").await?;
        ensure!(status == 200, "no metrics: {status}");
        Ok(Self(body))
    }

    /// The sum over all label values of those samples whose line holds all of `labels`; none
    /// counts as zero.
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        self.0
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter(|line| {
                line.strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with([' ', '{']))
                    && labels.iter().all(|label| line.contains(label))
            })
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    }

    /// Whether there is such a metric at all: a story must not pass because a name changed.
    pub fn has(&self, name: &str) -> bool {
        self.0.lines().any(|line| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with([' ', '{']))
        })
    }

    pub fn text(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_summed_by_whole_name_and_label() {
        let metrics = Metrics(
            "# TYPE a_total counter\na_total{kind=\"x\"} 2\na_total{kind=\"y\"} 3\na_total_b 9\nlines 4\n"
                .to_owned(),
        );
        assert_eq!(metrics.sum("a_total", &[]), 5.0);
        assert_eq!(metrics.sum("a_total", &["kind=\"y\""]), 3.0);
        assert_eq!(metrics.sum("lines", &[]), 4.0);
        assert!(!metrics.has("line"));
    }
}
