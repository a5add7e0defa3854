//! The configuration of a local proxy, and the one place of this crate that reads the environment.

use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use throwline_tunnel::bdp;
use throwline_tunnel::carrier::{self, Proxies};

use crate::kubeconfig::Files;
use crate::metrics::Metrics;

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
    /// The files that get the entries `throwline-NAME`; `None` writes none.
    pub kubeconfig: Option<Files>,
    /// Whether `current-context` is set to the first of our contexts. Default: no.
    pub set_current: bool,
    pub outbound: Outbound,
    pub timing: Timing,
    pub limits: Limits,
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
            limits: Limits::default(),
            metrics: Metrics::new(),
        }
    }
}

/// The way out to the relay.
#[derive(Clone, Debug, Default)]
pub struct Outbound {
    /// Further certificate authorities for TLS with the relay and with a proxy, as a PEM file;
    /// overrides the one remembered at login. Default: none; the relay must have a certificate of the
    /// authority, a proxy one of the authority or of the system's store.
    pub extra_ca: Option<PathBuf>,
    /// Whether the system's certificate authorities are trusted for the relay, too. The choice made at
    /// login is remembered and is enough. Default: no.
    pub system_ca: bool,
    /// HTTP proxies on the way. Default: none.
    pub proxies: Proxies,
}

/// Knobs of time.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Bound on a loopback TLS handshake. Default 10 s; an unfinished one holds one of
    /// [`LoopbackLimits::half_open`] slots.
    pub handshake: Duration,
    /// Bound on an HTTP/1.1 request head, and on how long an idle kept connection lives, which
    /// hyper times with the same clock. Default 17 s: short enough for a dripping client, and no
    /// divisor of the 10, 15, 20 or 30 s at which tools poll, whose next request would meet the close.
    pub request_head: Duration,
    /// How long a request waits while the relay cannot be reached. Default 8 s; longer, and
    /// people take kubectl for hung.
    pub wait_for_relay: Duration,
    /// How long a line may be detached before a GET or HEAD on it is sent again on another session.
    /// Default 1 s; costs at most a second execution of a request without effects.
    pub resend_after: Duration,
    /// How long the carrier outlives the last request before it is no longer re-dialled.
    /// Default 15 min.
    pub carrier_idle: Duration,
    /// A carrier is replaced, make before break, at this age ± 20 %: balancers have hard limits.
    /// Default 2 h, at least 1 s; costs a handshake each time.
    pub carrier_life: Duration,
    /// How long an API session or a warm spare is kept without use. Default 10 min; costs one
    /// stream and about 50 KiB on each side.
    pub session_idle: Duration,
    /// How long a line may be without a stream, if the agent agrees: so long, kubectl waits for a
    /// relay or a network that is away. Default 120 s; zero turns resumption off. Costs at most a
    /// window (1 MiB) each way and line.
    pub detached_life: Duration,
    /// The same of an API session beside another one to its cluster, which was opened for many
    /// requests at once. Default 10 s.
    pub surplus_session_idle: Duration,
    /// Between two attempts to renew the certificate, ± 20 %. Default 5 min; renewal begins at two
    /// thirds of its life.
    pub renew_retry: Duration,
    /// HTTP/2 PING interval on an API session whose line ends with its carrier, and the time its
    /// answer may take. Default 20 s.
    pub session_ping: Duration,
    /// Interval between two lists of clusters from the relay, where all are served; 20 times as
    /// long while there is no carrier. Default 30 s, ± 20 %; costs a stream each time, and
    /// a handshake where there is no carrier.
    pub list: Duration,
    /// How long open requests may go on at shutdown before they are reset. Default 3 s.
    pub drain: Duration,
    /// The carrier's own clocks.
    pub carrier: carrier::Timing,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            request_head: Duration::from_secs(17),
            wait_for_relay: Duration::from_secs(8),
            resend_after: Duration::from_secs(1),
            carrier_idle: Duration::from_secs(15 * 60),
            carrier_life: Duration::from_secs(2 * 60 * 60),
            session_idle: Duration::from_secs(10 * 60),
            surplus_session_idle: Duration::from_secs(10),
            renew_retry: Duration::from_secs(5 * 60),
            detached_life: Duration::from_secs(120),
            session_ping: Duration::from_secs(20),
            list: Duration::from_secs(30),
            drain: Duration::from_secs(3),
            carrier: carrier::Timing::default(),
        }
    }
}

/// Knobs of size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub loopback: LoopbackLimits,
    pub session: SessionLimits,
}

/// Knobs of the HTTP that kubectl speaks to the local proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopbackLimits {
    /// Connections in their TLS handshake at once. Default 256, about 10 MiB at worst. Another user
    /// of the machine can connect but not authenticate, and can hold these and no more; each new one
    /// sheds the oldest.
    pub half_open: usize,
    /// Requests at once on one HTTP/2 connection (SETTINGS_MAX_CONCURRENT_STREAMS). Default 500:
    /// k9s keeps one watch for each kind it has shown.
    pub streams: u32,
    /// Window of one HTTP/2 stream, bytes. Default 512 KiB; held for each upload whose agent stalls.
    pub stream_window: u32,
    /// Bytes of an answer that wait to be sent on one HTTP/2 stream. Default 128 KiB; held for each
    /// client that does not read.
    pub send_buffer: usize,
    /// Requests with heads over 64 KiB at once. Default 16, about 80 MiB at worst, with the copies
    /// on their way; further ones are refused with 503.
    pub large_heads: usize,
}

impl Default for LoopbackLimits {
    fn default() -> Self {
        Self {
            half_open: 256,
            streams: 500,
            stream_window: 512 * 1024,
            send_buffer: 128 * 1024,
            large_heads: 16,
        }
    }
}

/// Knobs of the HTTP between local proxy and agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionLimits {
    /// Requests on one API session before another is opened. Default 180. The agent allows 250; the
    /// rest is for requests that were leased a moment ago.
    pub streams: usize,
    /// The same of the one session to a far cluster that has larger windows. Default 8, so that
    /// readers which stall hold 144 MiB at most; further requests have another session.
    pub far_streams: usize,
    /// Window of one HTTP/2 stream, bytes. Default 512 KiB; held for each reader that stalls.
    pub stream_window: u32,
    /// The same at most, where the agent is far away. Default 18 MiB, [`bdp::STREAM_WINDOW`].
    pub far_stream_window: u32,
    /// Bytes of a request body that wait to be sent on one stream. Default 128 KiB.
    pub send_buffer: usize,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self {
            streams: 180,
            far_streams: 8,
            stream_window: 512 * 1024,
            far_stream_window: bdp::STREAM_WINDOW,
            send_buffer: 128 * 1024,
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

/// The files kubectl itself would use: those of `$KUBECONFIG`, else `~/.kube/config`.
#[must_use]
pub fn default_kubeconfig() -> Option<Files> {
    kubeconfig_from(non_empty("KUBECONFIG").as_deref(), home().as_deref())
}

fn kubeconfig_from(variable: Option<&std::ffi::OsStr>, home: Option<&Path>) -> Option<Files> {
    variable
        .and_then(|paths| Files::all(env::split_paths(paths)))
        .or_else(|| home.map(|home| Files::one(home.join(".kube").join("config"))))
}

fn home() -> Option<PathBuf> {
    non_empty("HOME").map(PathBuf::from)
}

fn non_empty(name: &str) -> Option<std::ffi::OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    #[test]
    fn all_usable_entries_of_the_variable_win_over_the_home() {
        let home = Path::new("/home/ann");
        let pick = |variable: Option<&str>| kubeconfig_from(variable.map(OsStr::new), Some(home));
        let files = |names: &[&str]| Files::all(names.iter().map(PathBuf::from));
        assert_eq!(pick(Some("/a:/b:/a")), files(&["/a", "/b"]));
        assert_eq!(pick(Some(":/b")), files(&["/b"]));
        assert_eq!(pick(Some(":")), files(&["/home/ann/.kube/config"]));
        assert_eq!(pick(None), files(&["/home/ann/.kube/config"]));
        assert_eq!(kubeconfig_from(None, None), None);
    }
}
