//! An identity of our own: certificate chain and private key.

use crate::{Error, PeerIdentity, SpiffeId, files, roots, validator};
use aws_lc_rs::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, KeyPair as _,
    },
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::{fmt, path::Path, sync::Arc, time::SystemTime};

const FILE: &str = "identity.pem";
const HINT: &str = "restore it from a backup, or move it away and enrol again";

/// Who this process is, to others. Cheap to clone; `Debug` tells nothing of the key.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    chain: Vec<CertificateDer<'static>>,
    key: PrivatePkcs8KeyDer<'static>,
    own: PeerIdentity,
}

/// A fresh key that waits for its certificate. It never leaves this process but by
/// [`Identity::save`].
pub struct PendingIdentity {
    key: PrivatePkcs8KeyDer<'static>,
    csr: Vec<u8>,
}

impl Identity {
    /// `Ok(None)` when there is no `identity.pem` in `dir`.
    pub fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(FILE);
        let Some(pem) = files::read_text(&path)? else {
            return Ok(None);
        };
        Self::from_pem(&pem)
            .map(Some)
            .map_err(|error| Error::Corrupt {
                path,
                what: error.to_string(),
                hint: HINT,
            })
    }

    /// Writes `identity.pem`, chain and key in one file so that they can never be of two
    /// generations, in `dir`, which is made if need be.
    pub fn save(&self, dir: &Path) -> Result<(), Error> {
        files::private_dir(dir)?;
        let pem = format!("{}{}", self.chain_pem(), self.key_pem());
        files::write_private(&dir.join(FILE), pem.as_bytes())
    }

    pub fn from_pem(pem: &str) -> Result<Self, Error> {
        let chain = roots::certificates_from_pem(pem)?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| Error::Invalid(format!("no private key: {error}")))?;
        Self::new(chain, key)
    }

    pub(crate) fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, Error> {
        let leaf = chain
            .first()
            .ok_or_else(|| Error::Invalid("no certificate".to_owned()))?;
        let own = validator::read(leaf).map_err(|error| Error::Invalid(error.to_string()))?;
        let pair = key_pair(&ECDSA_P256_SHA256_ASN1_SIGNING, &key)?;
        if pair.public_key().as_ref() != own.public_key {
            return Err(Error::Invalid(
                "the certificate is for another key".to_owned(),
            ));
        }
        Ok(Self(Arc::new(Inner { chain, key, own })))
    }

    pub fn id(&self) -> &SpiffeId {
        &self.0.own.id
    }

    /// What others read in our certificate.
    pub fn as_peer(&self) -> &PeerIdentity {
        &self.0.own
    }

    pub fn groups(&self) -> &[String] {
        &self.0.own.groups
    }

    pub fn serial(&self) -> &str {
        &self.0.own.serial
    }

    pub fn not_before(&self) -> SystemTime {
        self.0.own.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.0.own.not_after
    }

    /// Two thirds of the life: a third is left to try again.
    pub fn renew_at(&self) -> SystemTime {
        let life = self.not_after().duration_since(self.not_before());
        self.not_before() + life.unwrap_or_default() * 2 / 3
    }

    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }

    pub fn chain_pem(&self) -> String {
        roots::certificates_to_pem(&self.0.chain)
    }

    /// The private key, for files only.
    pub fn key_pem(&self) -> String {
        roots::to_pem("PRIVATE KEY", self.0.key.secret_pkcs8_der())
    }

    /// The private key, for rustls.
    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        self.0.key.clone_key().into()
    }

    /// ECDSA on P-256 with SHA-256, ASN.1: what [`crate::verify_signature`] checks.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        self.sign_with(&ECDSA_P256_SHA256_ASN1_SIGNING, message)
    }

    /// The same as `r ‖ s`, which is what JWS wants.
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
            .map_err(|_| Error::Crypto("signing failed".to_owned()))?;
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
    /// Makes a key on P-256 and a request that proves its possession; the request says nothing
    /// else, because the authority would ignore it.
    pub fn generate() -> Result<Self, Error> {
        let crypto = |error: rcgen::Error| Error::Crypto(error.to_string());
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        let csr = params.serialize_request(&key).map_err(crypto)?;
        Ok(Self {
            csr: csr.der().to_vec(),
            key: key.serialize_der().into(),
        })
    }

    pub fn csr_der(&self) -> &[u8] {
        &self.csr
    }

    pub fn csr_pem(&self) -> String {
        roots::to_pem("CERTIFICATE REQUEST", &self.csr)
    }

    /// Refuses a certificate for another key.
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
        .map_err(|_| Error::Invalid("the private key is not on P-256".to_owned()))
}
