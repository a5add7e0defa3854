//! The knobs of a pool of carriers.

use std::time::Duration;

use throwline_tunnel::proto::backoff;

/// How carriers are kept. The defaults are an agent's.
#[derive(Debug, Clone)]
pub struct Config {
    /// Carriers to keep where there is more than one relay. Default 2; a relay that is alone
    /// gets one.
    pub count: usize,
    /// Waits between dials that fail.
    pub backoff: backoff::Config,
    /// How the first dial after a loss is timed, if not by the back-off. Default `None`.
    pub first_retry: Option<FirstRetry>,
    /// The mean wait before the next dial while work waits for a carrier
    /// ([`UplinkHandler::urgent`](crate::UplinkHandler::urgent)), ± 20 %. Default 3 s. Lines that were
    /// cut wait for the detached life at most (120 s), so it costs some forty dials for each agent that
    /// has any.
    pub urgent: Duration,
    /// A carrier is replaced after this ± 20 %. Default 2 h: balancers cut what is older (Azure
    /// Front Door 4 h), and the load spreads over new relays.
    pub rotate: Duration,
    /// Between two attempts to replace a carrier that still works. Default `None`: the back-off.
    pub replace_retry: Option<Duration>,
    /// From a successor's welcome to the request that the old carrier's sessions move. Default
    /// 1 s, in which the relays learn of the new way from each other.
    pub settle: Duration,
    /// How long a replaced carrier may stay open for the streams that it has. Default `None`: until
    /// the relay ends it with its certificate.
    pub retire: Option<Duration>,
    /// Over how long agents spread their move when the set of relays grows. Default 10 s.
    pub spread: Duration,
    /// The longest delay, and the longest spread, of a relay's request to move. Default 10 min; a
    /// hostile relay can keep a carrier for so long.
    pub max_drain: Duration,
    /// Whether what happens to carriers is logged at the level debug, because the handler logs what an
    /// operator needs. Default no.
    pub quiet: bool,
    /// Whether a control stream is opened on each carrier. Default yes; relays have none among each
    /// other.
    pub control: bool,
}

/// The first dial after the loss of a carrier that had worked.
#[derive(Debug, Clone, Copy)]
pub struct FirstRetry {
    /// It is made at a random time within this.
    pub within: Duration,
    /// How long the carrier must have lived.
    pub settled: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let backoff = backoff::Config::default();
        Self {
            count: 2,
            backoff,
            first_retry: None,
            urgent: Duration::from_secs(3),
            rotate: Duration::from_secs(2 * 60 * 60),
            replace_retry: None,
            settle: Duration::from_secs(1),
            retire: None,
            spread: Duration::from_secs(10),
            max_drain: backoff.max_asked,
            quiet: false,
            control: true,
        }
    }
}
