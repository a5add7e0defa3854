//! The cluster's own certificate authority: one server certificate, and client certificates
//! whose common name is the user and whose organisations are the groups, as Kubernetes reads them.

use std::{net::IpAddr, sync::Arc};

use base64::Engine as _;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use time::{Duration, OffsetDateTime};

use crate::{Error, access::User};

/// How long the certificates live: far longer than any demo, short enough to be harmless when lost.
const LIFE: Duration = Duration::days(7);

pub(crate) struct Pki {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
    pem: String,
    address: IpAddr,
}

pub(crate) struct ClientPair {
    pub(crate) certificate_pem: String,
    pub(crate) key_pem: String,
}

impl Pki {
    pub(crate) fn new(address: IpAddr) -> Result<Self, Error> {
        let key = new_key()?;
        let mut params = params("throwline-demo-ca", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(failed)?;
        let pem = certificate.pem();
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate,
            pem,
            address,
        })
    }

    pub(crate) fn ca_pem(&self) -> &str {
        &self.pem
    }

    /// A client's certificate with at most two groups; users with more get a token.
    pub(crate) fn client(&self, user: &str, groups: &[String]) -> Result<ClientPair, Error> {
        let key = new_key()?;
        let mut params = params(user, groups);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(ClientPair {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// TLS 1.2 and 1.3, as the API server has it; the client certificate is asked for, not required.
    pub(crate) fn server_config(&self) -> Result<Arc<ServerConfig>, Error> {
        let key = new_key()?;
        let mut params = params("kube-apiserver", &[]);
        let address = self.address.to_string();
        for name in [
            "localhost",
            "kubernetes",
            "kubernetes.default.svc",
            "127.0.0.1",
            "::1",
            &address,
        ] {
            let san = match name.parse::<IpAddr>() {
                Ok(ip) => rcgen::SanType::IpAddress(ip),
                Err(_) => rcgen::SanType::DnsName(name.try_into().map_err(failed)?),
            };
            if !params.subject_alt_names.contains(&san) {
                params.subject_alt_names.push(san);
            }
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;

        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.der().clone()).map_err(failed)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
            .allow_unauthenticated()
            .build()
            .map_err(failed)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(failed)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(failed)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The user whom a certificate names; `None` when it names none.
pub(crate) fn user_of(certificate: &CertificateDer<'_>) -> Option<User> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate.as_ref()).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups: Vec<String> = subject
        .iter_organization()
        .filter_map(|value| value.as_str().ok())
        .map(str::to_owned)
        .collect();
    (!name.is_empty()).then(|| User::named(&name, &groups))
}

pub(crate) fn base64(bytes: &[u8]) -> String {
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

fn new_key() -> Result<KeyPair, Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)
}

fn params(common_name: &str, organisations: &[String]) -> CertificateParams {
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - Duration::minutes(5);
    params.not_after = now + LIFE;
    let mut subject = rcgen::DistinguishedName::new();
    subject.push(DnType::CommonName, common_name);
    for (index, organisation) in organisations.iter().enumerate() {
        // rcgen keeps one value for each type; the same type by its number is another to it.
        let kind = if index == 0 {
            DnType::OrganizationName
        } else {
            DnType::CustomDnType(vec![2, 5, 4, 10])
        };
        subject.push(kind, organisation.as_str());
    }
    params.distinguished_name = subject;
    params
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Certificates(error.to_string())
}
