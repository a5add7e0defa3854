//! Identities of Throwline: their names, storage, proof and verification.
//!
//! Every part is named by an X.509 certificate on P-256 whose one URI name is a [`SpiffeId`].
//! A [`directory::Directory`] issues them, an [`identity::Identity`] is one that this process
//! holds, a [`PeerIdentity`] is a verified one of a peer.
//!
//! **Invariant:** there is one [`Validator`]; TLS, assertions and renewals all use it.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

mod check_error;
pub mod directory;
pub mod enrol;
mod error;
pub mod files;
pub mod identity;
mod json_error;
pub mod jws;
mod peer_identity;
mod relay_url;
pub mod renewal;
pub mod revocation;
pub mod roots;
pub mod spiffe;
#[cfg(test)]
mod testing;
mod time_text;
pub mod tls;
pub mod token;
pub mod validator;
mod wiped;

pub use check_error::{BadName, CheckError, MalformedCertificate};
pub use directory::Directory;
pub use error::{BoxError, CryptoError, Damage, Error, InvalidInput};
pub use identity::{Identity, PendingIdentity};
pub use json_error::JsonError;
pub use peer_identity::PeerIdentity;
pub use relay_url::{RelayUrlError, check_relay_url};
pub use revocation::{Revocations, SignedRevocations};
pub use roots::Roots;
pub use spiffe::{Kind, NameError, SpiffeId, TrustDomain};
pub use token::{EnrolmentToken, Secret};
pub use validator::{ExpectedPeer, Usage, Validator, verify_signature};
pub use wiped::WipedKey;

/// SHA-256, the one hash of the project.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, data);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}
