//! What several tests need: an authority in memory, identities, good and forged.

use crate::{
    EnrolmentToken, Identity, Kind, PeerIdentity, PendingIdentity, Revocations, Roots, Secret,
    SignedRevocations, SpiffeId, TrustDomain, Validator,
    directory::{
        ClusterRecord, Directory, DirectoryError, HttpsChain, Issued, RedeemError, RenewError,
    },
    enrol::EnrolRequest,
    renewal,
};
use async_trait::async_trait;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SigningKey as _,
};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, pem::PemObject};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use url::Url;

const HOUR: Duration = Duration::from_secs(3600);

pub(crate) struct World {
    pub(crate) authority: TestAuthority,
    pub(crate) url: Url,
}

impl World {
    pub(crate) async fn new() -> Self {
        let url = Url::parse("https://relay.example.com").unwrap();
        Self {
            authority: TestAuthority::new(&url),
            url,
        }
    }

    pub(crate) async fn user(&self, name: &str) -> Identity {
        self.authority.identity(Kind::User, name)
    }

    pub(crate) async fn cluster(&self, name: &str) -> Identity {
        self.authority.identity(Kind::Cluster, name)
    }
}

type Tokens = HashMap<Vec<u8>, (String, Option<SystemTime>)>;

/// A CA with tokens in memory: as much of an authority as its counterparts here need. The one that
/// is used is tested in its own crate.
#[derive(Clone)]
pub(crate) struct TestAuthority {
    ca: Arc<Forger>,
    validator: Validator,
    /// By the tokens' public keys: the name of a cluster, and when the token was redeemed.
    tokens: Arc<Mutex<Tokens>>,
    relay_life: Duration,
}

impl TestAuthority {
    pub(crate) fn new(url: &Url) -> Self {
        let ca = Forger::new(url.host_str().unwrap());
        let roots = Roots::new(vec![ca.ca.clone()]).unwrap();
        let domain = roots.trust_domain().clone();
        Self {
            ca: Arc::new(ca),
            validator: Validator::new(roots, domain),
            tokens: Arc::default(),
            relay_life: HOUR,
        }
    }

    pub(crate) fn with_relay_life(mut self, life: Duration) -> Self {
        self.relay_life = life;
        self
    }

    pub(crate) fn validator(&self) -> &Validator {
        &self.validator
    }

    pub(crate) fn roots(&self) -> &Roots {
        self.validator.roots()
    }

    pub(crate) fn trust_domain(&self) -> &TrustDomain {
        self.validator.domain()
    }

    pub(crate) fn directory(&self) -> Arc<dyn Directory> {
        Arc::new(self.clone())
    }

    pub(crate) fn sign_revocations(&self, list: &Revocations) -> SignedRevocations {
        let list = list.to_document(self.trust_domain()).unwrap();
        let signed = SignedRevocations::signed_bytes(&list);
        let signature = self.ca.issuer.key().sign(&signed).unwrap();
        SignedRevocations { list, signature }
    }

    /// For a cluster of this name.
    pub(crate) fn create_token(&self, name: &str, relay: &Url) -> EnrolmentToken {
        let secret = Secret::generate();
        let key = secret.public_key().unwrap();
        let mut tokens = self.tokens.lock().unwrap();
        tokens.insert(key, (name.to_owned(), None));
        EnrolmentToken {
            relay: relay.clone(),
            secret,
            pin: self.roots().pins()[0],
        }
    }

    fn identity(&self, kind: Kind, name: &str) -> Identity {
        let pending = PendingIdentity::generate().unwrap();
        let leaf = self.certify(kind, name, HOUR, pending.csr_der());
        pending.complete(vec![leaf]).unwrap()
    }

    fn certify(
        &self,
        kind: Kind,
        name: &str,
        life: Duration,
        csr: &[u8],
    ) -> CertificateDer<'static> {
        let id = SpiffeId::new(self.trust_domain().clone(), kind, name).unwrap();
        self.ca.certify(csr, |params| {
            let subject = &mut params.distinguished_name;
            subject.push(DnType::CommonName, name);
            if kind == Kind::User {
                subject.push(DnType::OrganizationName, "dev");
            } else {
                let server = ExtendedKeyUsagePurpose::ServerAuth;
                params.extended_key_usages.push(server);
            }
            params.subject_alt_names = vec![uri(&id.to_string())];
            params.not_after = (SystemTime::now() + life).into();
        })
    }
}

#[async_trait]
impl Directory for TestAuthority {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn validator(&self) -> &Validator {
        &self.validator
    }

    fn renewable_until(&self, peer: &PeerIdentity) -> SystemTime {
        peer.not_after
    }

    async fn redeem(&self, request: &EnrolRequest) -> Result<Issued, RedeemError> {
        let key = request.key().ok_or(RedeemError::Unknown)?;
        let mut tokens = self.tokens.lock().unwrap();
        let (name, redeemed) = tokens.get_mut(&key).ok_or(RedeemError::Unknown)?;
        if let Some(at) = *redeemed {
            return Err(RedeemError::AlreadyRedeemed { at });
        }
        if !request.is_signed(&key, &self.roots().pins()[0]) {
            return Err(RedeemError::NotSigned);
        }
        *redeemed = Some(SystemTime::now());
        let csr = CertificateSigningRequestDer::from_pem_slice(request.csr.as_bytes()).unwrap();
        Ok(Issued {
            chain: vec![self.certify(Kind::Cluster, name, HOUR, &csr)],
            ca: self.roots().certificates().to_vec(),
            not_after: SystemTime::now() + HOUR,
            is_second: false,
        })
    }

    async fn renewal_challenge(&self) -> Result<renewal::Challenge, DirectoryError> {
        unreachable!("nothing is renewed here")
    }

    async fn renew(
        &self,
        _: renewal::Challenge,
        _: &SpiffeId,
        _: renewal::Request<'_>,
    ) -> Result<Issued, RenewError> {
        unreachable!("nothing is renewed here")
    }

    async fn certify_relay(
        &self,
        instance: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, DirectoryError> {
        Ok(vec![self.certify(
            Kind::Relay,
            instance,
            self.relay_life,
            csr,
        )])
    }

    async fn certify_https(
        &self,
        hosts: &[String],
        csr: &[u8],
    ) -> Result<HttpsChain, DirectoryError> {
        let not_after = SystemTime::now() + self.relay_life;
        let leaf = self.ca.certify(csr, |params| {
            let hosts = CertificateParams::new(hosts).unwrap();
            params.subject_alt_names = hosts.subject_alt_names;
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.not_after = not_after.into();
        });
        Ok(HttpsChain {
            chain: vec![leaf, self.ca.ca.clone()],
            not_before: SystemTime::now(),
            not_after,
        })
    }

    async fn clusters(&self) -> Result<Vec<ClusterRecord>, DirectoryError> {
        Ok(Vec::new())
    }

    async fn cluster(&self, _: &str) -> Result<Option<ClusterRecord>, DirectoryError> {
        Ok(None)
    }

    async fn record_connected(&self, _: &str, _: &str) -> Result<(), DirectoryError> {
        Ok(())
    }

    async fn record_status(&self, _: &str, _: &str, _: &str) -> Result<(), DirectoryError> {
        Ok(())
    }

    async fn record_disconnected(&self, _: &str) -> Result<(), DirectoryError> {
        Ok(())
    }

    async fn refresh_revocations(&self) -> Result<Option<SignedRevocations>, DirectoryError> {
        Ok(None)
    }

    async fn signed_revocations(&self) -> Result<SignedRevocations, DirectoryError> {
        Ok(self.sign_revocations(&self.validator.revocations()))
    }

    async fn revocations_changed(&self) -> Result<(), DirectoryError> {
        std::future::pending().await
    }
}

impl fmt::Debug for TestAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestAuthority").finish_non_exhaustive()
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

    /// A certificate for the key of a request, nameless but for what `change` does to it.
    fn certify(
        &self,
        csr: &[u8],
        change: impl FnOnce(&mut CertificateParams),
    ) -> CertificateDer<'static> {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        request.params = alice();
        request.params.distinguished_name = DistinguishedName::new();
        change(&mut request.params);
        let certificate = request.signed_by(&self.issuer).unwrap();
        certificate.der().clone()
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
