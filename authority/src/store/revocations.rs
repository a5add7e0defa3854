//! The table of revocations, and the version of the list that is made of it.
//!
//! **Invariant:** a certificate is either issued before a revocation, and then the revocation is about
//! it, or after it, and then its life begins later: the two never run at the same time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use throwline_certs::{Kind, PeerIdentity, Revocations};

use super::{Store, Tx, bounded, done, millis, time_of};
use crate::error::{ContentError, Error};
use crate::model::{Revoked, Target};

/// Among the settings, the version of the list: the time of the last revocation in milliseconds, and
/// always more than it was, so that a database from a backup does not fall back behind its relays.
const VERSION: &str = "revocations-version";
/// The lock between issuing and revoking: any number that nothing else in the database uses.
const LOCK: i64 = 0x7468_726f_7772_6576;
/// Received by relays that share the database. It only signals that there is something to read.
const CHANNEL: &str = "throwline_revocations";
/// How much longer than its certificates a revocation stays on the list, for clocks that differ.
const MARGIN: Duration = Duration::from_secs(86_400);
/// Entries of one list; its encoding has its own limit.
const MOST: i64 = 50_000;

/// How the lock is held: issuing shares it, revoking is exclusive.
pub(crate) enum IssueLock {
    /// To issue a certificate.
    Shared,
    /// To revoke.
    Exclusive,
}

impl Store {
    /// Waits for the lock to issue or to revoke, which is held until the transaction ends.
    pub(crate) async fn lock_issuing(&self, tx: &mut Tx, lock: IssueLock) -> Result<(), Error> {
        // A transaction in SQLite is alone already.
        let Tx::Postgres(tx) = tx else { return Ok(()) };
        let lock = match lock {
            IssueLock::Shared => "SELECT pg_advisory_xact_lock_shared($1)",
            IssueLock::Exclusive => "SELECT pg_advisory_xact_lock($1)",
        };
        let locked = bounded(sqlx::query(lock).bind(LOCK).execute(&mut **tx)).await;
        locked.map(drop).map_err(|error| self.failed(error))
    }

    /// Revokes; a target that is not known is an error. The caller holds the lock.
    pub(crate) async fn revoke(
        &self,
        tx: &mut Tx,
        target: &Target,
        now: SystemTime,
        backdated: Duration,
    ) -> Result<Revoked, Error> {
        match target {
            Target::User(name) => {
                self.revoke_identity(tx, Kind::User, name, now, backdated)
                    .await
            }
            Target::Cluster(name) => {
                self.revoke_identity(tx, Kind::Cluster, name, now, backdated)
                    .await
            }
            Target::Certificate(serial) => self.revoke_certificate(tx, serial, now).await,
        }
    }

    async fn revoke_identity(
        &self,
        tx: &mut Tx,
        kind: Kind,
        name: &str,
        now: SystemTime,
        backdated: Duration,
    ) -> Result<Revoked, Error> {
        // The latest beginning of a life: a relay whose clock is ahead may have issued one that lies
        // after ours.
        let (all, latest, longest): (i64, Option<i64>, Option<i64>) = within!(self, &mut *tx, connection =>
            sqlx::query_as(
                "SELECT count(*), max(not_before), max(not_after - not_before) FROM certificates
                 WHERE kind = $1 AND name = $2",
            )
            .bind(kind.as_str())
            .bind(name)
            .fetch_one(connection))?;
        let (live, _): (i64, Option<i64>) = within!(self, &mut *tx, connection =>
            sqlx::query_as(
                "SELECT count(*), max(not_after) FROM certificates
                 WHERE kind = $1 AND name = $2 AND not_after > $3",
            )
            .bind(kind.as_str())
            .bind(name)
            .bind(millis(now))
            .fetch_one(connection))?;
        // A token that was made before would enrol the identity again.
        let voided: Vec<(i64,)> = within!(self, &mut *tx, connection =>
            sqlx::query_as(
                "UPDATE tokens SET expires_at = $3
                 WHERE kind = $1 AND name = $2 AND redeemed_at IS NULL AND expires_at > $3
                 RETURNING created_at",
            )
            .bind(kind.as_str())
            .bind(name)
            .bind(millis(now))
            .fetch_all(connection))?;
        // A mistyped name must not look like a revocation that took effect.
        if all == 0 && voided.is_empty() {
            let name = name.to_owned();
            return Err(Error::NothingToRevoke { kind, name });
        }
        let last = seconds(now.checked_sub(backdated).unwrap_or(UNIX_EPOCH))
            .max(latest.unwrap_or(0).div_euclid(1000));
        let life = Duration::from_millis(u64::try_from(longest.unwrap_or(0)).unwrap_or(0));
        self.insert_revocation(tx, kind.as_str(), name, last, now, now + life + MARGIN)
            .await?;
        self.advance(tx, now).await?;
        Ok(Revoked {
            certificates: u64::try_from(live).unwrap_or(0),
            tokens: voided.len() as u64,
        })
    }

    /// The certificate, and all that were renewed from it: a thief of its key may have renewed it.
    async fn revoke_certificate(
        &self,
        tx: &mut Tx,
        serial: &str,
        now: SystemTime,
    ) -> Result<Revoked, Error> {
        let chain: Vec<(String, i64)> = within!(self, &mut *tx, connection =>
            sqlx::query_as(
                "WITH RECURSIVE chain (serial, not_after) AS (
                     SELECT serial, not_after FROM certificates WHERE serial = $1
                     UNION
                     SELECT next.serial, next.not_after FROM certificates AS next
                     JOIN chain ON next.renewed_from = chain.serial
                 ) SELECT serial, not_after FROM chain",
            )
            .bind(serial)
            .fetch_all(connection))?;
        if chain.is_empty() {
            let serial = serial.to_owned();
            return Err(Error::UnknownSerial { serial });
        }
        let mut certificates = 0;
        for (serial, not_after) in &chain {
            certificates += u64::from(*not_after > millis(now));
            let until = time_of(*not_after) + MARGIN;
            self.insert_revocation(tx, "certificate", serial, 0, now, until)
                .await?;
        }
        self.advance(tx, now).await?;
        Ok(Revoked {
            certificates,
            tokens: 0,
        })
    }

    async fn insert_revocation(
        &self,
        tx: &mut Tx,
        kind: &str,
        name: &str,
        last_not_before: i64,
        now: SystemTime,
        listed_until: SystemTime,
    ) -> Result<(), Error> {
        within!(self, tx, connection => done(
            sqlx::query(
                "INSERT INTO revocations (kind, name, last_not_before, revoked_at, listed_until)
                 VALUES ($1, $2, $3, $4, $5)
                 ON CONFLICT (kind, name) DO UPDATE
                 SET last_not_before = excluded.last_not_before, revoked_at = excluded.revoked_at,
                     listed_until = excluded.listed_until
                 WHERE revocations.last_not_before <= excluded.last_not_before",
            )
            .bind(kind)
            .bind(name)
            .bind(last_not_before)
            .bind(millis(now))
            .bind(millis(listed_until))
            .execute(connection)))
    }

    /// Raises the version, and notifies the relays when the transaction is committed.
    async fn advance(&self, tx: &mut Tx, now: SystemTime) -> Result<(), Error> {
        let before: Option<String> = within!(self, &mut *tx, connection =>
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(VERSION)
                .fetch_optional(connection))?;
        let before = self.version_of(before)?;
        let version = u64::try_from(millis(now)).unwrap_or(0).max(before + 1);
        within!(self, &mut *tx, connection => done(
            sqlx::query(
                "INSERT INTO settings (key, value) VALUES ($1, $2)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )
            .bind(VERSION)
            .bind(version.to_string())
            .execute(connection)))?;
        if let Tx::Postgres(tx) = tx {
            let notify = sqlx::query("SELECT pg_notify($1, $2)")
                .bind(CHANNEL)
                .bind(version.to_string());
            let notified = bounded(notify.execute(&mut **tx)).await;
            notified.map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    /// The version of the list; 0 while nothing was ever revoked.
    pub(crate) async fn revocations_version(&self) -> Result<u64, Error> {
        let version = self.setting(VERSION).await?;
        self.version_of(version)
    }

    fn version_of(&self, text: Option<String>) -> Result<u64, Error> {
        let Some(text) = text else { return Ok(0) };
        text.parse()
            .map_err(|error| self.unreadable(ContentError::RevocationsVersion(error)))
    }

    /// The list as it is to be known now: without what is about expired certificates alone.
    pub(crate) async fn revocations(&self, now: SystemTime) -> Result<Revocations, Error> {
        // First the version: what is added between the two reads makes a list that is read again.
        let mut list = Revocations::new(self.revocations_version().await?);
        let rows: Vec<(String, String, i64)> = on!(self, pool =>
            sqlx::query_as(
                "SELECT kind, name, last_not_before FROM revocations WHERE listed_until > $1
                 ORDER BY revoked_at DESC LIMIT $2",
            )
            .bind(millis(now))
            .bind(MOST)
            .fetch_all(pool))?;
        for (kind, name, last) in rows {
            list = match kind.as_str() {
                "certificate" => list.serial(&name),
                kind => list.identity(kind.parse()?, &name, u64::try_from(last).unwrap_or(0)),
            };
        }
        Ok(list)
    }

    /// Up to which second a revoked certificate of this identity begins, if it was ever revoked.
    pub(crate) async fn revoked_until(
        &self,
        tx: &mut Tx,
        kind: Kind,
        name: &str,
    ) -> Result<Option<i64>, Error> {
        within!(self, tx, connection =>
            sqlx::query_scalar(
                "SELECT last_not_before FROM revocations WHERE kind = $1 AND name = $2",
            )
            .bind(kind.as_str())
            .bind(name)
            .fetch_optional(connection))
    }

    /// Whether this certificate is revoked, by the table and not by a list that was read before.
    pub(crate) async fn is_revoked(&self, tx: &mut Tx, peer: &PeerIdentity) -> Result<bool, Error> {
        let itself: Option<i64> = within!(self, &mut *tx, connection =>
            sqlx::query_scalar(
                "SELECT revoked_at FROM revocations WHERE kind = 'certificate' AND name = $1",
            )
            .bind(&peer.serial)
            .fetch_optional(connection))?;
        let last = self
            .revoked_until(tx, peer.id.kind(), peer.id.name())
            .await?;
        let by_identity = last.is_some_and(|last| seconds(peer.not_before) <= last);
        Ok(itself.is_some() || by_identity)
    }

    /// Returns when another process has announced a revocation; never, where the database has no
    /// notifications. The caller also reads periodically.
    pub(crate) async fn revocation_notified(&self) -> Result<(), Error> {
        let Some(database) = self.shared() else {
            return std::future::pending().await;
        };
        // A pool of one, because a listener takes its connection from one.
        let pool = database.pool(1);
        let notified = async {
            let mut listener = sqlx::postgres::PgListener::connect_with(&pool).await?;
            listener.listen(CHANNEL).await?;
            listener.recv().await.map(drop)
        };
        notified.await.map_err(|error| self.failed(error))
    }
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
