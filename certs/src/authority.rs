//! The authority: who is who. It holds the CA in a state directory, and a small database: beside
//! it, where several processes (the relay, `throwline token create`) may have it open at once, or
//! in a PostgreSQL that several relays with the same CA share.
//!
//! **Invariant:** the CA's key is in the state directory and nowhere else.
//!
//! **Invariant:** a token's secret is never stored, and it is redeemed at most once, whoever asks
//! and from however many processes.

mod ca;
mod csr;
mod name;
mod open;
mod store;
#[cfg(test)]
mod tests;

use crate::{
    Database, EnrolmentToken, Error, Identity, Kind, PeerIdentity, PendingIdentity, Roots, Secret,
    SpiffeId, TrustDomain, Validator, enrol::EnrolAnswer, files, roots, token::check_relay_url,
    validator,
};
use ca::{BACKDATED, Ca, Request};
use csr::ProvenKey;
use rustls_pki_types::CertificateDer;
use std::{
    fmt,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use store::{Refused, Store};
use url::Url;

pub use open::Builder;

const RELAY_URL: &str = "relay-url";
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);

/// Where an authority takes the time from; tests have their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// A handle on the authority. Cheap to clone.
#[derive(Clone)]
pub struct Authority {
    inner: Arc<Inner>,
    store: Store,
    lives: Lives,
    clock: Clock,
    was_created: bool,
}

struct Inner {
    ca: Ca,
    validator: Validator,
}

/// Whom an enrolment token is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    Cluster(String),
    User { name: String, groups: Vec<String> },
}

/// How long certificates live. The longer, the longer a stolen key serves its thief unless it is
/// revoked; the shorter, the sooner an authority that is down locks people out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lives {
    /// Of users. Default 24 h.
    pub user: Duration,
    /// Of clusters. Default 7 days: an agent that was off for less comes back by itself.
    pub agent: Duration,
    /// Of the relay's HTTPS certificate. Default 30 days.
    pub relay: Duration,
    /// For how long after its enrolment a user's certificate can be renewed. Default 30 days.
    pub user_since_enrolment: Duration,
}

impl Default for Lives {
    fn default() -> Self {
        Self {
            user: 24 * HOUR,
            agent: 7 * DAY,
            relay: 30 * DAY,
            user_since_enrolment: 30 * DAY,
        }
    }
}

/// A new certificate.
#[derive(Clone, Debug)]
pub struct Issued {
    /// Leaf first, without the CA.
    pub chain: Vec<CertificateDer<'static>>,
    pub ca: Vec<CertificateDer<'static>>,
    pub not_after: SystemTime,
}

/// What is known of a cluster apart from its carriers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRecord {
    pub name: String,
    /// When its first token was made.
    pub created_at: SystemTime,
    pub enrolled_at: Option<SystemTime>,
    pub last_connected_at: Option<SystemTime>,
    pub last_seen_at: Option<SystemTime>,
    pub kubernetes_version: Option<String>,
    pub agent_version: Option<String>,
}

/// Why a token was not redeemed. Only whoever holds the secret can learn more than `Unknown`.
#[derive(Debug, thiserror::Error)]
pub enum RedeemError {
    #[error("this enrolment token is not known here: it was made by another authority")]
    Unknown,
    #[error("this enrolment token expired at {}: ask for a new one", files::show(*at))]
    Expired { at: SystemTime },
    #[error(
        "this enrolment token was used already, at {}: ask for a new one, and if it was not you \
         who used it, tell your administrator", files::show(*at)
    )]
    AlreadyRedeemed { at: SystemTime },
    #[error("{0}")]
    BadCsr(String),
    #[error(transparent)]
    Internal(#[from] Error),
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub enum RenewError {
    #[error("the certificate is not known to this authority: enrol again")]
    Unknown,
    #[error(
        "the enrolment of {} is too long ago to be renewed: log in again with a new token",
        files::show(*enrolled_at)
    )]
    EnrolmentTooOld { enrolled_at: SystemTime },
    #[error("the certificate expired at {}: enrol again", files::show(*at))]
    Expired { at: SystemTime },
    #[error("the certificate was revoked")]
    Revoked,
    #[error("{0}")]
    BadCsr(String),
    #[error(transparent)]
    Internal(#[from] Error),
}

impl Authority {
    /// Opens an authority that exists, with its tables in the state directory;
    /// [`Error::NoAuthority`] when there is none.
    pub async fn open(state_dir: &Path) -> Result<Self, Error> {
        Self::builder(state_dir).open().await
    }

    /// Opens the authority, or makes it: then the URL's host is its trust domain for ever. Stores
    /// the URL for [`relay_url`](Self::relay_url).
    pub async fn open_or_create(state_dir: &Path, relay_url: &Url) -> Result<Self, Error> {
        Self::builder(state_dir).open_or_create(relay_url).await
    }

    /// For all other ways to open one. The CA is always in the state directory.
    pub fn builder(state_dir: &Path) -> Builder {
        Builder::new(state_dir)
    }

    /// Makes the tables of a shared database, or brings them up to date; `false` when there was
    /// nothing to do. The database's owner calls this where the relays' role may not.
    pub async fn migrate(database: &Database) -> Result<bool, Error> {
        store::migrate(database).await
    }

    #[must_use]
    pub fn with_lives(mut self, lives: Lives) -> Self {
        self.lives = lives;
        self
    }

    /// Whether this very call to open made the CA.
    pub fn was_created(&self) -> bool {
        self.was_created
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        self.inner.validator.domain()
    }

    pub fn validator(&self) -> &Validator {
        &self.inner.validator
    }

    pub fn roots(&self) -> &Roots {
        self.inner.validator.roots()
    }

    /// The authority's own clock.
    pub fn now(&self) -> SystemTime {
        (self.clock)()
    }

    /// The public URL that the relay was last started with.
    pub async fn relay_url(&self) -> Result<Url, Error> {
        let url = self.store.setting(RELAY_URL).await?;
        url.as_deref()
            .and_then(|url| Url::parse(url).ok())
            .ok_or_else(|| {
                Error::Invalid("the relay's public URL is not known: start the relay once".into())
            })
    }

    pub async fn set_relay_url(&self, url: &Url) -> Result<(), Error> {
        check_relay_url(url).map_err(Error::Invalid)?;
        self.store.set_setting(RELAY_URL, url.as_str()).await
    }

    /// Makes a token that can be redeemed once within `ttl`.
    pub async fn create_token(
        &self,
        subject: &Subject,
        ttl: Duration,
        relay_url: &Url,
    ) -> Result<EnrolmentToken, Error> {
        check_relay_url(relay_url).map_err(Error::Invalid)?;
        subject.check(self.trust_domain())?;
        let now = self.now();
        let expires = now
            .checked_add(ttl)
            .filter(|_| !ttl.is_zero() && ttl <= 366 * DAY)
            .ok_or_else(|| Error::Invalid("a token lives between 1 s and 366 days".to_owned()))?;
        let secret = Secret::generate();
        self.store
            .insert_token(&secret.hash(), subject, now, expires)
            .await?;
        let [pin, ..] = self.roots().pins()[..] else {
            return Err(Error::Invalid("the authority has no CA".to_owned()));
        };
        Ok(EnrolmentToken {
            relay: relay_url.clone(),
            secret,
            pin,
        })
    }

    /// Redeems a token for a certificate. A request that cannot be certified leaves the token
    /// whole.
    pub async fn redeem(&self, secret: &Secret, csr_pem: &str) -> Result<Issued, RedeemError> {
        let now = self.now();
        let hash = secret.hash();
        // Before the write lock, so that strangers cannot keep it busy.
        if let Some(refused) = self.store.why_not_redeemable(&hash, now).await? {
            return Err(refused.into());
        }
        let key = csr::from_pem(csr_pem).map_err(RedeemError::BadCsr)?;
        let mut tx = self.store.begin().await?;
        let Some(redeemed) = self.store.redeem(&mut tx, &hash, now).await? else {
            drop(tx);
            let refused = self.store.why_not_redeemable(&hash, now).await?;
            return Err(refused.unwrap_or(Refused::Unknown).into());
        };
        let id = redeemed.subject.check(self.trust_domain())?;
        let (issued, leaf) = self.issue(&id, redeemed.subject.groups(), &key, now, now)?;
        self.store
            .insert_certificate(&mut tx, &leaf, now, now, None)
            .await?;
        self.store.commit(tx).await?;
        tracing::info!(id = %id, serial = leaf.serial, "enrolment token redeemed");
        Ok(issued)
    }

    /// A new certificate for the subject of an old one, with a new key. The caller has
    /// authenticated `peer`.
    pub async fn renew(&self, peer: &PeerIdentity, csr_der: &[u8]) -> Result<Issued, RenewError> {
        let now = self.now();
        if now > peer.not_after {
            return Err(RenewError::Expired { at: peer.not_after });
        }
        if self.validator().is_revoked(&peer.serial) {
            return Err(RenewError::Revoked);
        }
        let enrolled_at = self.store.enrolled_at(peer).await?;
        let enrolled_at = enrolled_at.ok_or(RenewError::Unknown)?;
        let last = enrolled_at + self.lives.user_since_enrolment;
        if peer.id.kind() == Kind::User && now >= last {
            return Err(RenewError::EnrolmentTooOld { enrolled_at });
        }
        let key = csr::from_der(csr_der).map_err(RenewError::BadCsr)?;
        if key.point == peer.public_key {
            return Err(RenewError::BadCsr(
                "the certificate request is for the old key: make a new one".to_owned(),
            ));
        }
        let (issued, leaf) = self.issue(&peer.id, &peer.groups, &key, now, enrolled_at)?;
        let mut tx = self.store.begin().await?;
        self.store
            .insert_certificate(&mut tx, &leaf, now, enrolled_at, Some(&peer.serial))
            .await?;
        self.store.commit(tx).await?;
        tracing::info!(id = %peer.id, serial = leaf.serial, "certificate renewed");
        Ok(issued)
    }

    /// A certificate for HTTPS on `hosts` (DNS names and IP addresses), key made here, in memory.
    pub fn issue_relay_certificate(
        &self,
        instance: &str,
        hosts: &[String],
    ) -> Result<Identity, Error> {
        let now = self.now();
        let id = SpiffeId::new(self.trust_domain().clone(), Kind::Relay, instance)?;
        let pending = PendingIdentity::generate()?;
        let key = csr::from_der(pending.csr_der()).map_err(Error::Crypto)?;
        let request = Request {
            id: &id,
            groups: &[],
            hosts,
            not_before: now - BACKDATED,
            not_after: now + self.lives.relay,
        };
        pending.complete(vec![self.inner.ca.issue(&request, &key)?])
    }

    /// Every cluster that a token was ever made for, by name.
    pub async fn clusters(&self) -> Result<Vec<ClusterRecord>, Error> {
        self.store.clusters(None).await
    }

    pub async fn cluster(&self, name: &str) -> Result<Option<ClusterRecord>, Error> {
        Ok(self.store.clusters(Some(name)).await?.pop())
    }

    /// An agent's carrier has come up. An empty version leaves the last one known.
    pub async fn record_connected(&self, cluster: &str, agent_version: &str) -> Result<(), Error> {
        self.store
            .connected(cluster, agent_version, self.now())
            .await
    }

    /// An agent has told its status.
    pub async fn record_status(
        &self,
        cluster: &str,
        kubernetes_version: &str,
        agent_version: &str,
    ) -> Result<(), Error> {
        self.store
            .status(cluster, kubernetes_version, agent_version, self.now())
            .await
    }

    /// The last carrier of an agent has gone.
    pub async fn record_disconnected(&self, cluster: &str) -> Result<(), Error> {
        self.store.seen(cluster, self.now()).await
    }

    fn issue(
        &self,
        id: &SpiffeId,
        groups: &[String],
        key: &ProvenKey,
        now: SystemTime,
        enrolled_at: SystemTime,
    ) -> Result<(Issued, PeerIdentity), Error> {
        let not_after = match id.kind() {
            Kind::User => {
                (now + self.lives.user).min(enrolled_at + self.lives.user_since_enrolment)
            }
            Kind::Cluster => now + self.lives.agent,
            Kind::Relay => now + self.lives.relay,
        };
        let request = Request {
            id,
            groups,
            hosts: &[],
            not_before: now - BACKDATED,
            not_after,
        };
        let leaf = self.inner.ca.issue(&request, key)?;
        // What we issue, we would accept: a mistake here must not reach the user.
        let peer = validator::read(&leaf).map_err(|error| Error::Crypto(error.to_string()))?;
        let issued = Issued {
            chain: vec![leaf],
            ca: self.roots().certificates().to_vec(),
            not_after: peer.not_after,
        };
        Ok((issued, peer))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", self.trust_domain())
            .field("lives", &self.lives)
            .finish_non_exhaustive()
    }
}

impl Subject {
    pub fn kind(&self) -> Kind {
        match self {
            Self::Cluster(_) => Kind::Cluster,
            Self::User { .. } => Kind::User,
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Cluster(name) | Self::User { name, .. } => name,
        }
    }

    pub fn groups(&self) -> &[String] {
        match self {
            Self::Cluster(_) => &[],
            Self::User { groups, .. } => groups,
        }
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

impl From<Refused> for RedeemError {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Unknown => Self::Unknown,
            Refused::Expired(at) => Self::Expired { at },
            Refused::AlreadyRedeemed(at) => Self::AlreadyRedeemed { at },
        }
    }
}
