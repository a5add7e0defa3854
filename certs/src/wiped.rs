//! A key that rcgen signs with, wiped from memory when it is freed.

use rcgen::{Error, KeyPair, PublicKeyData, SignatureAlgorithm, SigningKey};
use std::ops::Deref;
use zeroize::Zeroizing;

/// rcgen keeps the key's bytes beside aws-lc's copy, which aws-lc wipes, and does not wipe them by itself.
pub struct WipedKey(Zeroizing<KeyPair>);

impl From<KeyPair> for WipedKey {
    fn from(key: KeyPair) -> Self {
        Self(Zeroizing::new(key))
    }
}

impl Deref for WipedKey {
    type Target = KeyPair;

    fn deref(&self) -> &KeyPair {
        &self.0
    }
}

impl PublicKeyData for WipedKey {
    fn der_bytes(&self) -> &[u8] {
        self.0.der_bytes()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        PublicKeyData::algorithm(&*self.0)
    }
}

impl SigningKey for WipedKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.0.sign(message)
    }
}
