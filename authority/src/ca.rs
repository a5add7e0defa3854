//! The certificate authority itself: its key, and what it puts into certificates.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SigningKey as _, SubjectPublicKeyInfo,
};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use throwline_certs::validator::BACKDATED;
use throwline_certs::{
    Damage, Error as IdentityError, Kind, Roots, SignedRevocations, SpiffeId, TrustDomain,
    WipedKey, files, roots,
};
use time::OffsetDateTime;
use zeroize::Zeroizing;

use crate::csr::ProvenKey;
use crate::error::Error;
use crate::name::subject_name;

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";
/// Ten years: a change of CA touches every part, and the key does not leave its directory.
const LIFE: Duration = Duration::from_secs(3650 * 86_400);

pub(crate) struct Ca {
    issuer: Issuer<'static, WipedKey>,
    roots: Roots,
}

/// What is to be certified.
pub(crate) struct Request<'a> {
    pub(crate) id: &'a SpiffeId,
    pub(crate) groups: &'a [String],
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

/// What is wrong with the files of a CA.
#[derive(Debug, thiserror::Error)]
enum CaDamage {
    #[error("{CERTIFICATE} beside it is missing")]
    NoCertificateFile,
    #[error("it is missing")]
    NoKeyFile,
    #[error(transparent)]
    Pem(#[from] pem::Error),
    #[error(transparent)]
    Key(#[from] rcgen::Error),
    #[error("{CERTIFICATE} beside it is empty")]
    NoCertificate,
    #[error("it is not the key of {CERTIFICATE}")]
    OtherKey,
}

impl Ca {
    /// `Ok(None)` when there is none in `dir`; half of one is an error.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(KEY);
        let corrupt = |damage: CaDamage| {
            Error::Identity(IdentityError::Corrupt {
                path: path.clone(),
                source: Box::new(Damage::Other(damage.into())),
                hint: "restore ca.pem and ca.key together from a backup; a new authority would \
                       lock out everybody who is enrolled",
            })
        };
        let (key, roots) = match (files::read_secret(&path)?, Roots::load(dir)?) {
            (Some(key), Some(roots)) => (key, roots),
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(corrupt(CaDamage::NoCertificateFile)),
            (None, Some(_)) => return Err(corrupt(CaDamage::NoKeyFile)),
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes())
            .map(Zeroizing::new)
            .map_err(|error| corrupt(error.into()))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map(WipedKey::from)
            .map_err(|error| corrupt(error.into()))?;
        let [certificate, ..] = roots.certificates() else {
            return Err(corrupt(CaDamage::NoCertificate));
        };
        // Files of two backups: no peer would trust what this key signs.
        if !certified(certificate, &key) {
            return Err(corrupt(CaDamage::OtherKey));
        }
        let issuer =
            Issuer::from_ca_cert_der(certificate, key).map_err(|error| corrupt(error.into()))?;
        Ok(Some(Self { issuer, roots }))
    }

    /// Makes one. The caller holds the lock of the state directory.
    pub(crate) fn create(dir: &Path, domain: &TrustDomain, now: SystemTime) -> Result<Self, Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)
            .map(WipedKey::from)
            .map_err(Error::Certificate)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(
            DnType::CommonName,
            format!("Throwline authority of {domain}"),
        );
        // The domain stands in the name, and every validator compares it. A name constraint would
        // say the same, but rustls-webpki has none for URIs and refuses what it does not know.
        params.subject_alt_names = vec![SanType::URI(ia5(&format!("spiffe://{domain}"))?)];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.serial_number = Some(serial());
        params.not_before = calendar(now - BACKDATED)?;
        params.not_after = calendar(now + LIFE)?;
        let certificate = params.self_signed(&key).map_err(Error::Certificate)?;
        let roots = Roots::new(vec![certificate.der().clone()])?;
        // The key first: without its certificate it is an error that names it, and no peer has
        // trusted it yet.
        let pem = roots::key_to_pem(key.serialized_der());
        files::write_private(&dir.join(KEY), pem.as_bytes())?;
        roots.save(dir)?;
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, roots })
    }

    pub(crate) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Every field is ours; of the requester there is the key alone.
    pub(crate) fn issue(
        &self,
        request: &Request<'_>,
        key: &ProvenKey,
    ) -> Result<CertificateDer<'static>, Error> {
        let mut params = leaf(request.not_before, request.not_after)?;
        params.subject_alt_names = vec![SanType::URI(ia5(&request.id.to_string())?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if request.id.kind() != Kind::User {
            let server = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(server);
        }
        let public = SubjectPublicKeyInfo::from_der(&key.spki).map_err(Error::Certificate)?;
        let certificate = params
            .signed_by(&public, &self.issuer)
            .map_err(Error::Certificate)?;
        let sign = |tbs: &[u8]| self.issuer.key().sign(tbs).map_err(Error::Certificate);
        subject_name(certificate.der(), request.id.name(), request.groups, sign)
    }

    /// A certificate for HTTPS on `hosts` (DNS names and IP addresses), of `key`. It has no name in
    /// the trust domain and is for servers only. So its key, which every process has that terminates
    /// public TLS, does not authenticate a relay to other relays.
    pub(crate) fn issue_https(
        &self,
        hosts: &[String],
        not_before: SystemTime,
        not_after: SystemTime,
        key: &ProvenKey,
    ) -> Result<CertificateDer<'static>, Error> {
        let mut params = leaf(not_before, not_after)?;
        let name = &mut params.distinguished_name;
        name.push(DnType::CommonName, "Throwline relay");
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(ia5(host)?),
            });
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let public = SubjectPublicKeyInfo::from_der(&key.spki).map_err(Error::Certificate)?;
        let certificate = params
            .signed_by(&public, &self.issuer)
            .map_err(Error::Certificate)?;
        Ok(certificate.der().clone())
    }
}

/// What all certificates have in common that are no CA's.
fn leaf(not_before: SystemTime, not_after: SystemTime) -> Result<CertificateParams, Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    params.serial_number = Some(serial());
    params.not_before = calendar(not_before)?;
    params.not_after = calendar(not_after)?;
    Ok(params)
}

impl Ca {
    /// Signs a list of revocations.
    pub(crate) fn sign_list(&self, list: Vec<u8>) -> Result<SignedRevocations, Error> {
        let signed = SignedRevocations::signed_bytes(&list);
        let signature = self
            .issuer
            .key()
            .sign(&signed)
            .map_err(Error::Certificate)?;
        Ok(SignedRevocations { list, signature })
    }
}

/// Whether `certificate` is for `key`.
fn certified(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    use x509_parser::prelude::{FromDer, X509Certificate};
    X509Certificate::from_der(certificate).is_ok_and(|(_, certificate)| {
        certificate.public_key().subject_public_key.data.as_ref() == key.public_key_raw()
    })
}

/// 127 random bits: positive, and never shorter than 16 bytes.
fn serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn ia5(text: &str) -> Result<rcgen::string::Ia5String, Error> {
    text.try_into().map_err(|source| Error::CertificateText {
        text: text.to_owned(),
        source,
    })
}

fn calendar(time: SystemTime) -> Result<OffsetDateTime, Error> {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok());
    seconds
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or(Error::Clock)
}
