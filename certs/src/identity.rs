//! An identity of our own: certificate chain and private key.

use crate::{CryptoError, Error, InvalidInput, PeerIdentity, SpiffeId, files, roots, validator};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair as _,
    },
};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    sign::{CertifiedKey, SigningKey},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::{fmt, path::Path, sync::Arc, time::SystemTime};
use zeroize::Zeroizing;

const FILE: &str = "identity.pem";
const HINT: &str = "restore it from a backup, or move it away and enrol again";

/// Who this process is, to others. Cheap to clone; `Debug` tells nothing of the key.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    chain: Vec<CertificateDer<'static>>,
    key: Zeroizing<PrivatePkcs8KeyDer<'static>>,
    /// The same key as rustls takes it. aws-lc wipes its own copy when that is freed.
    signing: Arc<dyn SigningKey>,
    own: PeerIdentity,
}

/// A fresh key that waits for its certificate. It never leaves this process but by
/// [`Identity::save`].
pub struct PendingIdentity {
    key: Zeroizing<PrivatePkcs8KeyDer<'static>>,
    csr: Vec<u8>,
}

impl Identity {
    /// `Ok(None)` when there is no `identity.pem` in `dir`.
    ///
    /// # Errors
    /// The file cannot be read, is exposed to other users, or does not hold an identity.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        files::check_dir(dir)?;
        let path = dir.join(FILE);
        let Some(pem) = files::read_secret(&path)? else {
            return Ok(None);
        };
        Self::from_pem(&pem)
            .map(Some)
            .map_err(|error| Error::Corrupt {
                path,
                source: Box::new(error.into()),
                hint: HINT,
            })
    }

    /// Writes `identity.pem`, chain and key in one file so that they can never be of two
    /// generations, in `dir`, which is made if need be.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::private_dir(dir)?;
        let pem = Zeroizing::new([&*self.chain_pem(), &*self.key_pem()].concat());
        files::write_private(&dir.join(FILE), pem.as_bytes())
    }

    /// Reads a private key and its chain, leaf first.
    ///
    /// # Errors
    /// The text is not PEM, or key and certificate do not belong together.
    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let chain = roots::certificates_from_pem(pem)?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(InvalidInput::NoPrivateKey)?;
        Self::new(chain, Zeroizing::new(key))
    }

    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: Zeroizing<PrivatePkcs8KeyDer<'static>>,
    ) -> Result<Self, Error> {
        let leaf = chain.first().ok_or(InvalidInput::NoCertificate)?;
        let own = validator::read(leaf).map_err(InvalidInput::from)?;
        let pair = key_pair(&ECDSA_P256_SHA256_ASN1_SIGNING, &key)?;
        // Certificate and key of two backups would otherwise fail later, in a handshake with the
        // peer.
        if pair.public_key().as_ref() != own.public_key {
            return Err(InvalidInput::OtherKey.into());
        }
        let der = Zeroizing::new(PrivateKeyDer::from(key.clone_key()));
        let signing = any_ecdsa_type(&der)?;
        Ok(Self(Arc::new(Inner {
            chain,
            key,
            signing,
            own,
        })))
    }

    /// The SPIFFE id.
    pub fn id(&self) -> &SpiffeId {
        &self.0.own.id
    }

    /// What others read in our certificate.
    pub fn as_peer(&self) -> &PeerIdentity {
        &self.0.own
    }

    /// The groups of a user; empty for others.
    pub fn groups(&self) -> &[String] {
        &self.0.own.groups
    }

    /// The certificate's serial number, in lower-case hex.
    pub fn serial(&self) -> &str {
        &self.0.own.serial
    }

    /// The beginning of the validity period.
    pub fn not_before(&self) -> SystemTime {
        self.0.own.not_before
    }

    /// The end of the validity period.
    pub fn not_after(&self) -> SystemTime {
        self.0.own.not_after
    }

    /// Two thirds of the life: a third is left to try again.
    pub fn renew_at(&self) -> SystemTime {
        let life = self.not_after().duration_since(self.not_before());
        self.not_before() + life.unwrap_or_default() * 2 / 3
    }

    /// The certificates, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    /// The certificates as PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        roots::certificates_to_pem(&self.0.chain)
    }

    /// The private key, for files only.
    pub fn key_pem(&self) -> Zeroizing<String> {
        roots::key_to_pem(self.0.key.secret_pkcs8_der())
    }

    #[cfg(test)]
    pub(crate) fn key_der(&self) -> &[u8] {
        self.0.key.secret_pkcs8_der()
    }

    /// Chain and key, for rustls.
    pub(crate) fn certified_key(&self) -> CertifiedKey {
        CertifiedKey::new(self.chain().to_vec(), Arc::clone(&self.0.signing))
    }

    /// ECDSA on P-256 with SHA-256, ASN.1: what [`crate::verify_signature`] checks.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.sign_with(&ECDSA_P256_SHA256_ASN1_SIGNING, message)
    }

    /// The same as `r ‖ s`, the form of JWS.
    pub(crate) fn sign_fixed(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.sign_with(&ECDSA_P256_SHA256_FIXED_SIGNING, message)
    }

    fn sign_with(
        &self,
        algorithm: &'static EcdsaSigningAlgorithm,
        message: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let signature = key_pair(algorithm, &self.0.key)?
            .sign(&SystemRandom::new(), message)
            .map_err(|_| CryptoError::Signing)?;
        Ok(signature.as_ref().to_vec())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("id", &self.id().to_string())
            .field("serial", &self.serial())
            .finish_non_exhaustive()
    }
}

impl PendingIdentity {
    /// Makes a key on P-256 and a request that proves its possession. The request contains nothing
    /// else, because the authority would ignore it.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn generate() -> Result<Self, Error> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(CryptoError::from)?;
        let key = Zeroizing::new(key);
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params.serialize_request(&*key).map_err(CryptoError::from)?;
        Ok(Self {
            csr: csr.der().to_vec(),
            key: Zeroizing::new(key.serialize_der().into()),
        })
    }

    /// The same key and request once more, for one that is asked for again when an answer was lost.
    #[must_use]
    pub fn again(&self) -> Self {
        Self {
            key: Zeroizing::new(self.key.clone_key()),
            csr: self.csr.clone(),
        }
    }

    /// The certificate signing request, as DER.
    pub fn csr_der(&self) -> &[u8] {
        &self.csr
    }

    /// The certificate signing request, as PEM.
    pub fn csr_pem(&self) -> String {
        roots::to_pem("CERTIFICATE REQUEST", &self.csr)
    }

    /// Key and chain for rustls, where the chain is for servers and names no identity.
    pub(crate) fn into_certified_key(
        self,
        chain: Vec<CertificateDer<'static>>,
    ) -> Result<CertifiedKey, Error> {
        let der = Zeroizing::new(PrivateKeyDer::from(self.key.clone_key()));
        let signing = any_ecdsa_type(&der)?;
        let certified = CertifiedKey::new(chain, signing);
        certified.keys_match()?;
        Ok(certified)
    }

    /// Refuses a certificate for another key.
    ///
    /// # Errors
    /// The chain is malformed, or its leaf has another key.
    pub fn complete(self, chain: Vec<CertificateDer<'static>>) -> Result<Identity, Error> {
        Identity::new(chain, self.key)
    }
}

impl fmt::Debug for PendingIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PendingIdentity").finish_non_exhaustive()
    }
}

fn key_pair(
    algorithm: &'static EcdsaSigningAlgorithm,
    key: &PrivatePkcs8KeyDer<'_>,
) -> Result<EcdsaKeyPair, Error> {
    EcdsaKeyPair::from_pkcs8(algorithm, key.secret_pkcs8_der())
        .map_err(|_| InvalidInput::KeyType.into())
}
