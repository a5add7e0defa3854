//! The authority's tables: in SQLite, which several processes of one machine may have open, or
//! in PostgreSQL, which several relays share. The SQL is the same; see `migrations/`.

mod migrations;
mod postgres;
mod sqlite;

use super::{ClusterRecord, Subject};
use crate::{Database, Error, Kind, PeerIdentity, database};
use sqlx::{PgPool, Postgres, Sqlite, SqlitePool, Transaction};
use std::{
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

pub(super) use postgres::{migrate, open as open_postgres};
pub(super) use sqlite::open as open_sqlite;

/// Where the pin of the one CA of all relays stands among the settings.
const CA_PIN: &str = "ca-pin";
/// The lock of whoever makes the CA: any number that nothing else in the database uses.
const CA_LOCK: i64 = 0x7468_726f_776c_696e;

#[derive(Clone, Debug)]
pub(super) enum Store {
    Sqlite { pool: SqlitePool, path: PathBuf },
    Postgres { pool: PgPool, database: Database },
}

/// Changes that are made together or not at all: dropped, they are taken back.
pub(super) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

/// A token that this transaction has redeemed.
pub(super) struct Redeemed {
    pub(super) subject: Subject,
}

/// Why a token could not be redeemed.
pub(super) enum Refused {
    Unknown,
    Expired(SystemTime),
    AlreadyRedeemed(SystemTime),
}

type ClusterRow = (
    String,
    i64,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<String>,
    Option<String>,
);

/// Runs a query on whichever database there is. Its parameters are `$1`, `$2` and so on, which
/// both know.
macro_rules! on {
    ($store:expr, $pool:ident => $query:expr) => {
        match $store {
            Store::Sqlite { pool: $pool, .. } => $query.await,
            Store::Postgres { pool: $pool, .. } => bounded($query).await,
        }
        .map_err(|error| $store.failed(&error))
    };
}

/// The same within a transaction.
macro_rules! within {
    ($store:expr, $tx:expr, $connection:ident => $query:expr) => {
        match $tx {
            Tx::Sqlite(tx) => {
                let $connection = &mut **tx;
                $query.await
            }
            Tx::Postgres(tx) => {
                let $connection = &mut **tx;
                bounded($query).await
            }
        }
        .map_err(|error| $store.failed(&error))
    };
}

impl Store {
    pub(super) async fn begin(&self) -> Result<Tx, Error> {
        match self {
            // Immediate: a transaction that reads first and writes later could not wait for others.
            Self::Sqlite { pool, .. } => pool.begin_with("BEGIN IMMEDIATE").await.map(Tx::Sqlite),
            // Here a row's second writer waits for the first and then looks at the row again.
            Self::Postgres { pool, .. } => bounded(pool.begin()).await.map(Tx::Postgres),
        }
        .map_err(|error| self.failed(&error))
    }

    pub(super) async fn commit(&self, tx: Tx) -> Result<(), Error> {
        match tx {
            Tx::Sqlite(tx) => tx.commit().await,
            Tx::Postgres(tx) => bounded(tx.commit()).await,
        }
        .map_err(|error| self.failed(&error))
    }

    /// The database, where relays share one.
    pub(super) fn shared(&self) -> Option<&Database> {
        match self {
            Self::Sqlite { .. } => None,
            Self::Postgres { database, .. } => Some(database),
        }
    }

    /// The pin of the one CA of all relays. Until the transaction has ended, everybody else who
    /// asks waits.
    pub(super) async fn ca_pin(&self, tx: &mut Tx) -> Result<Option<String>, Error> {
        if let Tx::Postgres(tx) = tx {
            let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CA_LOCK);
            let locked = bounded(lock.execute(&mut **tx)).await;
            locked.map_err(|error| self.failed(&error))?;
        }
        within!(self, tx, connection =>
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(CA_PIN)
                .fetch_optional(connection))
    }

    pub(super) async fn set_ca_pin(&self, tx: &mut Tx, pin: &str) -> Result<(), Error> {
        within!(self, tx, connection => done(
            sqlx::query("INSERT INTO settings (key, value) VALUES ($1, $2)")
                .bind(CA_PIN)
                .bind(pin)
                .execute(connection)))
    }

    pub(super) async fn setting(&self, key: &str) -> Result<Option<String>, Error> {
        on!(self, pool =>
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(key)
                .fetch_optional(pool))
    }

    pub(super) async fn set_setting(&self, key: &str, value: &str) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "INSERT INTO settings (key, value) VALUES ($1, $2)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )
            .bind(key)
            .bind(value)
            .execute(pool)))
    }

    pub(super) async fn insert_token(
        &self,
        hash: &[u8; 32],
        subject: &Subject,
        now: SystemTime,
        expires: SystemTime,
    ) -> Result<(), Error> {
        let groups = serde_json::to_string(subject.groups())
            .map_err(|error| Error::Invalid(error.to_string()))?;
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
    pub(super) async fn why_not_redeemable(
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

    /// Marks the token as redeemed; `None` when somebody was faster.
    pub(super) async fn redeem(
        &self,
        tx: &mut Tx,
        hash: &[u8; 32],
        now: SystemTime,
    ) -> Result<Option<Redeemed>, Error> {
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
                    .map_err(|error| self.damaged(error.to_string()))?,
            },
        };
        Ok(Some(Redeemed { subject }))
    }

    pub(super) async fn insert_certificate(
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
                                           issued_at, enrolled_at, renewed_from)
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
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
            .execute(connection)))?;
        if issued.id.kind() == Kind::Cluster && renewed_from.is_none() {
            within!(self, tx, connection => done(
                sqlx::query("UPDATE clusters SET enrolled_at = $1 WHERE name = $2")
                    .bind(millis(now))
                    .bind(issued.id.name())
                    .execute(connection)))?;
        }
        Ok(())
    }

    /// When the token at the head of this certificate's chain of renewals was redeemed; `None`
    /// for a certificate that this authority did not issue.
    pub(super) async fn enrolled_at(
        &self,
        peer: &PeerIdentity,
    ) -> Result<Option<SystemTime>, Error> {
        let at: Option<i64> = on!(self, pool =>
            sqlx::query_scalar(
                "SELECT enrolled_at FROM certificates WHERE serial = $1 AND fingerprint = $2",
            )
            .bind(&peer.serial)
            .bind(peer.fingerprint.as_slice())
            .fetch_optional(pool))?;
        Ok(at.map(time_of))
    }

    pub(super) async fn clusters(&self, only: Option<&str>) -> Result<Vec<ClusterRecord>, Error> {
        let rows: Vec<ClusterRow> = on!(self, pool =>
            sqlx::query_as(
                "SELECT name, created_at, enrolled_at, last_connected_at, last_seen_at,
                        kubernetes_version, agent_version
                 FROM clusters WHERE $1 IS NULL OR name = $1 ORDER BY name",
            )
            .bind(only)
            .fetch_all(pool))?;
        Ok(rows.into_iter().map(cluster_of).collect())
    }

    pub(super) async fn connected(
        &self,
        name: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "UPDATE clusters SET last_connected_at = $1, last_seen_at = $1,
                     agent_version = coalesce(nullif($2, ''), agent_version)
                 WHERE name = $3",
            )
            .bind(millis(now))
            .bind(agent)
            .bind(name)
            .execute(pool)))
    }

    pub(super) async fn status(
        &self,
        name: &str,
        kubernetes: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "UPDATE clusters SET last_seen_at = $1,
                     kubernetes_version = coalesce(nullif($2, ''), kubernetes_version),
                     agent_version = coalesce(nullif($3, ''), agent_version)
                 WHERE name = $4",
            )
            .bind(millis(now))
            .bind(kubernetes)
            .bind(agent)
            .bind(name)
            .execute(pool)))
    }

    pub(super) async fn seen(&self, name: &str, now: SystemTime) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query("UPDATE clusters SET last_seen_at = $1 WHERE name = $2")
                .bind(millis(now))
                .bind(name)
                .execute(pool)))
    }

    fn failed(&self, error: &sqlx::Error) -> Error {
        match self {
            Self::Sqlite { .. } => self.damaged(error.to_string()),
            Self::Postgres { database, .. } => database.failed(error),
        }
    }

    fn damaged(&self, what: String) -> Error {
        match self {
            Self::Sqlite { path, .. } => Error::Database {
                at: path.display().to_string(),
                what,
            },
            Self::Postgres { database, .. } => database.failed_because(what),
        }
    }
}

/// A server that is cut off says nothing; SQLite has a limit of its own.
async fn bounded<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<T, sqlx::Error> {
    let limit = database::CONNECT + database::QUERY;
    match tokio::time::timeout(limit, query).await {
        Ok(answer) => answer,
        Err(_) => Err(sqlx::Error::Io(std::io::Error::new(
            std::io::ErrorKind::TimedOut,
            format!("it did not answer within {limit:?}"),
        ))),
    }
}

/// For a query whose result is that it was done.
async fn done<T>(query: impl Future<Output = Result<T, sqlx::Error>>) -> Result<(), sqlx::Error> {
    query.await.map(drop)
}

fn cluster_of(row: ClusterRow) -> ClusterRecord {
    let (name, created, enrolled, connected, seen, kubernetes_version, agent_version) = row;
    ClusterRecord {
        name,
        created_at: time_of(created),
        enrolled_at: enrolled.map(time_of),
        last_connected_at: connected.map(time_of),
        last_seen_at: seen.map(time_of),
        kubernetes_version,
        agent_version,
    }
}

fn millis(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

fn time_of(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
