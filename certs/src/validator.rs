//! The one place that decides whether a certificate is good.
//!
//! rustls-webpki checks the path and its signatures; names, key, usages, life and revocation are
//! checked here, because webpki does not support SPIFFE names and ignores KeyUsage.

use crate::{
    BadName, CheckError, Kind, MalformedCertificate, PeerIdentity, Revocations, Roots, SpiffeId,
    TrustDomain, sha256, spiffe,
};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// How far a certificate may lie in the future of our clock. Together with the authority's
/// back-dating this lets clocks differ by two minutes. The end of life has no such tolerance:
/// a certificate is renewed long before it.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// How far before its issue a certificate's life begins, for clocks that are behind the authority's.
pub const BACKDATED: Duration = Duration::from_secs(60);

/// Leaf, and up to three CA certificates beside it.
const MAX_CHAIN: usize = 4;
/// A certificate of ours with the most groups has about 3 KiB.
const MAX_CERTIFICATE: usize = 8 * 1024;

const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const PRIME256V1: &str = "1.2.840.10045.3.1.7";
/// 0x04, x, y.
const UNCOMPRESSED_POINT: usize = 65;

/// In which role of a handshake, or of an assertion, the certificate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// The side that opens the connection.
    Client,
    /// The side that accepts the connection.
    Server,
}

/// The peers whose certificates are accepted in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpectedPeer {
    /// The kinds of identities that are accepted.
    pub kinds: &'static [Kind],
    /// The role that the certificate has to allow.
    pub usage: Usage,
}

impl ExpectedPeer {
    /// A dialer of a relay's public listener.
    pub const CARRIER: Self = Self {
        kinds: &[Kind::Cluster, Kind::User],
        usage: Usage::Client,
    };
    /// A dialer of a relay's listener for peers.
    pub const PEER_CLIENT: Self = Self {
        kinds: &[Kind::Relay],
        usage: Usage::Client,
    };
    /// A relay whose listener for peers is dialled.
    pub const PEER_SERVER: Self = Self {
        kinds: &[Kind::Relay],
        usage: Usage::Server,
    };
    /// The client of a sealed session.
    pub const SESSION_USER: Self = Self {
        kinds: &[Kind::User],
        usage: Usage::Client,
    };
    /// The server of a sealed session.
    pub const SESSION_CLUSTER: Self = Self {
        kinds: &[Kind::Cluster],
        usage: Usage::Server,
    };
}

/// Checks certificates against the authority's roots. Clones share the list of revocations.
///
/// ```
/// use std::time::SystemTime;
///
/// use rcgen::{CertificateParams, CertificateSigningRequestParams, Issuer, KeyPair, SanType};
/// use throwline_certs::{CheckError, ExpectedPeer, Kind, PendingIdentity, Roots, Validator};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // The authority of the trust domain example.com.
/// let key = KeyPair::generate()?;
/// let mut ca = CertificateParams::default();
/// ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
/// ca.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
/// ca.subject_alt_names = vec![SanType::URI("spiffe://example.com".try_into()?)];
/// let roots = Roots::new(vec![ca.self_signed(&key)?.der().clone()])?;
/// let issuer = Issuer::new(ca, key);
///
/// // A key is made where it is used; the authority sees the request only.
/// let pending = PendingIdentity::generate()?;
/// let mut request = CertificateSigningRequestParams::from_der(&pending.csr_der().into())?;
/// let leaf = &mut request.params;
/// leaf.is_ca = rcgen::IsCa::ExplicitNoCa;
/// leaf.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
/// leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
/// leaf.distinguished_name.push(rcgen::DnType::CommonName, "anna");
/// leaf.subject_alt_names = vec![SanType::URI("spiffe://example.com/user/anna".try_into()?)];
/// let identity = pending.complete(vec![request.signed_by(&issuer)?.der().clone()])?;
///
/// // The peer verifies it.
/// let validator = Validator::new(roots.clone(), roots.trust_domain().clone());
/// let now = SystemTime::now();
/// let peer = validator.check(identity.chain(), ExpectedPeer::SESSION_USER, now)?;
/// assert_eq!((peer.id.kind(), peer.id.name()), (Kind::User, "anna"));
/// let rejected = validator.check(identity.chain(), ExpectedPeer::SESSION_CLUSTER, now);
/// assert_eq!(rejected, Err(CheckError::WrongKind(Kind::User)));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Validator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    roots: Roots,
    domain: TrustDomain,
    revoked: watch::Sender<Arc<Revocations>>,
}

impl Validator {
    /// A validator without revocations.
    pub fn new(roots: Roots, domain: TrustDomain) -> Self {
        Self(Arc::new(Inner {
            roots,
            domain,
            revoked: watch::Sender::default(),
        }))
    }

    /// Verifies that `chain` (leaf first) is of an expected peer, and valid at `now`.
    ///
    /// # Errors
    /// The first check that failed; [`CheckError::Revoked`] and the validity period come last.
    pub fn check(
        &self,
        chain: &[CertificateDer<'_>],
        expected: ExpectedPeer,
        now: SystemTime,
    ) -> Result<PeerIdentity, CheckError> {
        let peer = self.check_ignoring_validity(chain, expected, now)?;
        self.check_standing(&peer, now)?;
        Ok(peer)
    }

    /// Whether a certificate that was checked before is still good at `now`: not revoked, and within
    /// its life.
    ///
    /// # Errors
    /// [`CheckError::Revoked`] before [`CheckError::Expired`], since a new token helps against both.
    pub fn check_standing(&self, peer: &PeerIdentity, now: SystemTime) -> Result<(), CheckError> {
        self.check_revoked(peer)?;
        check_validity(peer, now)
    }

    /// The first half of [`check_standing`](Self::check_standing).
    pub(crate) fn check_revoked(&self, peer: &PeerIdentity) -> Result<(), CheckError> {
        if self.is_revoked(peer) {
            Err(CheckError::Revoked {
                serial: peer.serial.clone(),
            })
        } else {
            Ok(())
        }
    }

    /// The trust domain.
    pub fn domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    /// The trusted CAs.
    pub fn roots(&self) -> &Roots {
        &self.0.roots
    }

    /// Replaces the list of revocations, here and in every clone, if `newer` is of a higher version;
    /// whether it was.
    pub fn replace_revocations(&self, newer: Revocations) -> bool {
        self.0.revoked.send_if_modified(|list| {
            let is_newer = newer.version() > list.version();
            if is_newer {
                *list = Arc::new(newer);
            }
            is_newer
        })
    }

    /// The present list of revocations.
    pub fn revocations(&self) -> Arc<Revocations> {
        Arc::clone(&self.0.revoked.borrow())
    }

    /// The list of revocations, with a notification when it is replaced.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Revocations>> {
        self.0.revoked.subscribe()
    }

    /// Whether the list of revocations covers this certificate.
    pub fn is_revoked(&self, peer: &PeerIdentity) -> bool {
        self.0.revoked.borrow().covers(peer)
    }

    /// Everything except validity period and revocation, for callers that have more to verify before
    /// they may report these. They must call [`check_standing`](Self::check_standing), or its halves,
    /// in the end.
    ///
    /// # Errors
    /// As [`check`](Self::check), without revocation and validity period.
    pub fn check_ignoring_validity(
        &self,
        chain: &[CertificateDer<'_>],
        expected: ExpectedPeer,
        now: SystemTime,
    ) -> Result<PeerIdentity, CheckError> {
        if chain.len() > MAX_CHAIN || chain.iter().any(|der| der.len() > MAX_CERTIFICATE) {
            return Err(CheckError::Malformed(MalformedCertificate::TooLarge));
        }
        let [leaf, intermediates @ ..] = chain else {
            return Err(CheckError::Malformed(MalformedCertificate::Missing));
        };
        let (peer, usages) = parse(leaf)?;
        if !expected.kinds.contains(&peer.id.kind()) {
            return Err(CheckError::WrongKind(peer.id.kind()));
        }
        if peer.id.domain() != self.domain() {
            return Err(CheckError::BadName(BadName::OtherDomain {
                id: Box::new(peer.id),
                domain: self.domain().clone(),
            }));
        }
        usages.check(expected.usage)?;
        self.check_path(leaf, intermediates, &peer, expected.usage, now)?;
        Ok(peer)
    }

    fn check_path(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        peer: &PeerIdentity,
        usage: Usage,
        now: SystemTime,
    ) -> Result<(), CheckError> {
        let malformed = |error: webpki::Error| CheckError::Malformed(error.into());
        let end_entity = webpki::EndEntityCert::try_from(leaf).map_err(malformed)?;
        let anchors = self
            .roots()
            .certificates()
            .iter()
            .map(webpki::anchor_from_trusted_cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(malformed)?;
        // The life is checked by `check_validity`, with our tolerance, after all else.
        let time = now.clamp(peer.not_before, peer.not_after);
        let time = UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default());
        let usage = match usage {
            Usage::Client => webpki::KeyUsage::client_auth(),
            Usage::Server => webpki::KeyUsage::server_auth(),
        };
        end_entity
            .verify_for_usage(
                // The authority has keys on P-256 alone: no link of a chain may use another
                // algorithm.
                &[webpki::aws_lc_rs::ECDSA_P256_SHA256],
                &anchors,
                intermediates,
                time,
                usage,
                None,
                None,
            )
            .map(drop)
            .map_err(|error| match error {
                webpki::Error::RequiredEkuNotFoundContext(_) => {
                    CheckError::BadUsage("its extended key usage is another")
                }
                webpki::Error::UnknownIssuer
                | webpki::Error::InvalidSignatureForPublicKey
                | webpki::Error::CaUsedAsEndEntity
                | webpki::Error::EndEntityUsedAsCa => CheckError::UnknownIssuer,
                error => malformed(error),
            })
    }
}

/// The life of a certificate, `not_before` with [`CLOCK_TOLERANCE`].
pub(crate) fn check_validity(peer: &PeerIdentity, now: SystemTime) -> Result<(), CheckError> {
    if now > peer.not_after {
        return Err(CheckError::Expired {
            not_after: peer.not_after,
            now,
        });
    }
    if now + CLOCK_TOLERANCE < peer.not_before {
        return Err(CheckError::NotYetValid {
            not_before: peer.not_before,
            now,
        });
    }
    Ok(())
}

/// Whether `signature` (ECDSA P-256 SHA-256, ASN.1) over `message` is by the peer's key.
pub fn verify_signature(peer: &PeerIdentity, message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &peer.public_key)
        .verify(message, signature)
        .is_ok()
}

/// Reads a leaf without verifying its issuer.
///
/// # Errors
/// The certificate is malformed.
pub fn read(leaf: &CertificateDer<'_>) -> Result<PeerIdentity, CheckError> {
    if leaf.len() > MAX_CERTIFICATE {
        return Err(CheckError::Malformed(MalformedCertificate::TooLarge));
    }
    parse(leaf).map(|(peer, _)| peer)
}

struct Usages {
    client: bool,
    server: bool,
}

impl Usages {
    fn check(&self, usage: Usage) -> Result<(), CheckError> {
        match usage {
            Usage::Client if !self.client => Err(CheckError::BadUsage("not as a client")),
            Usage::Server if !self.server => Err(CheckError::BadUsage("not as a server")),
            _ => Ok(()),
        }
    }
}

fn parse(leaf: &CertificateDer<'_>) -> Result<(PeerIdentity, Usages), CheckError> {
    use MalformedCertificate::{Extension, KeyType, Reversed, Syntax, Trailing};
    let malformed = CheckError::Malformed;
    let (rest, certificate) = X509Certificate::from_der(leaf).map_err(|_| malformed(Syntax))?;
    // Trailing bytes would give one certificate many encodings, and many fingerprints.
    if !rest.is_empty() {
        return Err(malformed(Trailing));
    }
    // RFC 5280 section 4.2 forbids an extension twice: another reader could take the other one.
    let twice = |_| malformed(Extension);
    let is_ca = certificate
        .basic_constraints()
        .map_err(twice)?
        .is_some_and(|extension| extension.value.ca);
    if is_ca {
        return Err(CheckError::BadUsage("it is a CA's"));
    }
    let signs = certificate
        .key_usage()
        .map_err(twice)?
        .is_some_and(|extension| extension.value.digital_signature());
    if !signs {
        return Err(CheckError::BadUsage("not for signatures"));
    }
    let usages = match certificate.extended_key_usage().map_err(twice)? {
        Some(extension) => Usages {
            client: extension.value.client_auth,
            server: extension.value.server_auth,
        },
        // Without the extension, RFC 5280 permits every usage: a client's certificate would serve
        // as a server's.
        None => return Err(CheckError::BadUsage("it has no extended key usage")),
    };
    let names = certificate.subject_alternative_name().map_err(twice)?;
    let names = names.map_or(&[][..], |extension| &extension.value.general_names);
    let id = spiffe_id(names)?;
    let groups = match id.kind() {
        Kind::User => groups_of_user(&certificate, &id)?,
        Kind::Cluster | Kind::Relay => Vec::new(),
    };
    let validity = certificate.validity();
    let peer = PeerIdentity {
        groups,
        serial: hex(certificate.raw_serial()),
        not_before: time_of(validity.not_before.timestamp())?,
        not_after: time_of(validity.not_after.timestamp())?,
        fingerprint: sha256(leaf),
        public_key: p256_point(certificate.public_key()).ok_or_else(|| malformed(KeyType))?,
        id,
    };
    // `check_path` clamps the time to this interval, and `clamp` panics where it is reversed.
    if peer.not_after < peer.not_before {
        return Err(malformed(Reversed));
    }
    Ok((peer, usages))
}

/// The uncompressed point, if the key is on P-256.
pub fn p256_point(key: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Option<Vec<u8>> {
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let point = key.subject_public_key.data.as_ref();
    // The uncompressed form only: keys are compared byte by byte, so one key needs one encoding.
    let is_p256 = key.algorithm.algorithm.to_id_string() == EC_PUBLIC_KEY
        && curve.to_id_string() == PRIME256V1
        && point.len() == UNCOMPRESSED_POINT
        && point.first() == Some(&4);
    is_p256.then(|| point.to_vec())
}

/// Exactly one URI; DNS and IP names beside it only for relays, which are servers of HTTPS too.
fn spiffe_id(names: &[GeneralName<'_>]) -> Result<SpiffeId, CheckError> {
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    // With two URIs, this reader and another could take different identities from one certificate.
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(CheckError::BadName(BadName::NotOneUri));
    };
    let id: SpiffeId = uri.parse()?;
    let others_allowed = id.kind() == Kind::Relay;
    let acceptable = names.iter().all(|name| match name {
        GeneralName::URI(_) => true,
        GeneralName::DNSName(_) | GeneralName::IPAddress(_) => others_allowed,
        _ => false,
    });
    if !acceptable {
        return Err(CheckError::BadName(BadName::OtherNames));
    }
    Ok(id)
}

fn groups_of_user(
    certificate: &X509Certificate<'_>,
    id: &SpiffeId,
) -> Result<Vec<String>, CheckError> {
    let subject = certificate.subject();
    let not_text = |_| CheckError::BadName(BadName::NotText);
    let mut common_names = subject.iter_common_name();
    let (Some(name), None) = (common_names.next(), common_names.next()) else {
        return Err(CheckError::BadName(BadName::NotOneCn));
    };
    // Kubernetes reads the user from CN, and Throwline from the URI: both must be the same.
    if name.as_str().map_err(not_text)? != id.name() {
        return Err(CheckError::BadName(BadName::CnDiffers));
    }
    let groups = subject
        .iter_organization()
        .map(|group| group.as_str().map(str::to_owned))
        .collect::<Result<Vec<_>, _>>()
        .map_err(not_text)?;
    // Checked again at each reader, since the groups go into impersonation headers.
    spiffe::check_groups(&groups)?;
    Ok(groups)
}

fn time_of(seconds: i64) -> Result<SystemTime, CheckError> {
    u64::try_from(seconds)
        .ok()
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .ok_or(CheckError::Malformed(MalformedCertificate::BeforeEpoch))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
