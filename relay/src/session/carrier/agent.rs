//! What the relay records and checks of an agent's carrier.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_tunnel::proto::messages::AgentStatus;
use tracing::{debug, warn};

use super::Session;
use crate::registry::duplicates::certificate_of_two;
use crate::registry::{Presence, Status, Tunnel};
use crate::session::text::{short, version_of};

/// How long the authority may take to record a status.
const RECORD_TIMEOUT: Duration = Duration::from_secs(5);

impl Session {
    pub(super) fn record_arrival(&mut self, software: &str) {
        // A carrier for bulk comes beside one that was recorded.
        let Some(tunnel) = (self.tunnel.as_ref()).filter(|it| !it.class.is_bulk()) else {
            return;
        };
        let sessions = Arc::clone(&self.sessions);
        let cluster = tunnel.cluster.clone();
        let version = version_of(software);
        self.streams.spawn(async move {
            // Never closed, so never an error.
            let _permit = sessions.recording.acquire().await;
            if let Err(error) = sessions
                .directory
                .record_connected(&cluster, &version)
                .await
            {
                warn!(%error, "cannot record that an agent came");
            }
        });
    }

    pub(super) async fn update_status(&self, tunnel: &Tunnel, status: AgentStatus) {
        let status = Status {
            kubernetes_version: short(status.kubernetes_version),
            agent_version: short(status.agent_version),
            api_server_reachable: status.api_server_reachable,
            message: short(status.message),
            impersonation: status.impersonation,
        };
        debug!(
            kubernetes = %status.kubernetes_version,
            reachable = status.api_server_reachable,
            "an agent sent its status"
        );
        let before = tunnel.set_status(status.clone());
        if before.is_none_or(|before| !before.same_versions(&status)) {
            self.record_status(&tunnel.cluster, &status).await;
        }
    }

    /// For the time when the agent is away. Awaited before the next message is read, so that an agent
    /// that sends statuses without end waits for the database, and no other peer does.
    async fn record_status(&self, cluster: &str, status: &Status) {
        let recorded = self.sessions.directory.record_status(
            cluster,
            &status.kubernetes_version,
            &status.agent_version,
        );
        match tokio::time::timeout(RECORD_TIMEOUT, recorded).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "cannot record an agent's status"),
            Err(_) => warn!("recording an agent's status took too long"),
        }
    }

    /// Warns of another process that has this agent's certificate.
    pub(super) async fn check_for_duplicate(&self) {
        let Some(tunnel) = (self.tunnel.as_ref()).filter(|it| !it.certificate.is_empty()) else {
            return;
        };
        let Presence::Connected(routes) = self.sessions.registry.find(&tunnel.cluster).await else {
            return;
        };
        let settled = self.sessions.config.timing.double_after;
        let found = certificate_of_two(&routes, SystemTime::now(), settled);
        if found == Some(tunnel.certificate.as_str()) {
            self.sessions.metrics.double_agents.inc();
            warn!(
                cluster = %tunnel.cluster, certificate = %tunnel.certificate,
                "two agents run with one certificate: a state directory was copied, or its key was \
                 stolen"
            );
        }
    }
}
