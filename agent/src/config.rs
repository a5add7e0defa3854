//! What an agent is told, typed; and what an enrolled agent remembers.

use std::path::{Path, PathBuf};
use std::time::Duration;

use throwline_tunnel::carrier::{self, Proxies};
use throwline_tunnel::{mux, ws};
use url::Url;

use crate::audit::Audit;
use crate::error::Error;
use crate::upstream::{self, ClusterAccess};
use crate::{carriers, kept, session, state};

/// Everything that an agent needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The relay's public URL; every reconnect resolves its name anew.
    pub relay: Url,
    /// Holds identity, CA and relay; written when the certificate is renewed.
    pub state_dir: PathBuf,
    pub cluster: ClusterAccess,
    /// A CA for what stands in front of the relay, or is a proxy on the way to it, beside the
    /// system's and the authority's own.
    pub extra_ca: Option<PathBuf>,
    /// Whether a proxy is on the way to the relay. Default: none is.
    pub proxies: Proxies,
    pub audit: Audit,
    /// Refuse requests (503) while the audit cannot be written. Default false: events are then
    /// lost, counted and said in the log.
    pub audit_required: bool,
    /// Tell the cluster the fingerprint of the user's certificate, as an extra of the impersonated
    /// user. Default true; needs the verb `impersonate` on `userextras/throwline.dev/credential-id`.
    pub credential_extra: bool,
    pub timing: Timing,
    pub limits: Limits,
}

/// Knobs of time.
#[derive(Debug, Clone)]
pub struct Timing {
    pub carrier: carrier::Timing,
    pub carriers: carriers::Config,
    /// How long requests under way may go on after the agent was told to stop. Default 10 s; what
    /// is then left is reset.
    pub drain: Duration,
    /// The API server is asked for its version this often, for `throwline clusters`; six times as
    /// often while it is not reachable. Default 60 s, one small request.
    pub status: Duration,
    /// Between two attempts to renew the certificate, ± 20 %. Default 5 min; renewal begins at two
    /// thirds of its life.
    pub renew_retry: Duration,
}

/// Knobs of size.
#[derive(Debug, Clone, Default)]
pub struct Limits {
    pub session: session::Limits,
    pub upstream: upstream::Limits,
    pub ws: Option<ws::Config>,
    pub mux: Option<mux::Config>,
    pub lines: Lines,
    pub kept: kept::Limits,
}

/// Lines (sealed sessions) that the agent carries at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lines {
    /// Default 2,000; more are refused with a reason. Idle, each costs its TLS and line buffers,
    /// about 100 KiB; worst case 2 MiB, when both ends of it stall.
    pub most: usize,
    /// Audit events that may wait for their file. Default 4,096.
    pub audit_queue: usize,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            most: 2000,
            audit_queue: 4096,
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            carrier: carrier::Timing::default(),
            carriers: carriers::Config::default(),
            drain: Duration::from_secs(10),
            status: Duration::from_secs(60),
            renew_retry: Duration::from_secs(5 * 60),
        }
    }
}

impl Config {
    /// The defaults, for an agent that was enrolled into `state_dir`.
    pub fn new(relay: Url, state_dir: impl Into<PathBuf>, cluster: ClusterAccess) -> Self {
        Self {
            relay,
            state_dir: state_dir.into(),
            cluster,
            extra_ca: None,
            proxies: Proxies::none(),
            audit: Audit::default(),
            audit_required: false,
            credential_extra: true,
            timing: Timing::default(),
            limits: Limits::default(),
        }
    }

    /// The same with what enrolment has left in `state_dir`.
    ///
    /// # Errors
    /// [`Error::NotEnrolled`], or a state directory that cannot be read.
    pub fn load(state_dir: &Path, cluster: ClusterAccess) -> Result<Self, Error> {
        let remembered = state::load(state_dir)?;
        let mut config = Self::new(remembered.relay, state_dir, cluster);
        config.extra_ca = remembered.ca_file;
        Ok(config)
    }
}

/// `relay.json`: what enrolment learned that a later start needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remembered {
    pub(crate) relay: Url,
    pub(crate) ca_file: Option<PathBuf>,
}
