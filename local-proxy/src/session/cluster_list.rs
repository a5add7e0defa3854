//! The relay's list of the clusters that the user may reach.

use std::io;
use std::time::Duration;

use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::message;
use throwline_tunnel::proto::messages::{ClusterInfo, ClusterList, ListClusters, StreamKind};
use throwline_tunnel::proto::wire::{CLUSTER_LIST_CAP, WireError};
use tokio::time::timeout;

use crate::cluster_name::is_cluster_name;
use crate::failure::Failure;
use crate::session::errors::open_error;

const ANSWER: Duration = Duration::from_secs(10);

/// Why a stream for the list brought none.
#[derive(Debug, thiserror::Error)]
enum ListError {
    #[error("the relay did not list the clusters: no answer within {} s", ANSWER.as_secs())]
    Timeout,
    #[error("the relay did not list the clusters: {0}")]
    Read(#[source] io::Error),
    #[error("the relay did not list the clusters: {0}")]
    Message(#[source] WireError),
}

/// The clusters that the user may reach, sorted by name, over this carrier.
pub(crate) async fn list(carrier: &Carrier) -> Result<Vec<ClusterInfo>, Failure> {
    let header = StreamKind::ListClusters(ListClusters {}).into();
    let (mut stream, _) = carrier
        .open(header)
        .await
        .map_err(|error| open_error("list", error))?;
    let reading = message::read_long_bytes(&mut stream, CLUSTER_LIST_CAP);
    let bytes = timeout(ANSWER, reading)
        .await
        .map_err(|_| Failure::internal(ListError::Timeout))?
        .map_err(|error| Failure::internal(ListError::Read(error)))?;
    let list = ClusterList::decode_bounded(&bytes);
    let list = list.map_err(|error| Failure::internal(ListError::Message(error)))?;
    Ok(checked(list))
}

/// The valid, distinct names of a list. They reach a terminal and the kubeconfig, so invalid ones are
/// dropped with a warning; the others remain usable.
fn checked(list: ClusterList) -> Vec<ClusterInfo> {
    let listed = list.clusters.len();
    let mut clusters = list.clusters;
    clusters.retain(|cluster| is_cluster_name(&cluster.name));
    clusters.sort_by(|a, b| a.name.cmp(&b.name));
    clusters.dedup_by(|a, b| a.name == b.name);
    if clusters.len() < listed {
        let ignored = listed - clusters.len();
        tracing::warn!(ignored, "the relay lists names twice, or that are none");
    }
    if list.total > 0 {
        let (total, listed) = (list.total, clusters.len());
        tracing::warn!(
            total,
            listed,
            "the relay does not list all clusters; name those you need"
        );
    }
    clusters
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_has_each_name_once_and_names_only() {
        let names = ["b", "a", "b", "", "A", "a\u{1b}[2J", "../x", "a.b", "c"];
        let named = |name: &str| ClusterInfo {
            name: name.to_owned(),
            ..ClusterInfo::default()
        };
        let list = ClusterList {
            clusters: names.map(named).into(),
            total: 0,
        };
        let checked = checked(list);
        let names: Vec<_> = checked.iter().map(|cluster| &*cluster.name).collect();
        assert_eq!(names, ["a", "b", "c"]);
    }
}
