//! The certificate authority itself: its key, and what it puts into certificates.

use super::{Subject, csr::ProvenKey, name::subject_name};
use crate::{Error, Kind, Roots, SpiffeId, TrustDomain, files, roots};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber, SigningKey as _, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};
use std::{
    net::IpAddr,
    path::Path,
    time::{Duration, SystemTime},
};
use time::OffsetDateTime;

const CERTIFICATE: &str = "ca.pem";
const KEY: &str = "ca.key";
/// Ten years: a change of CA touches every part, and the key does not leave its directory.
const LIFE: Duration = Duration::from_secs(3650 * 86_400);
/// How far the beginning of a life lies back, for clocks that are behind ours.
pub(super) const BACKDATED: Duration = Duration::from_secs(60);

pub(super) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    roots: Roots,
}

/// What is to be certified.
pub(super) struct Request<'a> {
    pub(super) id: &'a SpiffeId,
    pub(super) groups: &'a [String],
    /// DNS names and IP addresses; relays only.
    pub(super) hosts: &'a [String],
    pub(super) not_before: SystemTime,
    pub(super) not_after: SystemTime,
}

impl Ca {
    /// `Ok(None)` when there is none in `dir`; half of one is an error.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>, Error> {
        let path = dir.join(KEY);
        let corrupt = |what: String| Error::Corrupt {
            path: path.clone(),
            what,
            hint: "restore ca.pem and ca.key together from a backup; a new authority would lock \
                   out everybody who is enrolled",
        };
        let (key, roots) = match (files::read_text(&path)?, Roots::load(dir)?) {
            (Some(key), Some(roots)) => (key, roots),
            (None, None) => return Ok(None),
            (Some(_), None) => return Err(corrupt(format!("{CERTIFICATE} beside it is missing"))),
            (None, Some(_)) => return Err(corrupt("it is missing".to_owned())),
        };
        let key = PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes())
            .map_err(|error| corrupt(error.to_string()))?;
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key, &rcgen::PKCS_ECDSA_P256_SHA256)
            .map_err(|error| corrupt(error.to_string()))?;
        let [certificate, ..] = roots.certificates() else {
            return Err(corrupt(format!("{CERTIFICATE} beside it is empty")));
        };
        if !certified(certificate, &key) {
            return Err(corrupt(format!("it is not the key of {CERTIFICATE}")));
        }
        let issuer = Issuer::from_ca_cert_der(certificate, key)
            .map_err(|error| corrupt(error.to_string()))?;
        Ok(Some(Self { issuer, roots }))
    }

    /// Makes one. The caller holds the lock of the state directory.
    pub(super) fn create(dir: &Path, domain: &TrustDomain, now: SystemTime) -> Result<Self, Error> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
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
        let certificate = params.self_signed(&key).map_err(crypto)?;
        let roots = Roots::new(vec![certificate.der().clone()])?;
        // The key first: without its certificate it is an error that says so, and nobody has
        // trusted it yet.
        let pem = roots::to_pem("PRIVATE KEY", key.serialized_der());
        files::write_private(&dir.join(KEY), pem.as_bytes())?;
        roots.save(dir)?;
        let issuer = Issuer::new(params, key);
        Ok(Self { issuer, roots })
    }

    pub(super) fn roots(&self) -> &Roots {
        &self.roots
    }

    /// Every field is ours; of the requester there is the key alone.
    pub(super) fn issue(
        &self,
        request: &Request<'_>,
        key: &ProvenKey,
    ) -> Result<CertificateDer<'static>, Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(ia5(&request.id.to_string())?)];
        for host in request.hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName(ia5(host)?),
            });
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if request.id.kind() != Kind::User {
            let server = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(server);
        }
        params.use_authority_key_identifier_extension = true;
        params.serial_number = Some(serial());
        params.not_before = calendar(request.not_before)?;
        params.not_after = calendar(request.not_after)?;
        let public = SubjectPublicKeyInfo::from_der(&key.spki).map_err(crypto)?;
        let certificate = params.signed_by(&public, &self.issuer).map_err(crypto)?;
        let sign = |tbs: &[u8]| self.issuer.key().sign(tbs).map_err(crypto);
        subject_name(certificate.der(), request.id.name(), request.groups, sign)
    }
}

impl Subject {
    /// Checks the names, once, where a token is made.
    pub(super) fn check(&self, domain: &TrustDomain) -> Result<SpiffeId, Error> {
        if let Self::User { groups, .. } = self {
            crate::spiffe::check_groups(groups)?;
            if groups.iter().any(|group| group == "system:masters") {
                return Err(Error::Invalid(
                    "the group system:masters cannot be given: agents refuse it, because it is \
                     above the cluster's RBAC; bind a role such as cluster-admin to another group"
                        .to_owned(),
                ));
            }
        }
        Ok(SpiffeId::new(domain.clone(), self.kind(), self.name())?)
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
    text.try_into()
        .map_err(|_| Error::Invalid(format!("{text:?} cannot stand in a certificate")))
}

fn calendar(time: SystemTime) -> Result<OffsetDateTime, Error> {
    let seconds = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()
        .and_then(|since| i64::try_from(since.as_secs()).ok());
    seconds
        .and_then(|seconds| OffsetDateTime::from_unix_timestamp(seconds).ok())
        .ok_or_else(|| Error::Invalid("this machine's clock is far from any real date".to_owned()))
}

fn crypto(error: rcgen::Error) -> Error {
    Error::Crypto(error.to_string())
}
