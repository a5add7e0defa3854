//! Who may open lines to which clusters. What they may do there is the cluster's own RBAC.

use async_trait::async_trait;
use throwline_certs::PeerIdentity;

/// Asked for each line, and for each cluster of a list.
#[async_trait]
pub trait Policy: Send + Sync + 'static {
    async fn decide(&self, user: &PeerIdentity, cluster: &str) -> Decision;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Allowed,
    /// The user may know that the cluster exists, and is told that it is not for them.
    Refused,
}

/// Every enrolled user may open lines to every enrolled cluster: the default, for as long as
/// one team owns a relay. The cluster's RBAC still knows each user by name.
#[derive(Debug, Clone, Copy, Default)]
pub struct Everyone;

#[async_trait]
impl Policy for Everyone {
    async fn decide(&self, _user: &PeerIdentity, _cluster: &str) -> Decision {
        Decision::Allowed
    }
}
