//! `ListClusters`: the clusters that a user may reach, and the present state of each.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_certs::directory::ClusterRecord;
use throwline_certs::{Directory, Kind};
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::{ClusterInfo, ClusterList, Refusal, RefusalCode};
use throwline_tunnel::proto::wire::{self, CLUSTER_LIST_CAP};
use tracing::error;

use super::answer::answer;
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::policy::{self, Policy};
use crate::refusals::refuse;
use crate::registry::duplicates::certificate_of_two;
use crate::registry::{Presence, Registry, Route};
use crate::routing::unix_ms;

/// Lists clusters for users.
pub(crate) struct ClusterLister {
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) metrics: Metrics,
    /// See [`Timing::double_after`](crate::Timing::double_after).
    pub(crate) double_after: Duration,
}

impl ClusterLister {
    pub(super) async fn serve(&self, peer: &Peer, stream: IncomingStream) {
        let list = match self.list(peer).await {
            Ok(list) => list,
            Err(refusal) => return refuse(&self.metrics, stream, refusal).await,
        };
        let bytes = match wire::encode_long(&list, CLUSTER_LIST_CAP) {
            Ok(bytes) => bytes,
            Err(error) => {
                error!(%error, clusters = list.clusters.len(), "the list of clusters is too long");
                let refusal = Refusal::new(RefusalCode::Limit, "the list of clusters is too long");
                return refuse(&self.metrics, stream, refusal).await;
            }
        };
        answer(stream, &bytes, "a list of clusters").await;
    }

    async fn list(&self, peer: &Peer) -> Result<ClusterList, Refusal> {
        if peer.identity.id.kind() != Kind::User {
            return Err(Refusal::new(
                RefusalCode::NotAllowed,
                "only users list clusters",
            ));
        }
        let records = self.directory.clusters().await.map_err(|error| {
            error!(%error, "cannot read the clusters");
            Refusal::new(
                RefusalCode::Internal,
                "the authority cannot answer now; try again later",
            )
        })?;
        let revocations = self.directory.validator().revocations();
        let now = self.directory.now();
        let mut clusters = Vec::new();
        for record in records {
            let permit = policy::permit(&*self.policy, &peer.identity, &record.name, now).await;
            if permit.is_ok() {
                let presence = self.registry.find(&record.name).await;
                let settled = self.double_after;
                let is_revoked = record.is_revoked(&revocations);
                let mut info = info(record, &presence, settled);
                if is_revoked && !info.connected {
                    info.message =
                        "its identity was revoked; enrol its agent with a new token".into();
                }
                clusters.push(info);
            }
        }
        // Which are left out of a list that is too long must not change from one to the next.
        clusters.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(ClusterList::bounded(clusters))
    }
}

/// What is shown of a cluster. A possible attack stands before the message of its agent.
fn info(record: ClusterRecord, presence: &Presence, settled: Duration) -> ClusterInfo {
    let double = match presence {
        Presence::Connected(routes) => certificate_of_two(routes, SystemTime::now(), settled),
        _ => None,
    };
    let double = double.map(|_| {
        "two agents run with one certificate: a copied state directory, or a stolen key".to_owned()
    });
    let twice = record.renewed_twice_at.map(|at| {
        format!(
            "one of its certificates was renewed with two keys on {}: a copied state directory, or a \
             stolen key",
            date(at)
        )
    });
    let mut info = shown(record, presence);
    let mut said: Vec<String> = double.into_iter().chain(twice).collect();
    if !info.message.is_empty() {
        said.push(std::mem::take(&mut info.message));
    }
    info.message = said.join("; ");
    info
}

fn date(at: SystemTime) -> String {
    time::OffsetDateTime::from(at).date().to_string()
}

fn shown(record: ClusterRecord, presence: &Presence) -> ClusterInfo {
    let mut info = ClusterInfo {
        name: record.name,
        connected: false,
        since_unix_ms: record.last_seen_at.map_or(0, unix_ms),
        kubernetes_version: record.kubernetes_version.unwrap_or_default(),
        agent_version: record.agent_version.unwrap_or_default(),
        ..ClusterInfo::default()
    };
    let Presence::Connected(routes) = presence else {
        if info.since_unix_ms == 0 {
            info.message = "its agent has never connected".into();
        }
        return info;
    };
    info.connected = true;
    // Carriers for bulk come and go with transfers; those that stay tell how well the cluster is reached.
    let lasting = routes.iter().filter(|route| !route.class().is_bulk());
    info.carriers = u32::try_from(lasting.count()).unwrap_or(u32::MAX);
    let since = routes.iter().map(Route::since).min();
    info.since_unix_ms = since.map_or(0, unix_ms);
    // For tunnels at other relays, the cluster's record has the agent's versions.
    let tunnels = || routes.iter().filter_map(Route::here);
    let round_trip = tunnels()
        .filter_map(|tunnel| tunnel.carrier.round_trip())
        .min();
    info.round_trip_us = round_trip.map_or(0, |time| {
        u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
    });
    // The newest carrier with a status has the current one.
    let newest = tunnels()
        .filter_map(|tunnel| Some((tunnel.since, tunnel.status()?)))
        .max_by_key(|(since, _)| *since);
    if let Some((_, status)) = newest {
        info.kubernetes_version = status.kubernetes_version;
        info.agent_version = status.agent_version;
        info.impersonation = status.impersonation;
        info.message = match (status.api_server_reachable, status.message) {
            (false, message) if message.is_empty() => {
                "its agent cannot reach the API server".into()
            }
            (_, message) => message,
        };
    }
    info
}
