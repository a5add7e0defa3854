//! What a local proxy can be told, and the one place that reads the environment.

use crate::metrics::Metrics;
use std::{
    env,
    path::{Path, PathBuf},
    time::Duration,
};
use throwline_tunnel::{self as tunnel, carrier::Proxies};

/// The port that kubeconfig entries name unless it is busy.
pub const DEFAULT_PORT: u16 = 47611;

/// Everything [`crate::run()`] needs.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the identity, the relay's address and the loopback certificates are.
    pub state_dir: PathBuf,
    /// Clusters to serve. Empty, the default: all that the user may reach.
    pub clusters: Vec<String>,
    /// Port to try first. Default: the last one used, else [`DEFAULT_PORT`]. A busy port is stepped
    /// over. 0 lets the system choose.
    pub port: Option<u16>,
    /// The file that gets the entries `throwline-NAME`; `None` writes none.
    pub kubeconfig: Option<PathBuf>,
    /// Whether `current-context` is set to the first of our contexts. Default: no, unless the
    /// file has none.
    pub set_current: bool,
    pub outbound: Outbound,
    pub timing: Timing,
    /// Counters; give a registered one to have them served.
    pub metrics: Metrics,
}

impl Config {
    /// Defaults, for the identity in `state_dir`.
    #[must_use]
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            state_dir: state_dir.into(),
            clusters: Vec::new(),
            port: None,
            kubeconfig: None,
            set_current: false,
            outbound: Outbound::default(),
            timing: Timing::default(),
            metrics: Metrics::new(),
        }
    }
}

/// The way out to the relay.
#[derive(Clone, Debug, Default)]
pub struct Outbound {
    /// Further certificate authorities for TLS with the relay and with a proxy, as a PEM file;
    /// overrides the one remembered at login.
    pub extra_ca: Option<PathBuf>,
    /// Whether a proxy is on the way. Default: none is.
    pub proxies: Proxies,
}

/// How long the local proxy waits for what.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Bound on a loopback TLS handshake. Default 10 s; costs one of
    /// [`crate::server::HALF_OPEN`] slots while it lasts.
    pub handshake: Duration,
    /// Bound on an HTTP/1.1 request head, and on how long an idle kept connection lives, which
    /// hyper times with the same clock. Default 17 s: short enough for a dripping client, and no
    /// divisor of the 10, 15, 20 or 30 s at which tools poll, whose next request would meet the close.
    pub request_head: Duration,
    /// How long a request waits while the relay cannot be reached. Default 8 s; longer, and
    /// people take kubectl for hung.
    pub wait_for_relay: Duration,
    /// How long the carrier outlives the last request before it is no longer re-dialled.
    /// Default 15 min.
    pub carrier_idle: Duration,
    /// A carrier is replaced, make before break, at this age ± 20 %: balancers have hard limits.
    /// Default 2 h, at least 1 s; costs a handshake each time.
    pub rotate: Duration,
    /// How long an API session or a warm spare is kept without use. Default 10 min; costs one
    /// stream and about 50 KiB on each side.
    pub session_idle: Duration,
    /// How long a line may be without a stream, if the agent agrees: so long, kubectl waits for a
    /// relay or a network that is away. Default 120 s; zero turns resumption off. Costs at most a
    /// window (1 MiB) each way and line.
    pub detached: Duration,
    /// HTTP/2 PING interval on an API session whose line ends with its carrier, and the time its
    /// answer may take. Default 20 s.
    pub session_ping: Duration,
    /// What open requests get to finish at shutdown before they are cut. Default 3 s.
    pub drain: Duration,
    /// The carrier's own clocks.
    pub carrier: tunnel::carrier::Timing,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            request_head: Duration::from_secs(17),
            wait_for_relay: Duration::from_secs(8),
            carrier_idle: Duration::from_secs(15 * 60),
            rotate: Duration::from_secs(2 * 60 * 60),
            session_idle: Duration::from_secs(10 * 60),
            detached: Duration::from_secs(120),
            session_ping: Duration::from_secs(20),
            drain: Duration::from_secs(3),
            carrier: tunnel::carrier::Timing::default(),
        }
    }
}

/// `$THROWLINE_STATE_DIR`, else `~/.throwline`; `None` without a home.
#[must_use]
pub fn default_state_dir() -> Option<PathBuf> {
    non_empty("THROWLINE_STATE_DIR")
        .map(PathBuf::from)
        .or_else(|| home().map(|home| home.join(".throwline")))
}

/// The file kubectl itself would write: the first of `$KUBECONFIG`'s entries, else `~/.kube/config`.
#[must_use]
pub fn default_kubeconfig() -> Option<PathBuf> {
    kubeconfig_from(non_empty("KUBECONFIG").as_deref(), home().as_deref())
}

fn kubeconfig_from(variable: Option<&std::ffi::OsStr>, home: Option<&Path>) -> Option<PathBuf> {
    variable
        .and_then(|paths| env::split_paths(paths).find(|path| !path.as_os_str().is_empty()))
        .or_else(|| home.map(|home| home.join(".kube").join("config")))
}

fn home() -> Option<PathBuf> {
    non_empty("HOME").map(PathBuf::from)
}

fn non_empty(name: &str) -> Option<std::ffi::OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    #[test]
    fn the_first_usable_entry_of_the_variable_wins_over_the_home() {
        let home = Path::new("/home/ann");
        let pick = |variable: Option<&str>| kubeconfig_from(variable.map(OsStr::new), Some(home));
        assert_eq!(pick(Some("/a:/b")), Some("/a".into()));
        assert_eq!(pick(Some(":/b")), Some("/b".into()));
        assert_eq!(pick(Some(":")), Some("/home/ann/.kube/config".into()));
        assert_eq!(pick(None), Some("/home/ann/.kube/config".into()));
        assert_eq!(kubeconfig_from(None, None), None);
    }
}
