//! The clocks of a carrier.

use std::time::Duration;

use super::DialError;

/// The clocks of a carrier.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Mean time between pings. Default 18 s: below the 30–60 s after which common load balancers
    /// drop an idle connection. The relay's Welcome may lower the dialer's. Cost: about 100 bytes
    /// on the wire each.
    pub ping_interval: Duration,
    /// Each interval is drawn from ± this share. Default 0.2.
    pub ping_jitter: f64,
    /// Without one inbound byte for this long the carrier is dead. Default 50 s, which three lost
    /// pings fit into.
    pub dead_after: Duration,
    /// With bytes to send, and none accepted by the network for this long, the carrier is dead.
    /// Default 30 s.
    pub write_stall: Duration,
    /// Challenge, proof and welcome together. Default 5 s; the longest that an unproven dialer
    /// holds a connection.
    pub handshake: Duration,
    /// TCP, TLS and HTTP upgrade of a dial, each, and the same with a proxy on the way. Default
    /// 10 s.
    pub connect: Duration,
    /// From opening a stream to the acceptor's reply. Default 10 s.
    pub open: Duration,
    /// From a stream's first frame to its complete header. Default 10 s; a silent stream holds
    /// one place below `max_streams` for so long.
    pub header: Duration,
    /// For graceful ends: the close handshake of a carrier, the last bytes of a dropped stream.
    /// Default 2 s.
    pub close: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            ping_interval: Duration::from_secs(18),
            ping_jitter: 0.2,
            dead_after: Duration::from_secs(50),
            write_stall: Duration::from_secs(30),
            handshake: Duration::from_secs(5),
            connect: Duration::from_secs(10),
            open: Duration::from_secs(10),
            header: Duration::from_secs(10),
            close: Duration::from_secs(2),
        }
    }
}

/// A step of a dial, within its limit.
pub(super) async fn timely<T>(
    within: Duration,
    phase: &'static str,
    step: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    match tokio::time::timeout(within, step).await {
        Ok(result) => result,
        Err(_) => Err(DialError::Timeout {
            phase,
            after: within,
        }),
    }
}
