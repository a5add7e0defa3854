//! The one place that decides whether a certificate is good.
//!
//! rustls-webpki checks the path and its signatures; names, key, usages, life and revocation are
//! checked here, because webpki knows no SPIFFE name and ignores KeyUsage.

use crate::{Kind, NameError, Roots, SpiffeId, TrustDomain, files, sha256, spiffe};
use arc_swap::ArcSwap;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1, UnparsedPublicKey};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// How far a certificate may lie in the future of our clock. Together with the authority's
/// back-dating this lets clocks differ by two minutes. The end of life has no such tolerance:
/// renewal comes long before it.
pub const CLOCK_TOLERANCE: Duration = Duration::from_secs(60);

/// Leaf, and up to three CA certificates beside it.
const MAX_CHAIN: usize = 4;
/// A certificate of ours with the most groups has about 3 KiB.
const MAX_CERTIFICATE: usize = 8 * 1024;

const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
const PRIME256V1: &str = "1.2.840.10045.3.1.7";
/// 0x04, x, y.
const UNCOMPRESSED_POINT: usize = 65;

/// Somebody whose certificate was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    pub id: SpiffeId,
    /// The groups of a user; empty for others.
    pub groups: Vec<String>,
    /// In lower-case hex.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// SHA-256 of the certificate.
    pub fingerprint: [u8; 32],
    /// The point on P-256, uncompressed.
    pub public_key: Vec<u8>,
}

/// In which role of a handshake, or of an assertion, the certificate is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    Client,
    Server,
}

/// Whose certificate is acceptable here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    pub kinds: &'static [Kind],
    pub usage: Usage,
}

impl Want {
    /// Whoever may open a carrier on a relay's public listener.
    pub const CARRIER: Self = Self {
        kinds: &[Kind::Cluster, Kind::User],
        usage: Usage::Client,
    };
    /// Whoever may open a carrier on a relay's listener for peers.
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

/// Why a certificate is not good. [`Expired`](Self::Expired) and
/// [`NotYetValid`](Self::NotYetValid) are reported only when everything else is good.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    #[error(
        "the certificate expired at {} ({} ago by this machine's clock)",
        files::show(*not_after), files::show_span(now.duration_since(*not_after).unwrap_or_default())
    )]
    Expired {
        not_after: SystemTime,
        now: SystemTime,
    },
    #[error(
        "the certificate is valid from {} only, and this machine's clock is {} before that: \
         one of the two clocks is wrong",
        files::show(*not_before), files::show_span(not_before.duration_since(*now).unwrap_or_default())
    )]
    NotYetValid {
        not_before: SystemTime,
        now: SystemTime,
    },
    #[error("the certificate was issued by another authority")]
    UnknownIssuer,
    #[error("the certificate is a {0}'s, which is not expected here")]
    WrongKind(Kind),
    #[error("the certificate's name is not acceptable: {0}")]
    BadName(String),
    #[error("the certificate may not be used like this: {0}")]
    BadUsage(&'static str),
    #[error("the certificate {serial} was revoked")]
    Revoked { serial: String },
    #[error("the certificate is malformed: {0}")]
    Malformed(String),
}

impl From<NameError> for CheckError {
    fn from(error: NameError) -> Self {
        Self::BadName(error.0)
    }
}

/// Checks certificates against the authority's roots. Clones share the revoked serials.
#[derive(Clone, Debug)]
pub struct Validator(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    roots: Roots,
    domain: TrustDomain,
    revoked: ArcSwap<HashSet<String>>,
}

impl Validator {
    pub fn new(roots: Roots, domain: TrustDomain) -> Self {
        Self(Arc::new(Inner {
            roots,
            domain,
            revoked: ArcSwap::default(),
        }))
    }

    /// Whether `chain` (leaf first) names somebody wanted here, at `now`.
    pub fn check(
        &self,
        chain: &[CertificateDer<'_>],
        want: Want,
        now: SystemTime,
    ) -> Result<PeerIdentity, CheckError> {
        let peer = self.check_but_life(chain, want, now)?;
        check_life(&peer, now)?;
        Ok(peer)
    }

    pub fn domain(&self) -> &TrustDomain {
        &self.0.domain
    }

    pub fn roots(&self) -> &Roots {
        &self.0.roots
    }

    /// Replaces the set of revoked serials, here and in every clone.
    pub fn revoke(&self, serials: HashSet<String>) {
        self.0.revoked.store(Arc::new(serials));
    }

    pub fn is_revoked(&self, serial: &str) -> bool {
        self.0.revoked.load().contains(serial)
    }

    /// Everything except the life, for callers that have more to verify before they may say that
    /// a certificate has expired. They must call [`check_life`] in the end.
    pub(crate) fn check_but_life(
        &self,
        chain: &[CertificateDer<'_>],
        want: Want,
        now: SystemTime,
    ) -> Result<PeerIdentity, CheckError> {
        if chain.len() > MAX_CHAIN || chain.iter().any(|der| der.len() > MAX_CERTIFICATE) {
            return Err(CheckError::Malformed("it is too large".to_owned()));
        }
        let [leaf, intermediates @ ..] = chain else {
            return Err(CheckError::Malformed("there is none".to_owned()));
        };
        let (peer, usages) = parse(leaf)?;
        if !want.kinds.contains(&peer.id.kind()) {
            return Err(CheckError::WrongKind(peer.id.kind()));
        }
        if peer.id.domain() != self.domain() {
            return Err(CheckError::BadName(format!(
                "{} is not of the trust domain {}",
                peer.id,
                self.domain()
            )));
        }
        usages.check(want.usage)?;
        self.check_path(leaf, intermediates, &peer, want.usage, now)?;
        if self.is_revoked(&peer.serial) {
            return Err(CheckError::Revoked {
                serial: peer.serial,
            });
        }
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
        let malformed = |error: webpki::Error| CheckError::Malformed(error.to_string());
        let end_entity = webpki::EndEntityCert::try_from(leaf).map_err(malformed)?;
        let anchors = self
            .roots()
            .certificates()
            .iter()
            .map(webpki::anchor_from_trusted_cert)
            .collect::<Result<Vec<_>, _>>()
            .map_err(malformed)?;
        // The life is checked by `check_life`, with our tolerance, after all else.
        let time = now.clamp(peer.not_before, peer.not_after);
        let time = UnixTime::since_unix_epoch(time.duration_since(UNIX_EPOCH).unwrap_or_default());
        let usage = match usage {
            Usage::Client => webpki::KeyUsage::client_auth(),
            Usage::Server => webpki::KeyUsage::server_auth(),
        };
        end_entity
            .verify_for_usage(
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
pub(crate) fn check_life(peer: &PeerIdentity, now: SystemTime) -> Result<(), CheckError> {
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

/// Reads a leaf without judging who issued it.
pub(crate) fn read(leaf: &CertificateDer<'_>) -> Result<PeerIdentity, CheckError> {
    if leaf.len() > MAX_CERTIFICATE {
        return Err(CheckError::Malformed("it is too large".to_owned()));
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
    let malformed = |what: &str| CheckError::Malformed(what.to_owned());
    let (rest, certificate) =
        X509Certificate::from_der(leaf).map_err(|_| malformed("it cannot be parsed"))?;
    if !rest.is_empty() {
        return Err(malformed("there is something behind it"));
    }
    let twice = |_| malformed("an extension is invalid or there twice");
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
        public_key: p256_point(certificate.public_key())
            .ok_or_else(|| malformed("its key is not on P-256"))?,
        id,
    };
    if peer.not_after < peer.not_before {
        return Err(malformed("its life ends before it begins"));
    }
    Ok((peer, usages))
}

/// The uncompressed point, if the key is on P-256.
pub(crate) fn p256_point(key: &x509_parser::x509::SubjectPublicKeyInfo<'_>) -> Option<Vec<u8>> {
    let curve = key.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let point = key.subject_public_key.data.as_ref();
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
    let (Some(uri), None) = (uris.next(), uris.next()) else {
        return Err(CheckError::BadName(
            "there is not exactly one URI".to_owned(),
        ));
    };
    let id: SpiffeId = uri.parse()?;
    let others_allowed = id.kind() == Kind::Relay;
    let acceptable = names.iter().all(|name| match name {
        GeneralName::URI(_) => true,
        GeneralName::DNSName(_) | GeneralName::IPAddress(_) => others_allowed,
        _ => false,
    });
    if !acceptable {
        return Err(CheckError::BadName(
            "there are names of other kinds".to_owned(),
        ));
    }
    Ok(id)
}

fn groups_of_user(
    certificate: &X509Certificate<'_>,
    id: &SpiffeId,
) -> Result<Vec<String>, CheckError> {
    let subject = certificate.subject();
    let not_text = |_| CheckError::BadName("the subject is not text".to_owned());
    let mut common_names = subject.iter_common_name();
    let (Some(name), None) = (common_names.next(), common_names.next()) else {
        return Err(CheckError::BadName(
            "there is not exactly one CN".to_owned(),
        ));
    };
    if name.as_str().map_err(not_text)? != id.name() {
        return Err(CheckError::BadName("CN and URI differ".to_owned()));
    }
    let groups = subject
        .iter_organization()
        .map(|group| group.as_str().map(str::to_owned))
        .collect::<Result<Vec<_>, _>>()
        .map_err(not_text)?;
    spiffe::check_groups(&groups)?;
    Ok(groups)
}

fn time_of(seconds: i64) -> Result<SystemTime, CheckError> {
    u64::try_from(seconds)
        .ok()
        .and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)))
        .ok_or_else(|| CheckError::Malformed("its life begins before 1970".to_owned()))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests;
