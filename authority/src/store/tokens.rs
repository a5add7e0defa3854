//! Enrolment tokens, by the hashes of their keys.

use std::time::SystemTime;

use throwline_certs::Kind;

use super::{Store, Tx, bounded, done, millis, time_of};
use crate::error::{ContentError, Error};
use crate::model::Subject;

/// A token that this transaction has redeemed.
pub(crate) struct Redeemed {
    pub(crate) subject: Subject,
}

/// Why a token could not be redeemed.
pub(crate) enum Refused {
    Unknown,
    Expired(SystemTime),
    AlreadyRedeemed(SystemTime),
}

impl Store {
    pub(crate) async fn insert_token(
        &self,
        hash: &[u8; 32],
        subject: &Subject,
        now: SystemTime,
        expires: SystemTime,
    ) -> Result<(), Error> {
        let groups = serde_json::to_string(subject.groups())
            .map_err(|error| self.unreadable(ContentError::Groups(error)))?;
        let mut tx = self.begin().await?;
        within!(self, &mut tx, connection => done(
            sqlx::query(
                "INSERT INTO tokens (secret_hash, kind, name, groups, created_at, expires_at)
                 VALUES ($1, $2, $3, $4, $5, $6)",
            )
            .bind(hash.as_slice())
            .bind(subject.kind().as_str())
            .bind(subject.name())
            .bind(groups.as_str())
            .bind(millis(now))
            .bind(millis(expires))
            .execute(connection)))?;
        if let Subject::Cluster(name) = subject {
            within!(self, &mut tx, connection => done(
                sqlx::query(
                    "INSERT INTO clusters (name, created_at) VALUES ($1, $2)
                     ON CONFLICT (name) DO NOTHING",
                )
                .bind(name)
                .bind(millis(now))
                .execute(connection)))?;
        }
        self.commit(tx).await
    }

    /// Why the token could not be redeemed now, without taking a write lock; `None` when it
    /// could.
    pub(crate) async fn why_not_redeemable(
        &self,
        hash: &[u8; 32],
        now: SystemTime,
    ) -> Result<Option<Refused>, Error> {
        let row: Option<(i64, Option<i64>)> = on!(self, pool =>
            sqlx::query_as("SELECT expires_at, redeemed_at FROM tokens WHERE secret_hash = $1")
                .bind(hash.as_slice())
                .fetch_optional(pool))?;
        Ok(match row {
            None => Some(Refused::Unknown),
            Some((_, Some(at))) => Some(Refused::AlreadyRedeemed(time_of(at))),
            Some((expires, None)) if expires <= millis(now) => {
                Some(Refused::Expired(time_of(expires)))
            }
            Some(_) => None,
        })
    }

    /// Marks the token as redeemed; `None` when another redeemer was faster.
    pub(crate) async fn redeem(
        &self,
        tx: &mut Tx,
        hash: &[u8; 32],
        now: SystemTime,
    ) -> Result<Option<Redeemed>, Error> {
        // Check and mark in one statement, so that of two redeemers one finds no row.
        let row: Option<(String, String, String)> = within!(self, tx, connection =>
            sqlx::query_as(
                "UPDATE tokens SET redeemed_at = $1
                 WHERE secret_hash = $2 AND redeemed_at IS NULL AND expires_at > $1
                 RETURNING kind, name, groups",
            )
            .bind(millis(now))
            .bind(hash.as_slice())
            .fetch_optional(connection))?;
        let Some((kind, name, groups)) = row else {
            return Ok(None);
        };
        let subject = match kind.parse()? {
            Kind::Cluster => Subject::Cluster(name),
            _ => Subject::User {
                name,
                groups: serde_json::from_str(&groups)
                    .map_err(|error| self.unreadable(ContentError::Groups(error)))?,
            },
        };
        Ok(Some(Redeemed { subject }))
    }
}
