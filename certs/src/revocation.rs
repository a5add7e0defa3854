//! What is revoked, as one document that the authority signs: identities up to a time, and single
//! certificates. An intermediary can withhold it or repeat an old one, but change nothing in it.
//!
//! **Invariant:** a validator's list is never replaced by one of a lower or the same version.

mod list;

use crate::{Error, InvalidInput, Roots, Validator, files, validator};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use base64::{Engine, prelude::BASE64_STANDARD};
use list::read;
pub use list::{ListError, MAX_LIST, MalformedList, Revocations, parse_serial};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use x509_parser::prelude::{FromDer, X509Certificate};

/// Bytes of an ECDSA signature on P-256 in ASN.1, at most 72.
const MAX_SIGNATURE: usize = 80;
/// Stands before the list in what is signed. A certificate begins with another byte, so that no
/// signature of the CA under one counts for the other.
const CONTEXT: &[u8] = b"throwline revocations\0";
const FILE: &str = "revocations.json";

/// A list with the CA's signature, as it is stored and sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRevocations {
    /// JSON, at most [`MAX_LIST`] bytes.
    pub list: Vec<u8>,
    /// ECDSA P-256 with SHA-256, ASN.1, over `throwline revocations`, a zero byte and the list.
    pub signature: Vec<u8>,
}

/// The list of a part that holds no database: in its validator, and in its state directory for the
/// next start. Several relays may send lists; the newest counts, whichever relay sent it.
#[derive(Debug)]
pub struct Keeper {
    validator: Validator,
    dir: PathBuf,
    /// One writes at a time, so that an older list does not replace a newer one on disk either.
    saving: tokio::sync::Mutex<()>,
}

/// The signed list in the state directory of a part that holds no database.
#[derive(Serialize, Deserialize)]
struct Stored {
    list: String,
    signature: String,
}

impl SignedRevocations {
    /// What the CA signs for `list`.
    pub fn signed_bytes(list: &[u8]) -> Vec<u8> {
        [CONTEXT, list].concat()
    }

    /// Reads the list, if one of `roots` has signed it for their trust domain.
    ///
    /// # Errors
    /// Nothing is read of a list without a good signature.
    pub fn verify(&self, roots: &Roots) -> Result<Revocations, ListError> {
        if self.list.len() > MAX_LIST || self.signature.len() > MAX_SIGNATURE {
            return Err(ListError::TooBig);
        }
        let signed = Self::signed_bytes(&self.list);
        let is_signed_by = |der: &[u8]| {
            let key = X509Certificate::from_der(der)
                .ok()
                .and_then(|(_, ca)| validator::p256_point(ca.public_key()));
            key.is_some_and(|key| {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, key)
                    .verify(&signed, &self.signature)
                    .is_ok()
            })
        };
        if !roots.certificates().iter().any(|ca| is_signed_by(ca)) {
            return Err(ListError::BadSignature);
        }
        read(&self.list, roots.trust_domain())
    }

    /// `Ok(None)` when there is none in `dir`, or none that can be read: a relay sends it again.
    ///
    /// # Errors
    /// The file cannot be read at all.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let Some(text) = files::read_text(&dir.join(FILE))? else {
            return Ok(None);
        };
        Ok(Self::from_text(&text))
    }

    /// Keeps the list in `dir`, for the next start.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        let stored = Stored {
            list: BASE64_STANDARD.encode(&self.list),
            signature: BASE64_STANDARD.encode(&self.signature),
        };
        let text = serde_json::to_vec(&stored).map_err(InvalidInput::from)?;
        files::write_private(&dir.join(FILE), &text)
    }

    fn from_text(text: &str) -> Option<Self> {
        let stored: Stored = serde_json::from_str(text).ok()?;
        Some(Self {
            list: BASE64_STANDARD.decode(stored.list).ok()?,
            signature: BASE64_STANDARD.decode(stored.signature).ok()?,
        })
    }
}

impl Keeper {
    /// The list of `validator`, kept in the state directory `dir`.
    pub fn new(validator: Validator, dir: &Path) -> Self {
        Self {
            validator,
            dir: dir.to_owned(),
            saving: tokio::sync::Mutex::default(),
        }
    }

    /// The validator and its clones, which use the list.
    pub fn validator(&self) -> &Validator {
        &self.validator
    }

    /// Of the list in use; 0 while there is none.
    pub fn version(&self) -> u64 {
        self.validator.revocations().version()
    }

    /// Puts the list of the last run to use.
    pub fn load(&self) {
        match SignedRevocations::load(&self.dir) {
            Ok(Some(signed)) => match signed.verify(self.validator.roots()) {
                Ok(list) => {
                    self.validator.replace_revocations(list);
                }
                Err(error) => {
                    tracing::warn!(%error, "the list of revocations on disk is not used");
                }
            },
            Ok(None) => {}
            Err(error) => tracing::warn!(%error, "the list of revocations cannot be read"),
        }
    }

    /// Uses and saves a list if it is newer than the one in use; its version.
    ///
    /// # Errors
    /// It is not the authority's. One that cannot be saved is used all the same.
    pub async fn take(&self, signed: SignedRevocations) -> Result<u64, ListError> {
        let list = signed.verify(self.validator.roots())?;
        let (version, entries) = (list.version(), list.len());
        if !self.validator.replace_revocations(list) {
            return Ok(version);
        }
        tracing::info!(version, entries, "a new list of revocations");
        let _one = self.saving.lock().await;
        if self.version() > version {
            return Ok(version);
        }
        let dir = self.dir.clone();
        let saved = tokio::task::spawn_blocking(move || signed.save(&dir)).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!(%error, "the list of revocations cannot be saved; this process uses it");
        }
        Ok(version)
    }
}

#[cfg(test)]
mod tests;
