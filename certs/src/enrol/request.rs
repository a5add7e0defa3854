//! What is sent to redeem a token: signed by the token's key, which stays here. An
//! intermediary, even one that terminates the TLS around it, can neither take the token from it nor
//! put another key there.

use crate::{EnrolmentToken, Error, Kind, Secret};
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

/// Domain separation: the token's key signs nothing else.
const CONTEXT: &[u8] = b"throwline enrolment\0";
/// Bytes of a UID of a cluster; Kubernetes' own have 36.
const MAX_UID: usize = 64;

/// The component that enrols.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asker {
    /// An agent, for the cluster whose namespace kube-system has this UID.
    Cluster {
        /// That UID.
        uid: String,
    },
    /// A user, for a local proxy.
    User,
}

impl Asker {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Cluster { .. } => Kind::Cluster,
            Self::User => Kind::User,
        }
    }
}

/// Body of `POST /v1/enroll`. Members beyond these are ignored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct EnrolRequest {
    /// The token's public key (Ed25519), in base64url.
    pub token: String,
    /// What asks, `cluster` or `user`. A token that is for another kind is not used up.
    pub kind: String,
    /// In PEM.
    pub csr: String,
    /// Of a cluster: the UID of its namespace kube-system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_uid: Option<String>,
    /// By the token's key over all of this and the authority's CA, in base64url.
    pub signature: String,
}

impl EnrolRequest {
    /// Signs a request for a certificate with the token's secret, for the authority with this pin.
    ///
    /// # Errors
    /// The library for cryptography takes no key.
    pub fn new(
        secret: &Secret,
        pin: &[u8; 32],
        asker: &Asker,
        csr_pem: String,
    ) -> Result<Self, Error> {
        let mut request = Self {
            token: BASE64_URL_SAFE_NO_PAD.encode(secret.public_key()?),
            kind: asker.kind().as_str().to_owned(),
            csr: csr_pem,
            cluster_uid: match asker {
                Asker::Cluster { uid } => Some(uid.clone()),
                Asker::User => None,
            },
            signature: String::new(),
        };
        let signature = secret.sign(&request.transcript(pin))?;
        request.signature = BASE64_URL_SAFE_NO_PAD.encode(signature);
        Ok(request)
    }

    /// The token's public key, if it is one.
    pub fn key(&self) -> Option<Vec<u8>> {
        // The length of 32 bytes, checked before anything is allocated.
        if self.token.len() != 43 {
            return None;
        }
        let key = BASE64_URL_SAFE_NO_PAD.decode(&self.token).ok()?;
        (key.len() == 32).then_some(key)
    }

    /// Whether the holder of the token's secret made this request, for this authority.
    pub fn is_signed(&self, key: &[u8], pin: &[u8; 32]) -> bool {
        // 64 bytes.
        if self.signature.len() != 86 {
            return false;
        }
        let Ok(signature) = BASE64_URL_SAFE_NO_PAD.decode(&self.signature) else {
            return false;
        };
        UnparsedPublicKey::new(&ED25519, key)
            .verify(&self.transcript(pin), &signature)
            .is_ok()
    }

    /// Whether it asks for this kind of identity.
    pub fn is_for(&self, kind: Kind) -> bool {
        self.kind == kind.as_str()
    }

    /// The cluster's UID, if it is one.
    pub fn uid(&self) -> Option<&str> {
        self.cluster_uid.as_deref().filter(|uid| is_uid(uid))
    }

    /// The bytes to sign. Every part is preceded by its length as 64 bits.
    fn transcript(&self, pin: &[u8; 32]) -> Vec<u8> {
        let uid = self.cluster_uid.as_deref().unwrap_or_default();
        let parts: [&[u8]; 4] = [
            pin,
            self.kind.as_bytes(),
            uid.as_bytes(),
            self.csr.as_bytes(),
        ];
        let mut out = CONTEXT.to_vec();
        for part in parts {
            out.extend_from_slice(&(part.len() as u64).to_be_bytes());
            out.extend_from_slice(part);
        }
        out
    }
}

/// A UID in whatever form an API server chooses: printed in messages, so without anything odd.
pub(crate) fn is_uid(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    !text.is_empty() && text.len() <= MAX_UID && text.bytes().all(plain)
}

impl EnrolmentToken {
    /// The request that redeems this token for `csr_pem`'s key.
    ///
    /// # Errors
    /// The library for cryptography takes no key.
    pub fn request(&self, asker: &Asker, csr_pem: String) -> Result<EnrolRequest, Error> {
        EnrolRequest::new(&self.secret, &self.pin, asker, csr_pem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PIN: [u8; 32] = [7; 32];

    #[test]
    fn each_part_is_signed() {
        let secret = Secret::generate();
        let uid = "1f".to_owned();
        let good = EnrolRequest::new(&secret, &PIN, &Asker::Cluster { uid }, "csr".to_owned());
        let good = good.unwrap();
        let key = good.key().unwrap();
        assert!(good.is_signed(&key, &PIN));
        assert!(!good.is_signed(&key, &[8; 32]), "another authority");
        let changed = |change: fn(&mut EnrolRequest)| {
            let mut request = good.clone();
            change(&mut request);
            request.is_signed(&key, &PIN)
        };
        assert!(!changed(|request| request.csr = "other".to_owned()));
        assert!(!changed(|request| request.kind = "user".to_owned()));
        assert!(!changed(|request| request.cluster_uid = None));
        assert!(!changed(
            |request| request.cluster_uid = Some("1g".to_owned())
        ));
        assert!(!changed(|request| request.signature.clear()));
        let other = Secret::generate().public_key().unwrap();
        assert!(!good.is_signed(&other, &PIN), "another token");
        // The secret is not in it.
        let body = serde_json::to_string(&good).unwrap();
        assert!(!body.contains(&secret.expose()));
    }

    #[test]
    fn a_uid_is_what_kubernetes_gives() {
        assert!(is_uid("0a1b2c3d-0000-4000-8000-0123456789ab"));
        for bad in ["", "a b", "a\n", "\u{1b}[31m", &"a".repeat(65)] {
            assert!(!is_uid(bad), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(token in any::<String>(), signature in any::<String>(), key: Vec<u8>) {
            let request = EnrolRequest {
                token,
                kind: String::new(),
                csr: String::new(),
                cluster_uid: None,
                signature,
            };
            let _ = request.key();
            prop_assert!(!request.is_signed(&key, &PIN));
        }
    }
}
