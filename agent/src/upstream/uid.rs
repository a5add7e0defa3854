//! Which cluster this is, by the UID of its namespace kube-system, which is unique and never changes.

use std::time::Duration;

use http::{Method, StatusCode};
use prometheus::Registry;

use super::api::object;
use super::{AccessError, ClusterAccess, Limits, Upstream};
use crate::metrics::Metrics;

const NAMESPACE: &str = "/api/v1/namespaces/kube-system";
/// How long a start may wait for it.
const CHECK: Duration = Duration::from_secs(5);

/// Why the cluster is not known, or not the right one.
#[derive(Debug, thiserror::Error)]
pub enum UidError {
    /// The rule that is missing is in the text.
    #[error(
        "the agent's account may not read the namespace kube-system, whose UID identifies the cluster \
         (the API server says {0}): give it the rule {{apiGroups: [\"\"], resources: [namespaces], \
         resourceNames: [kube-system], verbs: [get]}}, or give the UID with --cluster-uid"
    )]
    Forbidden(u16),
    #[error("{0}: the cluster cannot be identified")]
    Unreachable(#[from] super::Error),
    #[error("the API server has no UID for the namespace kube-system (status {0})")]
    None(u16),
    /// The kubeconfig or the pod is another cluster's.
    #[error(
        "this agent's identity is the cluster {name}'s, whose namespace kube-system has the UID {expected}, \
         and the API server's has {found}: it is another cluster. Give the right --kubeconfig, or enrol \
         this cluster under a name of its own, with another --state-dir"
    )]
    OtherCluster {
        name: String,
        expected: String,
        found: String,
    },
    #[error(transparent)]
    Access(#[from] AccessError),
    /// A mistake of ours: two metrics of one name.
    #[error("the metrics cannot be registered: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// The UID of the cluster, read on the agent's own account. It needs `get` on the namespace kube-system.
///
/// # Errors
/// Access that cannot be used, an API server that does not answer, or a right that is missing.
pub async fn cluster_uid(access: ClusterAccess) -> Result<String, UidError> {
    let metrics = Metrics::register(&Registry::new())?;
    let upstream = Upstream::load(access, Limits::default(), metrics).await?;
    read(&upstream).await
}

/// Compares the cluster with that of the identity. An agent starts also where this is not possible now.
pub(crate) async fn check(
    upstream: &Upstream,
    name: &str,
    expected: Option<&str>,
) -> Result<(), UidError> {
    let Some(expected) = expected else {
        return Ok(());
    };
    match tokio::time::timeout(CHECK, read(upstream)).await {
        Ok(Ok(found)) if found != expected => Err(UidError::OtherCluster {
            name: name.to_owned(),
            expected: expected.to_owned(),
            found,
        }),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot check that this is the cluster that was enrolled");
            Ok(())
        }
        Err(_) => {
            tracing::warn!("cannot check that this is the cluster that was enrolled: no answer");
            Ok(())
        }
    }
}

async fn read(upstream: &Upstream) -> Result<String, UidError> {
    let (status, answer) = object(upstream, Method::GET, NAMESPACE, None).await?;
    match answer["metadata"]["uid"].as_str() {
        Some(uid) if status.is_success() && !uid.is_empty() && uid.len() <= 64 => {
            Ok(uid.to_owned())
        }
        _ if matches!(status, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED) => {
            Err(UidError::Forbidden(status.as_u16()))
        }
        _ => Err(UidError::None(status.as_u16())),
    }
}
