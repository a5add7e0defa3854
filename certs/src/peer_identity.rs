//! What a verified certificate states about a peer.

use crate::SpiffeId;
use std::time::SystemTime;

/// A peer, from its verified certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The SPIFFE id.
    pub id: SpiffeId,
    /// The groups of a user; empty for others.
    pub groups: Vec<String>,
    /// In lower-case hex.
    pub serial: String,
    /// The beginning of the validity period.
    pub not_before: SystemTime,
    /// The end of the validity period.
    pub not_after: SystemTime,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    /// The point on P-256, uncompressed.
    pub public_key: Vec<u8>,
}
