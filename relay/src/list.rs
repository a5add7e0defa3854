//! `ListClusters`: what a user may reach, and how it is with each right now.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use throwline_certs::Kind;
use throwline_certs::authority::ClusterRecord;
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::{
    ClusterInfo, ClusterList, Refusal, RefusalCode, StreamReply,
};
use throwline_tunnel::proto::wire::{self, CLUSTER_LIST_CAP};
use tokio::io::AsyncWriteExt;
use tracing::{debug, error};

use crate::policy::Decision;
use crate::registry::{Presence, Route};
use crate::relay::Shared;
use crate::session::Peer;

pub(crate) async fn handle(shared: Arc<Shared>, peer: Arc<Peer>, stream: IncomingStream) {
    let list = match list(&shared, &peer).await {
        Ok(list) => list,
        Err(refused) => {
            shared.refuse(stream, refused).await;
            return;
        }
    };
    let bytes = match wire::encode_long(&list, CLUSTER_LIST_CAP) {
        Ok(bytes) => bytes,
        Err(error) => {
            error!(%error, clusters = list.clusters.len(), "the list of clusters is too long");
            let refused = Refusal::new(RefusalCode::Limit, "the list of clusters is too long");
            shared.refuse(stream, refused).await;
            return;
        }
    };
    let sent = async {
        let mut stream = stream.accept(StreamReply::accepted()).await?;
        stream.write_all(&bytes).await?;
        stream.shutdown().await
    };
    if let Err(error) = sent.await {
        debug!(%error, "a list of clusters was not read to its end");
    }
}

async fn list(shared: &Shared, peer: &Peer) -> Result<ClusterList, Refusal> {
    if peer.identity.id.kind() != Kind::User {
        return Err(Refusal::new(
            RefusalCode::NotAllowed,
            "only users list clusters",
        ));
    }
    let records = shared.authority.clusters().await.map_err(|error| {
        error!(%error, "cannot read the clusters");
        Refusal::new(RefusalCode::Internal, "the authority cannot answer now")
    })?;
    let mut clusters = Vec::new();
    for record in records {
        if shared.policy.decide(&peer.identity, &record.name).await == Decision::Allowed {
            let presence = shared.registry.find(&record.name).await;
            clusters.push(info(record, &presence));
        }
    }
    Ok(ClusterList { clusters })
}

fn info(record: ClusterRecord, presence: &Presence) -> ClusterInfo {
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
    info.carriers = u32::try_from(routes.len()).unwrap_or(u32::MAX);
    let since = routes.iter().map(Route::since).min();
    info.since_unix_ms = since.map_or(0, unix_ms);
    // What another relay knows better is in the cluster's record.
    let tunnels = || routes.iter().filter_map(Route::here);
    let round_trip = tunnels()
        .filter_map(|tunnel| tunnel.carrier.round_trip())
        .min();
    info.round_trip_us = round_trip.map_or(0, |time| {
        u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
    });
    // The newest carrier that has said anything knows best.
    let newest = tunnels()
        .filter_map(|tunnel| Some((tunnel.since, tunnel.status()?)))
        .max_by_key(|(since, _)| *since);
    if let Some((_, status)) = newest {
        info.kubernetes_version = status.kubernetes_version;
        info.agent_version = status.agent_version;
        info.message = match (status.api_server_reachable, status.message) {
            (false, message) if message.is_empty() => {
                "its agent cannot reach the API server".into()
            }
            (_, message) => message,
        };
    }
    info
}

pub(crate) fn unix_ms(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
