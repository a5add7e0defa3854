//! The authority as a relay sees it: one trait, implemented in the same process by `authority`, and
//! the types that both sides share.
//!
//! **Invariant:** no private key crosses this trait. A relay makes its keys itself and sends requests
//! for certificates.

use std::fmt;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustls_pki_types::CertificateDer;

use crate::enrol::{EnrolAnswer, EnrolRequest};
use crate::renewal::{self, Challenge};
use crate::validator::BACKDATED;
use crate::{
    BoxError, CheckError, Kind, PeerIdentity, Revocations, SignedRevocations, SpiffeId, Validator,
    roots, time_text,
};

/// What a relay asks of the authority.
#[async_trait]
pub trait Directory: fmt::Debug + Send + Sync {
    /// The time by the authority's clock.
    fn now(&self) -> SystemTime;

    /// Checks certificates against the authority's roots, and against the list of revocations that
    /// [`refresh_revocations`](Self::refresh_revocations) has read last.
    fn validator(&self) -> &Validator;

    /// Until when a certificate can be renewed, whatever else is known of it. It may be earlier.
    fn renewable_until(&self, peer: &PeerIdentity) -> SystemTime;

    /// Redeems an enrolment token for a certificate. A request that cannot be certified leaves the
    /// token whole.
    async fn redeem(&self, request: &EnrolRequest) -> Result<Issued, RedeemError>;

    /// Begins a renewal.
    async fn renewal_challenge(&self) -> Result<Challenge, DirectoryError>;

    /// A new certificate for the subject of an old one. `carrier` is the identity that has proved the
    /// carrier on which the request came, and must be the same.
    async fn renew(
        &self,
        challenge: Challenge,
        carrier: &SpiffeId,
        request: renewal::Request<'_>,
    ) -> Result<Issued, RenewError>;

    /// A relay's certificate towards other relays, for the key of the request `csr` (PKCS #10, DER);
    /// leaf first.
    async fn certify_relay(
        &self,
        instance: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, DirectoryError>;

    /// A certificate for HTTPS on `hosts` (DNS names and IP addresses), for the key of the request
    /// `csr` (PKCS #10, DER). It is no identity.
    async fn certify_https(
        &self,
        hosts: &[String],
        csr: &[u8],
    ) -> Result<HttpsChain, DirectoryError>;

    /// Every cluster that a token was ever made for, by name.
    async fn clusters(&self) -> Result<Vec<ClusterRecord>, DirectoryError>;

    /// `None` when no token was ever made for a cluster of this name.
    async fn cluster(&self, name: &str) -> Result<Option<ClusterRecord>, DirectoryError>;

    /// An agent's carrier has come up. An empty version leaves the last one known.
    async fn record_connected(
        &self,
        cluster: &str,
        agent_version: &str,
    ) -> Result<(), DirectoryError>;

    /// An agent has reported its status. An empty version leaves the last one known.
    async fn record_status(
        &self,
        cluster: &str,
        kubernetes_version: &str,
        agent_version: &str,
    ) -> Result<(), DirectoryError>;

    /// The last carrier of an agent has gone.
    async fn record_disconnected(&self, cluster: &str) -> Result<(), DirectoryError>;

    /// Reads the list of revocations if it has changed since the validator got it, and gives it to
    /// the validator; `None` when it has not changed.
    async fn refresh_revocations(&self) -> Result<Option<SignedRevocations>, DirectoryError>;

    /// The validator's list of revocations, signed.
    async fn signed_revocations(&self) -> Result<SignedRevocations, DirectoryError>;

    /// Returns when the list of revocations may have changed; never, where the authority has no way
    /// to tell. Only a hint to call [`refresh_revocations`](Self::refresh_revocations), which is also
    /// called at intervals.
    async fn revocations_changed(&self) -> Result<(), DirectoryError>;
}

/// Why the authority gave no answer. A caller may try again after `Unavailable`, not after `Refused`.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// It, or its database, cannot be reached now, or is at fault.
    #[error(transparent)]
    Unavailable(BoxError),
    /// It does not do this for this relay.
    #[error("the authority refused ({code}): {message}")]
    Refused {
        /// A word for programs.
        code: String,
        /// A sentence for people.
        message: String,
    },
}

/// A certificate for HTTPS.
#[derive(Clone, Debug)]
pub struct HttpsChain {
    /// Leaf first, and the CA's own, so that an enrolling part can hold it against its token's pin.
    pub chain: Vec<CertificateDer<'static>>,
    /// The beginning of its validity period.
    pub not_before: SystemTime,
    /// The end of its validity period.
    pub not_after: SystemTime,
}

/// A new certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, without the CA.
    pub chain: Vec<CertificateDer<'static>>,
    /// The CA's certificates.
    pub ca: Vec<CertificateDer<'static>>,
    /// The end of its validity period.
    pub not_after: SystemTime,
    /// By a renewal, and another key has renewed the same certificate before: the answer to that one
    /// was lost, or the old key is in two hands.
    pub is_second: bool,
}

/// What is known of a cluster apart from its carriers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRecord {
    /// The cluster's name.
    pub name: String,
    /// When its first token was made.
    pub created_at: SystemTime,
    /// When it was last enrolled.
    pub enrolled_at: Option<SystemTime>,
    /// When a carrier of its agent last opened.
    pub last_connected_at: Option<SystemTime>,
    /// When a carrier of its agent was last open.
    pub last_seen_at: Option<SystemTime>,
    /// The version of its API server, from the last status report.
    pub kubernetes_version: Option<String>,
    /// The version of its agent, from the last connection.
    pub agent_version: Option<String>,
    /// When one of its certificates was last renewed with a second key, since its last enrolment.
    pub renewed_twice_at: Option<SystemTime>,
}

/// Why a token was not redeemed. Only a holder of the secret can learn more than `Unknown`.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    /// No such token.
    #[error("this enrolment token is not known here: it was made by another authority")]
    Unknown,
    /// The token has expired.
    #[error("this enrolment token expired at {}: ask for a new one", time_text::show(*at))]
    Expired {
        /// When.
        at: SystemTime,
    },
    /// The token was redeemed with another key.
    #[error(
        "this enrolment token was used already, at {}: ask for a new one, and if it was not you \
         who used it, tell your administrator", time_text::show(*at)
    )]
    AlreadyRedeemed {
        /// When.
        at: SystemTime,
    },
    /// The sender does not hold the token, or an intermediary has changed the request.
    #[error("the request is not signed with the enrolment token")]
    NotSigned,
    /// The token is as good as before.
    #[error("{}", wrong_kind(*token))]
    WrongKind {
        /// The kind that the token is for.
        token: Kind,
    },
    /// The token is as good as before.
    #[error("the request does not say which cluster it is for: update the agent")]
    NoClusterUid,
    /// The token is as good as before.
    #[error(
        "the name {name} belongs to another cluster (its namespace kube-system has the UID {uid}): if \
         this one takes its place, give the name up first, beside the relay: throwline cluster \
         release {name}; the token was not used up"
    )]
    NameTaken {
        /// The name.
        name: String,
        /// The UID of the cluster that has it.
        uid: String,
    },
    /// The certificate signing request is invalid.
    #[error(transparent)]
    BadCsr(#[from] CsrError),
    /// The user's name, or a group, is Kubernetes' own.
    #[error(transparent)]
    SystemName(BoxError),
    /// Nothing is wrong with the request.
    #[error(transparent)]
    Unavailable(#[from] DirectoryError),
}

fn wrong_kind(token: Kind) -> &'static str {
    match token {
        Kind::User => {
            "this is a user's token, and an agent needs one of \"throwline token create --cluster \
             NAME\"; it was not used up: \"throwline login\" takes it"
        }
        Kind::Cluster | Kind::Relay => {
            "this is a cluster's token, and a user needs one of \"throwline token create --user \
             NAME\"; it was not used up: \"throwline agent\" takes it"
        }
    }
}

/// Why a request cannot be certified. The requester is at fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Over 4 KiB.
    #[error("the certificate request is too large")]
    TooLarge,
    /// Its encoding is wrong.
    #[error("the certificate request is not PEM")]
    NotPem,
    /// It is no PKCS #10.
    #[error("the certificate request cannot be parsed")]
    Malformed,
    /// Bytes follow it.
    #[error("there is something behind the certificate request")]
    Trailing,
    /// Its key is of another kind.
    #[error("the key of the certificate request is not on P-256")]
    KeyType,
    /// Its signature is of another kind.
    #[error("the certificate request is not signed with ECDSA and SHA-256")]
    SignatureType,
    /// Its signature is wrong.
    #[error("the certificate request is not signed by its key")]
    Signature,
    /// A renewal replaces the key.
    #[error("the certificate request is for the old key: make a new one")]
    OldKey,
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    /// The old certificate is not accepted.
    #[error("the certificate is not good: {0}")]
    Certificate(#[from] CheckError),
    /// The carrier proved one identity, and the request is about another one.
    #[error("{found} was to be renewed over a carrier of {carrier}")]
    WrongCarrier {
        /// The identity of the carrier.
        carrier: SpiffeId,
        /// The identity that was found.
        found: SpiffeId,
    },
    /// A renewal as an intermediary could forge it.
    #[error("the request is not signed by the key of the certificate that it is to renew")]
    NotSigned,
    /// The old certificate is not recorded.
    #[error("the certificate is not known to this authority: enrol again")]
    Unknown,
    /// A user has to sign in again.
    #[error(
        "the enrolment of {} is too long ago to be renewed: log in again with a new token",
        time_text::show(*enrolled_at)
    )]
    EnrolmentTooOld {
        /// When it was enrolled.
        enrolled_at: SystemTime,
    },
    /// The old certificate expired too long ago.
    #[error("the certificate expired at {}, too long ago to be renewed: enrol again", time_text::show(*at))]
    Expired {
        /// When.
        at: SystemTime,
    },
    /// An expired copy of a certificate whose owner has gone on.
    #[error(
        "the certificate has expired, and its successor was renewed since: this is an old copy of it"
    )]
    Superseded,
    /// An operator has released the cluster's name.
    #[error("the name of the cluster was given up: enrol again")]
    Released,
    /// The old certificate, or its identity, was revoked.
    #[error("the certificate was revoked")]
    Revoked,
    /// The rate limit of one identity's renewals.
    #[error("this identity's certificates were renewed too often")]
    TooOften {
        /// How long to wait before the next attempt.
        retry_after: Duration,
    },
    /// The certificate signing request is invalid.
    #[error(transparent)]
    BadCsr(#[from] CsrError),
    /// The user's name, or a group, is Kubernetes' own.
    #[error(transparent)]
    SystemName(BoxError),
    /// Nothing is wrong with the request.
    #[error(transparent)]
    Unavailable(#[from] DirectoryError),
}

impl ClusterRecord {
    /// Whether its identity was revoked, and not enrolled again since.
    pub fn is_revoked(&self, list: &Revocations) -> bool {
        let begins = self.enrolled_at.and_then(|at| at.checked_sub(BACKDATED));
        begins.is_some_and(|begins| list.covers_life(Kind::Cluster, &self.name, begins))
    }
}

impl Issued {
    /// The body of the enrolment's answer.
    pub fn to_answer(&self) -> EnrolAnswer {
        EnrolAnswer {
            chain: roots::certificates_to_pem(&self.chain),
            ca: roots::certificates_to_pem(&self.ca),
        }
    }
}
