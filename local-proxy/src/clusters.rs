//! `throwline clusters`: asks the relay what this user can reach.

use crate::{
    config::{Outbound, Timing},
    error::{Error, Failure},
    session::{dial_config, dial_error, open_error},
    store::Store,
};
use std::time::Duration;
use throwline_tunnel::{
    carrier::{self, Carrier},
    message,
    proto::{
        close::CloseCode,
        messages::{ClusterInfo, ClusterList, ListClusters, StreamKind},
        wire::CLUSTER_LIST_CAP,
    },
};
use tokio::time::timeout;

const ANSWER: Duration = Duration::from_secs(10);

/// The clusters that the user may reach, sorted by name, on a carrier of its own.
pub async fn clusters(store: &Store, outbound: &Outbound) -> Result<Vec<ClusterInfo>, Error> {
    let credentials = store.load()?;
    let instance = format!("{:016x}", rand::random::<u64>());
    let config = dial_config(&credentials, outbound, &Timing::default(), &instance)?;
    let connection = carrier::dial(&config)
        .await
        .map_err(|error| dial_error(&credentials, error))?;
    let listed = list(&connection.carrier).await;
    connection.carrier.close(CloseCode::Normal, "done");
    Ok(listed?)
}

pub(crate) async fn list(carrier: &Carrier) -> Result<Vec<ClusterInfo>, Failure> {
    let lost =
        |why: String| Failure::Internal(format!("the relay did not list the clusters: {why}"));
    let header = StreamKind::ListClusters(ListClusters {}).into();
    let (mut stream, _) = carrier
        .open(header)
        .await
        .map_err(|error| open_error("list", error))?;
    let list: ClusterList = timeout(ANSWER, message::read_long(&mut stream, CLUSTER_LIST_CAP))
        .await
        .map_err(|_| lost(format!("no answer within {} s", ANSWER.as_secs())))?
        .map_err(|error| lost(error.to_string()))?;
    let mut clusters = list.clusters;
    clusters.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(clusters)
}
