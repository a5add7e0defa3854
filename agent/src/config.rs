//! Every knob of the agent, typed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use throwline_certs::tls::Trust;
use throwline_policy::SystemNames;
use throwline_tunnel::carrier::{self, Proxies};
use throwline_tunnel::{mux, ws};
use throwline_uplink as uplink;
use url::Url;

use crate::audit::{self, Audit};
use crate::lines::line_registry;
use crate::state::secret::StateSecret;
use crate::upstream::{self, ClusterAccess};
use crate::{quotas, request, session, state};

/// Everything that an agent needs to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The relay's public URL; every reconnect resolves its name again.
    pub relay: Url,
    /// Holds identity, CA and relay; written when the certificate is renewed.
    pub state_dir: PathBuf,
    /// Where the state is kept beside that directory, shared by all replicas. Default nowhere.
    pub state_secret: Option<StateSecret>,
    pub cluster: ClusterAccess,
    /// A CA for what is in front of the relay, or for a proxy on the way to it. Default: none, and the relay
    /// is trusted by the authority's CA alone, a proxy by the system's store too.
    pub extra_ca: Option<PathBuf>,
    /// The relay is trusted by the system's store of CAs too. Default: no.
    pub system_ca: bool,
    /// The UID of the cluster that the identity is for: an agent that finds another one at its API server
    /// does not start. Default: that of the enrolment; `None` turns the check off.
    pub cluster_uid: Option<String>,
    /// The proxies on the way to the relay. Default: none.
    pub proxies: Proxies,
    pub audit: Audit,
    /// Refuse requests (503) while the audit cannot be written. Default false: events are then
    /// lost, counted and logged.
    pub audit_required: bool,
    /// Send the fingerprint of the user's certificate to the cluster, as an extra of the impersonated
    /// user. Default true; needs the verb `impersonate` on `userextras/throwline.dev/credential-id`.
    pub credential_extra: bool,
    /// Names reserved by Kubernetes that users and groups may have nevertheless. Default none.
    pub system_names: SystemNames,
    pub timing: Timing,
    pub limits: Limits,
}

/// Knobs of time.
#[derive(Debug, Clone)]
pub struct Timing {
    pub carrier: carrier::Timing,
    pub carriers: uplink::Config,
    /// How long requests under way may continue after the agent was asked to stop. Default 10 s; what
    /// is then left is reset, with that as the reason. A pod needs a little more than this as its
    /// `terminationGracePeriodSeconds`.
    pub drain: Duration,
    /// The interval at which the API server's version is read, for `throwline clusters`; a sixth of
    /// it while the API server is not reachable. Default 60 s, one small request.
    pub status: Duration,
    /// Between two attempts to renew the certificate, ± 20 %. Default 5 min; renewal begins at two
    /// thirds of its life.
    pub renew_retry: Duration,
}

/// Knobs of size.
#[derive(Debug, Clone)]
pub struct Limits {
    pub quotas: quotas::Limits,
    pub lines: line_registry::Limits,
    pub session: session::Limits,
    pub request: request::Limits,
    pub upstream: upstream::Limits,
    pub ws: Option<ws::Config>,
    pub mux: Option<mux::Config>,
    /// Audit events that may wait for their file. Default 4,096.
    pub audit_queue: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            quotas: quotas::Limits::default(),
            lines: line_registry::Limits::default(),
            session: session::Limits::default(),
            request: request::Limits::default(),
            upstream: upstream::Limits::default(),
            ws: None,
            mux: None,
            audit_queue: audit::Limits::default().queue,
        }
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            carrier: carrier::Timing::default(),
            carriers: uplink::Config::default(),
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
            state_secret: None,
            cluster,
            extra_ca: None,
            system_ca: false,
            cluster_uid: None,
            proxies: Proxies::none(),
            audit: Audit::default(),
            audit_required: false,
            credential_extra: true,
            system_names: SystemNames::default(),
            timing: Timing::default(),
            limits: Limits::default(),
        }
    }

    /// By which CAs the relay is trusted, beside the authority's.
    pub(crate) fn trust(&self) -> Trust<'_> {
        Trust {
            ca_file: self.extra_ca.as_deref(),
            system: self.system_ca,
        }
    }

    /// The same with the result of the enrolment in `state_dir`.
    ///
    /// # Errors
    /// [`StateError::NotEnrolled`](state::StateError::NotEnrolled), or a state directory that cannot be read.
    pub fn load(state_dir: &Path, cluster: ClusterAccess) -> Result<Self, state::StateError> {
        let remembered = state::load(state_dir)?;
        let mut config = Self::new(remembered.relay, state_dir, cluster);
        config.extra_ca = remembered.ca_file;
        config.system_ca = remembered.system_ca;
        config.cluster_uid = remembered.cluster_uid;
        Ok(config)
    }
}
