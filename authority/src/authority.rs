//! A handle on the authority: what is asked of it, decided here; kept in the tables of [`store`].

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls_pki_types::CertificateDer;
use throwline_certs::directory::{
    ClusterRecord, CsrError, HttpsChain, Issued, RedeemError, RenewError,
};
use throwline_certs::enrol::EnrolRequest;
use throwline_certs::validator::{self, BACKDATED};
use throwline_certs::{
    EnrolmentToken, ExpectedPeer, Kind, PeerIdentity, Revocations, Roots, Secret,
    SignedRevocations, SpiffeId, TrustDomain, Validator, check_relay_url, renewal, sha256,
};
use throwline_policy::{ReservedName, SystemNames};
use url::Url;

use crate::ca::{Ca, Request};
use crate::csr::{self, ProvenKey};
use crate::error::Error;
use crate::model::{DAY, HOUR, Released, Revoked, Subject, Target, Validity};
use crate::store::{self, IssueLock, Predecessor, Refused, Store, Tx, Unusable};

/// Where the relay's public URL stands among the settings.
pub(crate) const RELAY_URL: &str = "relay-url";

/// Where an authority takes the time from; tests have their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// A handle on the authority. Cheap to clone.
#[derive(Clone)]
pub struct Authority {
    pub(crate) inner: Arc<Inner>,
    pub(crate) store: Store,
    pub(crate) validity: Validity,
    pub(crate) clock: Clock,
    pub(crate) system_names: SystemNames,
    pub(crate) was_created: bool,
}

pub(crate) struct Inner {
    pub(crate) ca: Ca,
    pub(crate) validator: Validator,
}

/// How often one identity's certificates are renewed, however many machines have it and however many
/// relays share the database.
pub(crate) const RENEWALS: (u64, Duration) = (60, HOUR);
/// How often old certificates are looked for.
const PRUNE: Duration = HOUR;

impl Authority {
    /// Sets the validity periods of what is issued from now on.
    #[must_use]
    pub fn with_validity(mut self, validity: Validity) -> Self {
        self.validity = validity;
        self
    }

    /// Names of Kubernetes' own that users and groups may have all the same. By default none.
    #[must_use]
    pub fn with_system_names(mut self, allowed: SystemNames) -> Self {
        self.system_names = allowed;
        self
    }

    fn check_names(&self, user: &str, groups: &[String]) -> Result<(), ReservedName> {
        self.system_names.check(user, groups)
    }

    /// Whether this very call to open made the CA.
    pub fn was_created(&self) -> bool {
        self.was_created
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        self.inner.validator.domain()
    }

    /// The validator of this authority's certificates.
    pub fn validator(&self) -> &Validator {
        &self.inner.validator
    }

    /// The CA.
    pub fn roots(&self) -> &Roots {
        self.inner.validator.roots()
    }

    /// The authority's own clock.
    pub fn now(&self) -> SystemTime {
        (self.clock)()
    }

    /// The public URL that the relay was last started with.
    ///
    /// # Errors
    /// The database fails.
    pub async fn relay_url(&self) -> Result<Url, Error> {
        let url = self.store.setting(RELAY_URL).await?;
        url.as_deref()
            .and_then(|url| Url::parse(url).ok())
            .ok_or(Error::NoRelayUrl)
    }

    /// Stores the relay's URL, which new tokens contain.
    ///
    /// # Errors
    /// The URL is not acceptable, or the database fails.
    pub async fn set_relay_url(&self, url: &Url) -> Result<(), Error> {
        check_relay_url(url)?;
        self.store.set_setting(RELAY_URL, url.as_str()).await
    }

    /// Makes a token that can be redeemed once within `ttl`.
    ///
    /// # Errors
    /// The subject's name is invalid, or the database fails.
    pub async fn create_token(
        &self,
        subject: &Subject,
        ttl: Duration,
        relay_url: &Url,
    ) -> Result<EnrolmentToken, Error> {
        check_relay_url(relay_url)?;
        subject.check(self.trust_domain())?;
        self.check_names(subject.name(), subject.groups())?;
        let now = self.now();
        let expires = now
            .checked_add(ttl)
            .filter(|_| !ttl.is_zero() && ttl <= 366 * DAY)
            .ok_or(Error::TokenValidity)?;
        let secret = Secret::generate();
        self.store
            .insert_token(&secret.hash()?, subject, now, expires)
            .await?;
        let [pin, ..] = self.roots().pins()[..] else {
            return Err(Error::NoCa);
        };
        Ok(EnrolmentToken {
            relay: relay_url.clone(),
            secret,
            pin,
        })
    }

    /// Redeems a token for a certificate. A request that cannot be certified leaves the token whole.
    /// The first enrolment binds a cluster's name to that cluster.
    ///
    /// # Errors
    /// [`RedeemError`]; [`RedeemError::Unavailable`] where the database fails.
    pub async fn redeem(&self, request: &EnrolRequest) -> Result<Issued, RedeemError> {
        let now = self.now();
        let token = request.key().ok_or(RedeemError::Unknown)?;
        let hash = sha256(&token);
        // Before the write lock, so that strangers cannot keep it busy.
        if let Some(refused) = self.store.why_not_redeemable(&hash, now).await? {
            return Err(refused.into());
        }
        let pins = self.roots().pins();
        // The signature by the token's key covers CA and request: an intermediary cannot substitute
        // a key.
        if !pins.iter().any(|pin| request.is_signed(&token, pin)) {
            return Err(RedeemError::NotSigned);
        }
        let key = csr::from_pem(&request.csr)?;
        let mut tx = self.store.begin().await?;
        let Some(redeemed) = self.store.redeem(&mut tx, &hash, now).await? else {
            drop(tx);
            let refused = self.store.why_not_redeemable(&hash, now).await?;
            return Err(refused.unwrap_or(Refused::Unknown).into());
        };
        // From here on an error takes the redemption back, with the transaction.
        let kind = redeemed.subject.kind();
        if !request.is_for(kind) {
            return Err(RedeemError::WrongKind { token: kind });
        }
        // A name stays with the first cluster that used it, so that a second token cannot divert
        // its users' traffic.
        if let Subject::Cluster(name) = &redeemed.subject {
            let uid = request.uid().ok_or(RedeemError::NoClusterUid)?;
            let bound = self.store.bind_cluster(&mut tx, name, uid).await?;
            if let Some(other) = bound.filter(|bound| bound != uid) {
                let name = name.clone();
                return Err(RedeemError::NameTaken { name, uid: other });
            }
        }
        let id = redeemed.subject.check(self.trust_domain());
        let id = id.map_err(Error::from)?;
        self.check_names(id.name(), redeemed.subject.groups())
            .map_err(|error| RedeemError::SystemName(error.into()))?;
        // A revocation covers certificates up to a second: the new one must begin after it.
        let now = self.after_revocations(&mut tx, &id, now).await?;
        let (issued, leaf) = self.issue(&id, redeemed.subject.groups(), &key, now, now)?;
        self.store
            .insert_certificate(&mut tx, &leaf, now, now, None)
            .await?;
        self.store.commit(tx).await?;
        tracing::info!(id = %id, serial = leaf.serial, "enrolment token redeemed");
        Ok(issued)
    }

    /// Begins a renewal.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn renewal_challenge(&self) -> Result<renewal::Challenge, Error> {
        let pin = self.roots().pins().first().copied();
        let pin = pin.ok_or(Error::NoCa)?;
        Ok(renewal::Challenge::new(pin, self.now()))
    }

    /// A new certificate for the subject of an old one, with a new key. The request is
    /// authenticated by the old key's signature over `challenge` and the request alone. `carrier` is
    /// the identity of the carrier that it arrived on, and must be the same.
    ///
    /// # Errors
    /// [`RenewError`]; [`RenewError::Unavailable`] where the database fails.
    pub async fn renew(
        &self,
        challenge: renewal::Challenge,
        carrier: &SpiffeId,
        request: renewal::Request<'_>,
    ) -> Result<Issued, RenewError> {
        let now = self.now();
        // Its validity period is checked below, with the enrolment's.
        let old =
            self.validator()
                .check_ignoring_validity(request.chain, ExpectedPeer::CARRIER, now);
        let old = old?;
        if old.id != *carrier {
            return Err(RenewError::WrongCarrier {
                carrier: carrier.clone(),
                found: old.id,
            });
        }
        if !challenge.is_answered(&old, request.csr, request.signature, now) {
            return Err(RenewError::NotSigned);
        }
        // Before the database, so that what can never be renewed costs nothing there.
        self.check_end(&old, now)?;
        self.check_names(old.id.name(), &old.groups)
            .map_err(|error| RenewError::SystemName(error.into()))?;
        let key = csr::from_der(request.csr)?;
        // Each renewal replaces the key, so that a copied one shows as a second key for one
        // certificate.
        if key.point == old.public_key {
            return Err(CsrError::OldKey.into());
        }

        // One transaction from the checks to the new record, so that two renewals of one certificate
        // are counted as two, and no revocation is made in between.
        let mut tx = self.store.begin().await?;
        let issued_at = self.admit_renewal(&mut tx, &old, now).await?;
        let known = self.store.predecessor(&mut tx, &old).await?;
        let known = known.ok_or(RenewError::Unknown)?;
        self.check_renewable(&old, &known, now)?;
        // A holder of one identity must not fill the table.
        let (most, within) = RENEWALS;
        let since = now.checked_sub(within).unwrap_or(SystemTime::UNIX_EPOCH);
        let recent = self.store.renewals(&mut tx, &old.id, since).await?;
        if recent.count >= most {
            let free = recent.first.unwrap_or(now) + within;
            let wait = free.duration_since(now).unwrap_or_default();
            return Err(RenewError::TooOften {
                retry_after: wait.max(Duration::from_secs(1)),
            });
        }
        let (issued, leaf) =
            self.issue(&old.id, &old.groups, &key, issued_at, known.enrolled_at)?;
        // A second request with the same key means that the first answer was lost.
        let own_key = store::key_hash(&key.point);
        let is_other = |key: &Option<Vec<u8>>| key.as_deref() != Some(own_key.as_slice());
        let is_second = known.successors.iter().any(is_other);
        if is_second && old.id.kind() == Kind::Cluster {
            self.store
                .renewed_twice(&mut tx, old.id.name(), now)
                .await?;
        }
        self.store
            .insert_certificate(
                &mut tx,
                &leaf,
                issued_at,
                known.enrolled_at,
                Some(&old.serial),
            )
            .await?;
        self.store.commit(tx).await?;

        tracing::info!(id = %old.id, serial = leaf.serial, "certificate renewed");
        if is_second {
            tracing::warn!(
                id = %old.id, predecessor = old.serial, serial = leaf.serial,
                "one certificate was renewed with two keys: an answer was lost, a state directory \
                 was copied or restored, or its key was stolen"
            );
        }
        // The certificate is issued already, so a failure here does not fail the renewal.
        if let Err(error) = self.store.prune(Some(&old.id), &self.unusable(now)).await {
            tracing::warn!(%error, id = %old.id, "old certificates cannot be forgotten");
        }
        Ok(Issued {
            is_second,
            ..issued
        })
    }

    /// Forgets certificates that have expired and cannot be renewed any more, some at once, at times
    /// that the processes of a shared database do not share. Never ends.
    pub async fn prune_regularly(&self) {
        loop {
            let wait = PRUNE.mul_f64(rand::random_range(0.5..1.5));
            tokio::time::sleep(wait).await;
            loop {
                match self.prune().await {
                    Ok(0) => break,
                    Ok(certificates) => tracing::info!(certificates, "forgot old certificates"),
                    Err(error) => {
                        tracing::warn!(%error, "old certificates cannot be forgotten");
                        break;
                    }
                }
                // Others need the database too.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }

    /// Deletes certificates that have expired and cannot be renewed any more; returns how many. Some
    /// thousands at a time at most: call it periodically, and again while it finds any.
    ///
    /// # Errors
    /// The database fails.
    pub async fn prune(&self) -> Result<u64, Error> {
        self.store.prune(None, &self.unusable(self.now())).await
    }

    /// Until when a certificate can be renewed, whatever else is known of it. It may be earlier.
    #[must_use]
    pub fn renewable_until(&self, old: &PeerIdentity) -> SystemTime {
        match old.id.kind() {
            // It was enrolled before it was issued.
            Kind::User => old.not_before + BACKDATED + self.validity.user_since_enrolment,
            Kind::Cluster => old.not_after + self.validity.agent_absence,
            Kind::Relay => old.not_after,
        }
    }

    fn check_end(&self, old: &PeerIdentity, now: SystemTime) -> Result<(), RenewError> {
        if now >= self.renewable_until(old) && now > old.not_after {
            return Err(RenewError::Expired { at: old.not_after });
        }
        Ok(())
    }

    /// Whether an enrolment still holds, under the lock of the certificate's row; a revocation was
    /// asked for before.
    fn check_renewable(
        &self,
        old: &PeerIdentity,
        known: &Predecessor,
        now: SystemTime,
    ) -> Result<(), RenewError> {
        let enrolled_at = known.enrolled_at;
        // A released name may be another cluster's by now, which has enrolled after the release.
        if known.released_at.is_some_and(|at| enrolled_at <= at) {
            return Err(RenewError::Released);
        }
        if old.id.kind() == Kind::User && now >= enrolled_at + self.validity.user_since_enrolment {
            return Err(RenewError::EnrolmentTooOld { enrolled_at });
        }
        // Its successor was in use, so an expired one is a copy, not a certificate whose answer was
        // lost.
        if now > old.not_after && known.has_second_generation {
            return Err(RenewError::Superseded);
        }
        Ok(())
    }

    fn unusable(&self, now: SystemTime) -> Unusable {
        let before = |span| now.checked_sub(span).unwrap_or(SystemTime::UNIX_EPOCH);
        Unusable {
            now,
            users_enrolled_before: before(self.validity.user_since_enrolment),
            clusters_ended_before: before(self.validity.agent_absence),
        }
    }

    /// Revokes certificates, for all relays and agents within seconds. Certificates that are issued
    /// later to the same cluster or user count. A cluster's name stays with the cluster that it belongs
    /// to, so that a stolen key is answered by a new enrolment and never leads people elsewhere.
    ///
    /// # Errors
    /// [`Error::NothingToRevoke`], [`Error::UnknownSerial`] for a name or serial number that is not known here.
    pub async fn revoke(&self, target: &Target) -> Result<Revoked, Error> {
        let now = self.now();
        let mut tx = self.store.begin().await?;
        self.store
            .lock_issuing(&mut tx, IssueLock::Exclusive)
            .await?;
        let revoked = self.store.revoke(&mut tx, target, now, BACKDATED).await?;
        self.store.commit(tx).await?;
        Ok(revoked)
    }

    /// Reads the list of revocations if it has changed since the validator got it, gives it to the
    /// validator and its clones, and signs it for those that have no database; `None` when it has
    /// not changed.
    ///
    /// # Errors
    /// The database fails.
    pub async fn refresh_revocations(&self) -> Result<Option<SignedRevocations>, Error> {
        let known = self.validator().revocations().version();
        if self.store.revocations_version().await? <= known {
            return Ok(None);
        }
        let list = self.store.revocations(self.now()).await?;
        let signed = self.sign_revocations(&list)?;
        self.validator().replace_revocations(list);
        Ok(Some(signed))
    }

    /// The present list of revocations, signed.
    ///
    /// # Errors
    /// The cryptography library fails.
    pub fn signed_revocations(&self) -> Result<SignedRevocations, Error> {
        self.sign_revocations(&self.validator().revocations())
    }

    /// Returns when another process of a shared database has revoked something; never, where the
    /// database sends no notifications. Only a hint to call
    /// [`refresh_revocations`](Self::refresh_revocations), which is also called now and then.
    ///
    /// # Errors
    /// The database cannot be listened to now.
    pub async fn revocations_changed(&self) -> Result<(), Error> {
        self.store.revocation_notified().await
    }

    pub(crate) fn sign_revocations(&self, list: &Revocations) -> Result<SignedRevocations, Error> {
        self.inner
            .ca
            .sign_list(list.to_document(self.trust_domain())?)
    }

    /// Whether the holder of an old certificate may have a new one, as far as revocation decides it;
    /// then from when on the new one counts. Holds off revocations until `tx` ends.
    async fn admit_renewal(
        &self,
        tx: &mut Tx,
        peer: &PeerIdentity,
        now: SystemTime,
    ) -> Result<SystemTime, RenewError> {
        let now = self.after_revocations(tx, &peer.id, now).await?;
        if self.store.is_revoked(tx, peer).await? {
            return Err(RenewError::Revoked);
        }
        Ok(now)
    }

    /// From when on a certificate counts that is issued now: after each revocation of its identity,
    /// which could be in the same second. Holds off revocations until `tx` ends.
    async fn after_revocations(
        &self,
        tx: &mut Tx,
        id: &SpiffeId,
        now: SystemTime,
    ) -> Result<SystemTime, Error> {
        self.store.lock_issuing(tx, IssueLock::Shared).await?;
        let last = self.store.revoked_until(tx, id.kind(), id.name()).await?;
        let last = last.and_then(|last| u64::try_from(last).ok());
        Ok(last.map_or(now, |last| {
            now.max(SystemTime::UNIX_EPOCH + Duration::from_secs(last + 1) + BACKDATED)
        }))
    }

    /// A relay's certificate towards other relays, for the key of the request `csr` (PKCS #10, DER);
    /// leaf first.
    ///
    /// # Errors
    /// `instance` is no DNS label, or the request cannot be certified.
    pub fn certify_relay(
        &self,
        instance: &str,
        csr: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, Error> {
        let now = self.now();
        let id = SpiffeId::new(self.trust_domain().clone(), Kind::Relay, instance)?;
        let key = csr::from_der(csr)?;
        let request = Request {
            id: &id,
            groups: &[],
            not_before: now - BACKDATED,
            not_after: now + self.validity.relay,
        };
        Ok(vec![self.inner.ca.issue(&request, &key)?])
    }

    /// What a relay shows the public for HTTPS on `hosts` (DNS names and IP addresses), for the key of
    /// the request `csr` (PKCS #10, DER), with the CA behind it. It is nobody's identity.
    ///
    /// # Errors
    /// The request cannot be certified.
    pub fn certify_https(&self, hosts: &[String], csr: &[u8]) -> Result<HttpsChain, Error> {
        let (now, life) = (self.now(), self.validity.relay);
        let key = csr::from_der(csr)?;
        let ca = &self.inner.ca;
        let leaf = ca.issue_https(hosts, now - BACKDATED, now + life, &key)?;
        Ok(HttpsChain {
            chain: [&[leaf], ca.roots().certificates()].concat(),
            not_before: now - BACKDATED,
            not_after: now + life,
        })
    }

    /// Gives a cluster's name up, so that another cluster can be enrolled under it; `None` where there is
    /// none of that name. Certificates of before are not renewed any more, and good to their end
    /// unless they are revoked.
    ///
    /// # Errors
    /// The name is invalid, or the database fails.
    pub async fn release_cluster(&self, name: &str) -> Result<Option<Released>, Error> {
        self.store.release_cluster(name, self.now()).await
    }

    /// Every cluster that a token was ever made for, by name.
    ///
    /// # Errors
    /// The database fails.
    pub async fn clusters(&self) -> Result<Vec<ClusterRecord>, Error> {
        self.store.clusters(None).await
    }

    /// The record of one cluster, if there is one.
    ///
    /// # Errors
    /// The database fails.
    pub async fn cluster(&self, name: &str) -> Result<Option<ClusterRecord>, Error> {
        Ok(self.store.clusters(Some(name)).await?.pop())
    }

    /// An agent's carrier has come up. An empty version leaves the last one known.
    ///
    /// # Errors
    /// The database fails.
    pub async fn record_connected(&self, cluster: &str, agent_version: &str) -> Result<(), Error> {
        self.store
            .connected(cluster, agent_version, self.now())
            .await
    }

    /// An agent has reported its status.
    ///
    /// # Errors
    /// The database fails.
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
    ///
    /// # Errors
    /// The database fails.
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
            // However often it is renewed, a user's certificate ends a fixed time after enrolment.
            Kind::User => {
                (now + self.validity.user).min(enrolled_at + self.validity.user_since_enrolment)
            }
            Kind::Cluster => now + self.validity.agent,
            Kind::Relay => now + self.validity.relay,
        };
        let request = Request {
            id,
            groups,
            not_before: now - BACKDATED,
            not_after,
        };
        let leaf = self.inner.ca.issue(&request, key)?;
        // What we issue, we would accept: a mistake here must not reach the user.
        let peer = validator::read(&leaf).map_err(Error::Unacceptable)?;
        let issued = Issued {
            chain: vec![leaf],
            ca: self.roots().certificates().to_vec(),
            not_after: peer.not_after,
            is_second: false,
        };
        Ok((issued, peer))
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", self.trust_domain())
            .field("validity", &self.validity)
            .finish_non_exhaustive()
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
