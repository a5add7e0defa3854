//! An agent's carrier at this relay.

use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use throwline_ops::Shares;
use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::proto::traffic::TrafficClass;

/// One agent's carrier, as routing sees it.
pub struct Tunnel {
    /// From the agent's certificate, never from its messages.
    pub cluster: String,
    /// The agent's own name for its process.
    pub instance: String,
    /// The serial of the certificate that it proved; empty where replicas share one.
    pub certificate: String,
    pub carrier: Carrier,
    /// What the agent has dialled the carrier for.
    pub class: TrafficClass,
    /// The streams that the carrier has for lines, shared fairly among users.
    pub lines: Shares,
    pub since: SystemTime,
    status: Mutex<Option<Status>>,
}

/// The last status of an agent. It is unverified, and for display only.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    pub kubernetes_version: String,
    pub agent_version: String,
    pub api_server_reachable: bool,
    pub message: String,
    pub impersonation: i32,
}

impl Tunnel {
    pub fn new(
        cluster: String,
        instance: String,
        certificate: String,
        carrier: Carrier,
        class: TrafficClass,
        lines: Shares,
    ) -> Self {
        Self {
            cluster,
            instance,
            certificate,
            carrier,
            class,
            lines,
            since: SystemTime::now(),
            status: Mutex::new(None),
        }
    }

    pub fn status(&self) -> Option<Status> {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Returns the status before.
    pub fn set_status(&self, status: Status) -> Option<Status> {
        self.status
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .replace(status)
    }
}

impl Status {
    pub(crate) fn same_versions(&self, other: &Self) -> bool {
        self.kubernetes_version == other.kubernetes_version
            && self.agent_version == other.agent_version
    }
}
