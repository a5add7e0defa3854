//! Certificates of clusters and users, and what was renewed from what.

use std::time::SystemTime;

use throwline_certs::{Kind, PeerIdentity, SpiffeId, sha256};

use super::{Store, Tx, bounded, done, millis, time_of};
use crate::error::Error;

/// Certificates that are forgotten in one statement, at most: tens of milliseconds of SQLite's one writer.
const PRUNED: i64 = 5_000;

/// What is known of a certificate that is to be renewed.
pub(crate) struct Predecessor {
    /// When the token at the head of its chain of renewals was redeemed.
    pub(crate) enrolled_at: SystemTime,
    /// SHA-256 of the keys of its successors, where they are known.
    pub(crate) successors: Vec<Option<Vec<u8>>>,
    /// One of its successors was renewed itself.
    pub(crate) has_second_generation: bool,
    /// When its cluster's name was given up, if it was.
    pub(crate) released_at: Option<SystemTime>,
}

/// Renewals of one identity within a span of time.
pub(crate) struct Recent {
    pub(crate) count: u64,
    pub(crate) first: Option<SystemTime>,
}

/// Which certificates can no longer be renewed: those of users that were enrolled before, and those
/// of clusters that ended before.
pub(crate) struct Unusable {
    pub(crate) now: SystemTime,
    pub(crate) users_enrolled_before: SystemTime,
    pub(crate) clusters_ended_before: SystemTime,
}

impl Store {
    pub(crate) async fn insert_certificate(
        &self,
        tx: &mut Tx,
        issued: &PeerIdentity,
        now: SystemTime,
        enrolled: SystemTime,
        renewed_from: Option<&str>,
    ) -> Result<(), Error> {
        within!(self, &mut *tx, connection => done(
            sqlx::query(
                "INSERT INTO certificates (serial, kind, name, fingerprint, not_before, not_after,
                                           issued_at, enrolled_at, renewed_from, key_hash)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            )
            .bind(&issued.serial)
            .bind(issued.id.kind().as_str())
            .bind(issued.id.name())
            .bind(issued.fingerprint.as_slice())
            .bind(millis(issued.not_before))
            .bind(millis(issued.not_after))
            .bind(millis(now))
            .bind(millis(enrolled))
            .bind(renewed_from)
            .bind(key_hash(&issued.public_key).as_slice())
            .execute(connection)))?;
        // A new enrolment begins a new chain of keys, so an old suspicion about a copied one is
        // over.
        if issued.id.kind() == Kind::Cluster && renewed_from.is_none() {
            within!(self, tx, connection => done(
                sqlx::query(
                    "UPDATE clusters SET enrolled_at = $1, renewed_twice_at = NULL WHERE name = $2",
                )
                    .bind(millis(now))
                    .bind(issued.id.name())
                    .execute(connection)))?;
        }
        Ok(())
    }

    /// What is known of a certificate; `None` for one that this authority did not issue, or has
    /// forgotten. Until the transaction has ended, other readers of it wait.
    pub(crate) async fn predecessor(
        &self,
        tx: &mut Tx,
        peer: &PeerIdentity,
    ) -> Result<Option<Predecessor>, Error> {
        // An update without effect takes the row's lock on PostgreSQL and the write lock on SQLite,
        // which has no SELECT … FOR UPDATE.
        let enrolled: Option<i64> = within!(self, &mut *tx, connection =>
            sqlx::query_scalar(
                "UPDATE certificates SET key_hash = key_hash
                 WHERE serial = $1 AND fingerprint = $2 RETURNING enrolled_at",
            )
            .bind(&peer.serial)
            .bind(peer.fingerprint.as_slice())
            .fetch_optional(connection))?;
        let Some(enrolled) = enrolled else {
            return Ok(None);
        };
        let rows: Vec<(Option<Vec<u8>>, bool)> = within!(self, &mut *tx, connection =>
            sqlx::query_as(
                "SELECT key_hash, EXISTS (
                     SELECT 1 FROM certificates AS second
                     WHERE second.renewed_from = successor.serial
                 )
                 FROM certificates AS successor WHERE renewed_from = $1",
            )
            .bind(&peer.serial)
            .fetch_all(connection))?;
        let released: Option<Option<i64>> = match peer.id.kind() {
            Kind::Cluster => within!(self, tx, connection =>
                sqlx::query_scalar("SELECT released_at FROM clusters WHERE name = $1")
                    .bind(peer.id.name())
                    .fetch_optional(connection))?,
            _ => None,
        };
        Ok(Some(Predecessor {
            released_at: released.flatten().map(time_of),
            enrolled_at: time_of(enrolled),
            has_second_generation: rows.iter().any(|(_, is_renewed)| *is_renewed),
            successors: rows.into_iter().map(|(key, _)| key).collect(),
        }))
    }

    /// The renewals of this identity since then.
    pub(crate) async fn renewals(
        &self,
        tx: &mut Tx,
        id: &SpiffeId,
        since: SystemTime,
    ) -> Result<Recent, Error> {
        let (count, first): (i64, Option<i64>) = within!(self, tx, connection =>
            sqlx::query_as(
                "SELECT count(*), min(issued_at) FROM certificates
                 WHERE kind = $1 AND name = $2 AND issued_at > $3 AND renewed_from IS NOT NULL",
            )
            .bind(id.kind().as_str())
            .bind(id.name())
            .bind(millis(since))
            .fetch_one(connection))?;
        Ok(Recent {
            count: u64::try_from(count).unwrap_or(0),
            first: first.map(time_of),
        })
    }

    /// Deletes certificates that have expired and cannot be renewed: of this identity, or of all, at
    /// most [`PRUNED`] of them. Returns how many.
    pub(crate) async fn prune(
        &self,
        only: Option<&SpiffeId>,
        unusable: &Unusable,
    ) -> Result<u64, Error> {
        // One whose successor was renewed has done its work; one that has only a successor may be
        // the last that its owner has, if the answer was lost.
        let sql = "DELETE FROM certificates WHERE serial IN (
                 SELECT serial FROM certificates AS old
                 WHERE not_after < $1 AND ($2 IS NULL OR (kind = $2 AND name = $3))
                   AND ((kind = 'user' AND enrolled_at < $4)
                        OR (kind = 'cluster' AND not_after < $5)
                        OR EXISTS (
                            SELECT 1 FROM certificates AS successor
                            JOIN certificates AS second ON second.renewed_from = successor.serial
                            WHERE successor.renewed_from = old.serial
                        ))
                 LIMIT $6
             )";
        let deleted = match self {
            Self::Sqlite { pool, .. } => sqlx::query(sql)
                .bind(millis(unusable.now))
                .bind(only.map(|id| id.kind().as_str()))
                .bind(only.map(SpiffeId::name))
                .bind(millis(unusable.users_enrolled_before))
                .bind(millis(unusable.clusters_ended_before))
                .bind(PRUNED)
                .execute(pool)
                .await
                .map(|done| done.rows_affected()),
            Self::Postgres { pool, .. } => bounded(
                sqlx::query(sql)
                    .bind(millis(unusable.now))
                    .bind(only.map(|id| id.kind().as_str()))
                    .bind(only.map(SpiffeId::name))
                    .bind(millis(unusable.users_enrolled_before))
                    .bind(millis(unusable.clusters_ended_before))
                    .bind(PRUNED)
                    .execute(pool),
            )
            .await
            .map(|done| done.rows_affected()),
        };
        deleted.map_err(|error| self.failed(error))
    }
}

/// As the tables keep a public key.
pub(crate) fn key_hash(public_key: &[u8]) -> [u8; 32] {
    sha256(public_key)
}
