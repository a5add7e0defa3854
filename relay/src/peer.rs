//! The authenticated far end of a carrier.

use std::net::SocketAddr;

use throwline_certs::PeerIdentity;

/// Everything but the address is from the certificate that the peer proved to hold.
pub(crate) struct Peer {
    pub(crate) identity: PeerIdentity,
    pub(crate) client: SocketAddr,
    /// Whether `client` is this peer's own address, and neither a balancer's nor another relay's.
    /// Its network is then admitted before unknown ones.
    pub(crate) has_own_address: bool,
}
