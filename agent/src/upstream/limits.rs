//! Knobs of the connections to the API server.

use std::time::Duration;

/// Knobs of the connections to the API server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// TCP and TLS together. Default 10 s.
    pub connect: Duration,
    /// From the end of a request to the head of its answer, for requests that are not upgrades.
    /// Default 70 s: the API server itself gives up after 60 s (`--request-timeout`).
    pub answer: Duration,
    /// Streams in flight on one HTTP/2 connection before another is opened. Default 80, below the
    /// API server's limit of 100 (SETTINGS_MAX_CONCURRENT_STREAMS).
    pub streams: usize,
    /// Connections at most. Default 64: with `streams` that is 5,120 requests and watches at once;
    /// more are refused with 503. Worst case about 64 × 80 × 0.75 MiB when every reader stalls.
    pub connections: usize,
    /// HTTP/1.1 connections at most, for what is kept off the shared connections: requests to
    /// workloads behind a `proxy` subresource, and those with large heads. Default 512; more are refused
    /// with 503. Each costs a socket and up to 128 KiB.
    pub apart: usize,
    /// Flow-control window of a stream. Default 256 KiB, plenty beside an API server; what a reader that stalls costs, together
    /// with the send buffer of 256 KiB towards it.
    pub stream_window: u32,
    /// HTTP/2 PING when nothing arrived for so long, and the time for its answer: a connection that is
    /// dead, or to an API server that hangs, fails its requests within twice this. Default 10 s.
    pub keep_alive: Duration,
    /// An extra connection without streams is closed after this. Default 60 s.
    pub idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            answer: Duration::from_secs(70),
            streams: 80,
            connections: 64,
            apart: 512,
            stream_window: 256 * 1024,
            keep_alive: Duration::from_secs(10),
            idle: Duration::from_secs(60),
        }
    }
}
