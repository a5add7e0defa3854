//! The request for a line, from a user or from another relay on a user's behalf.

use std::net::{AddrParseError, SocketAddr};

use throwline_certs::{Kind, NameError, SpiffeId, TrustDomain};
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode};
use throwline_tunnel::proto::traffic::TrafficClass;

use crate::peer::Peer;

/// The only version of `Open` so far.
const VERSION: u32 = 1;

/// A request after its checks.
pub(super) struct OpenRequest {
    /// What is sent to the agent, or to the relay that holds its carrier. The agent trusts its user
    /// and client address for display, so they are never what a user wrote.
    pub(super) open: Open,
    /// From another relay, which found the agent here: never forwarded again.
    pub(super) is_forwarded: bool,
}

/// What is malformed in a line that another relay forwards.
#[derive(Debug, thiserror::Error)]
pub(super) enum ForwardError {
    #[error("the user of a forwarded line is malformed: {0}")]
    User(#[source] NameError),
    #[error("the user of a forwarded line is of another domain")]
    Domain,
    #[error("the client address of a forwarded line is malformed: {0}")]
    Client(#[source] AddrParseError),
}

impl OpenRequest {
    pub(super) fn from_user(peer: &Peer, wanted: &Open) -> Self {
        Self::new(
            peer.identity.id.to_string(),
            peer.client.to_string(),
            wanted,
            false,
        )
    }

    /// The relay of the user has asked the policy and counted the line. It is trusted for routing
    /// metadata, as far as that can be parsed. The user's identity is proved to the agent by the
    /// sealed session.
    ///
    /// # Errors
    /// The part that is malformed.
    pub(super) fn from_relay(wanted: &Open, domain: &TrustDomain) -> Result<Self, ForwardError> {
        let user: SpiffeId = wanted.user.parse().map_err(ForwardError::User)?;
        if user.kind() != Kind::User || user.domain() != domain {
            return Err(ForwardError::Domain);
        }
        let client: SocketAddr = wanted.client_addr.parse().map_err(ForwardError::Client)?;
        Ok(Self::new(
            user.to_string(),
            client.to_string(),
            wanted,
            true,
        ))
    }

    fn new(user: String, client_addr: String, wanted: &Open, is_forwarded: bool) -> Self {
        let open = Open {
            version: VERSION,
            cluster: wanted.cluster.clone(),
            line_id: wanted.line_id.clone(),
            kind: wanted.kind,
            user,
            client_addr,
            agent_instance: wanted.agent_instance.clone(),
            detached_ms: wanted.detached_ms,
            bulk: wanted.bulk,
        };
        Self { open, is_forwarded }
    }

    pub(super) fn cluster(&self) -> &str {
        &self.open.cluster
    }

    /// What the line moves, as its local proxy has measured.
    pub(super) fn class(&self) -> TrafficClass {
        TrafficClass::of(self.open.bulk)
    }

    /// The agent process that the line must reach; empty for any.
    pub(super) fn agent_instance(&self) -> &str {
        &self.open.agent_instance
    }
}

/// Rejects a message that no relay could route.
pub(super) fn check(wanted: &Open) -> Result<(), Refusal> {
    if wanted.version != VERSION {
        return Err(Refusal::new(
            RefusalCode::Version,
            format!("this relay opens lines of version {VERSION} only"),
        ));
    }
    if wanted.line_id.len() != 16 {
        return Err(Refusal::new(
            RefusalCode::BadRequest,
            "a line's id has 16 bytes",
        ));
    }
    if throwline_certs::spiffe::check_cluster_name(&wanted.cluster).is_err() {
        // Not repeated: it could hold anything.
        return Err(Refusal::new(
            RefusalCode::UnknownCluster,
            "there is no cluster of that name: it is not a valid cluster name",
        ));
    }
    Ok(())
}
