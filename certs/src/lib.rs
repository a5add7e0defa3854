//! Identities of Throwline: who issues them, what they look like, how they are stored and checked.
//!
//! Every part is named by an X.509 certificate on P-256 whose one URI name is a [`SpiffeId`].
//! The [`authority::Authority`] issues them, an [`identity::Identity`] is one that this process
//! holds, a [`validator::PeerIdentity`] is one that somebody else has proved to us.
//!
//! **Invariant:** there is one [`Validator`]; TLS, assertions and renewals all ask it.

pub mod authority;
pub mod database;
pub mod enrol;
mod error;
mod files;
pub mod identity;
pub mod jws;
pub mod roots;
pub mod spiffe;
#[cfg(test)]
mod testing;
pub mod tls;
pub mod token;
pub mod validator;

pub use database::Database;
pub use error::Error;
pub use identity::{Identity, PendingIdentity};
pub use roots::Roots;
pub use spiffe::{Kind, NameError, SpiffeId, TrustDomain};
pub use token::{EnrolmentToken, Secret};
pub use validator::{CheckError, PeerIdentity, Usage, Validator, Want, verify_signature};

/// SHA-256, the one hash of the project.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, data);
    let mut out = [0; 32];
    out.copy_from_slice(digest.as_ref());
    out
}
