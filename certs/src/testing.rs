//! What several tests need: identities, good and forged.

use crate::{
    Identity, PendingIdentity,
    authority::{Authority, Subject},
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::CertificateDer;
use std::time::{Duration, SystemTime};
use url::Url;

pub(crate) struct World {
    pub(crate) authority: Authority,
    pub(crate) url: Url,
    _dir: tempfile::TempDir,
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let url = Url::parse("https://relay.example.com").unwrap();
        Self {
            authority: Authority::open_or_create(dir.path(), &url).await.unwrap(),
            url,
            _dir: dir,
        }
    }

    pub(crate) async fn user(&self, name: &str) -> Identity {
        self.enrol(Subject::User {
            name: name.to_owned(),
            groups: vec!["dev".to_owned()],
        })
        .await
    }

    pub(crate) async fn cluster(&self, name: &str) -> Identity {
        self.enrol(Subject::Cluster(name.to_owned())).await
    }

    async fn enrol(&self, subject: Subject) -> Identity {
        let hour = Duration::from_secs(3600);
        let token = self
            .authority
            .create_token(&subject, hour, &self.url)
            .await
            .unwrap();
        let pending = PendingIdentity::generate().unwrap();
        let issued = self
            .authority
            .redeem(&token.secret, &pending.csr_pem())
            .await
            .unwrap();
        pending.complete(issued.chain).unwrap()
    }
}

/// A CA whose holder signs anything.
pub(crate) struct Forger {
    pub(crate) ca: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Forger {
    /// A CA that looks like the authority's of `domain`.
    pub(crate) fn new(domain: &str) -> Self {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(
            DnType::CommonName,
            format!("Throwline authority of {domain}"),
        );
        params.subject_alt_names = vec![uri(&format!("spiffe://{domain}"))];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self {
            ca: params.self_signed(&key).unwrap().der().clone(),
            issuer: Issuer::new(params, key),
        }
    }

    /// The holder of an ordinary certificate who signs others with it.
    pub(crate) fn with(identity: &Identity) -> Self {
        let key = KeyPair::from_pem(&identity.key_pem()).unwrap();
        let ca = identity.chain()[0].clone();
        Self {
            issuer: Issuer::from_ca_cert_der(&ca, key).unwrap(),
            ca,
        }
    }

    /// A good certificate for the user alice of `d`, but for what `change` does to it.
    pub(crate) fn issue(
        &self,
        algorithm: &'static rcgen::SignatureAlgorithm,
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = alice();
        change(&mut params);
        params.signed_by(&key, &self.issuer).unwrap().der().clone()
    }
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn alice() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "alice");
    params.subject_alt_names = vec![uri("spiffe://d/user/alice")];
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + Duration::from_secs(3600)).into();
    params
}
