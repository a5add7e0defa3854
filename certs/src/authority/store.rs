//! The authority's tables. Several processes may have them open; see `migrations/`.

use super::{ClusterRecord, Subject};
use crate::{Error, Kind, PeerIdentity, files};
use sqlx::{
    Row, Sqlite, SqlitePool, Transaction,
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
    },
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const FILE: &str = "authority.db";
/// How long a write waits for another process's. Writes take milliseconds; this bounds a stuck
/// disk.
const BUSY: Duration = Duration::from_secs(10);
/// SQLite has one writer; a few more connections serve the readers.
const CONNECTIONS: u32 = 4;

#[derive(Clone, Debug)]
pub(super) struct Store {
    pool: SqlitePool,
    path: PathBuf,
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

impl Store {
    /// Opens and migrates. The caller holds the lock of the state directory.
    pub(super) async fn open(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(FILE);
        // Made here, so that it is private from the first byte; SQLite gives the mode to its
        // other files.
        drop(files::open_private(&path)?);
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .journal_mode(SqliteJournalMode::Wal)
            // A token must stay redeemed through a loss of power.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(BUSY)
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(BUSY * 2)
            .connect_with(options)
            .await;
        let failed = |what: String| Error::Database {
            path: path.clone(),
            what: format!("{what}; restore it from a backup if it is damaged"),
        };
        let pool = pool.map_err(|error| failed(error.to_string()))?;
        sqlx::migrate!()
            .run(&pool)
            .await
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self { pool, path })
    }

    pub(super) async fn begin(&self) -> Result<Transaction<'static, Sqlite>, Error> {
        // Immediate: a transaction that reads first and writes later could not wait for others.
        self.pool
            .begin_with("BEGIN IMMEDIATE")
            .await
            .map_err(|error| self.failed(error))
    }

    pub(super) async fn commit(&self, tx: Transaction<'static, Sqlite>) -> Result<(), Error> {
        tx.commit().await.map_err(|error| self.failed(error))
    }

    pub(super) async fn setting(&self, key: &str) -> Result<Option<String>, Error> {
        sqlx::query_scalar("SELECT value FROM settings WHERE key = ?")
            .bind(key)
            .fetch_optional(&self.pool)
            .await
            .map_err(|error| self.failed(error))
    }

    pub(super) async fn set_setting(&self, key: &str, value: &str) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO settings (key, value) VALUES (?, ?)
             ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        )
        .bind(key)
        .bind(value)
        .execute(&self.pool)
        .await
        .map(drop)
        .map_err(|error| self.failed(error))
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
        sqlx::query(
            "INSERT INTO tokens (secret_hash, kind, name, groups, created_at, expires_at)
             VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(hash.as_slice())
        .bind(subject.kind().as_str())
        .bind(subject.name())
        .bind(groups)
        .bind(millis(now))
        .bind(millis(expires))
        .execute(&mut *tx)
        .await
        .map_err(|error| self.failed(error))?;
        if let Subject::Cluster(name) = subject {
            sqlx::query(
                "INSERT INTO clusters (name, created_at) VALUES (?, ?)
                 ON CONFLICT (name) DO NOTHING",
            )
            .bind(name)
            .bind(millis(now))
            .execute(&mut *tx)
            .await
            .map_err(|error| self.failed(error))?;
        }
        self.commit(tx).await
    }

    /// Why the token could not be redeemed now, without taking the write lock; `None` when it
    /// could.
    pub(super) async fn why_not_redeemable(
        &self,
        hash: &[u8; 32],
        now: SystemTime,
    ) -> Result<Option<Refused>, Error> {
        let row = sqlx::query("SELECT expires_at, redeemed_at FROM tokens WHERE secret_hash = ?")
            .bind(hash.as_slice())
            .fetch_optional(&self.pool)
            .await
            .map_err(|error| self.failed(error))?;
        let Some(row) = row else {
            return Ok(Some(Refused::Unknown));
        };
        let read = |row: &SqliteRow| -> Result<(i64, Option<i64>), sqlx::Error> {
            Ok((row.try_get("expires_at")?, row.try_get("redeemed_at")?))
        };
        let (expires, redeemed) = read(&row).map_err(|error| self.failed(error))?;
        Ok(match redeemed {
            Some(at) => Some(Refused::AlreadyRedeemed(time_of(at))),
            None if expires <= millis(now) => Some(Refused::Expired(time_of(expires))),
            None => None,
        })
    }

    /// Marks the token as redeemed; `None` when somebody was faster.
    pub(super) async fn redeem(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        hash: &[u8; 32],
        now: SystemTime,
    ) -> Result<Option<Redeemed>, Error> {
        let row = sqlx::query(
            "UPDATE tokens SET redeemed_at = ?1
             WHERE secret_hash = ?2 AND redeemed_at IS NULL AND expires_at > ?1
             RETURNING kind, name, groups",
        )
        .bind(millis(now))
        .bind(hash.as_slice())
        .fetch_optional(&mut **tx)
        .await
        .map_err(|error| self.failed(error))?;
        let Some(row) = row else {
            return Ok(None);
        };
        let read = |row: &SqliteRow| -> Result<(String, String, String), sqlx::Error> {
            Ok((
                row.try_get("kind")?,
                row.try_get("name")?,
                row.try_get("groups")?,
            ))
        };
        let (kind, name, groups) = read(&row).map_err(|error| self.failed(error))?;
        let subject = match kind.parse()? {
            Kind::Cluster => Subject::Cluster(name),
            _ => Subject::User {
                name,
                groups: serde_json::from_str(&groups)
                    .map_err(|error| self.damaged(&error.to_string()))?,
            },
        };
        Ok(Some(Redeemed { subject }))
    }

    pub(super) async fn insert_certificate(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        issued: &PeerIdentity,
        now: SystemTime,
        enrolled: SystemTime,
        renewed_from: Option<&str>,
    ) -> Result<(), Error> {
        sqlx::query(
            "INSERT INTO certificates (serial, kind, name, fingerprint, not_before, not_after,
                                       issued_at, enrolled_at, renewed_from)
             VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
        .execute(&mut **tx)
        .await
        .map_err(|error| self.failed(error))?;
        if issued.id.kind() == Kind::Cluster && renewed_from.is_none() {
            sqlx::query("UPDATE clusters SET enrolled_at = ? WHERE name = ?")
                .bind(millis(now))
                .bind(issued.id.name())
                .execute(&mut **tx)
                .await
                .map_err(|error| self.failed(error))?;
        }
        Ok(())
    }

    /// When the token at the head of this certificate's chain of renewals was redeemed; `None`
    /// for a certificate that this authority did not issue.
    pub(super) async fn enrolled_at(
        &self,
        peer: &PeerIdentity,
    ) -> Result<Option<SystemTime>, Error> {
        let at: Option<i64> = sqlx::query_scalar(
            "SELECT enrolled_at FROM certificates WHERE serial = ? AND fingerprint = ?",
        )
        .bind(&peer.serial)
        .bind(peer.fingerprint.as_slice())
        .fetch_optional(&self.pool)
        .await
        .map_err(|error| self.failed(error))?;
        Ok(at.map(time_of))
    }

    pub(super) async fn clusters(&self, only: Option<&str>) -> Result<Vec<ClusterRecord>, Error> {
        let rows =
            sqlx::query("SELECT * FROM clusters WHERE ?1 IS NULL OR name = ?1 ORDER BY name")
                .bind(only)
                .fetch_all(&self.pool)
                .await
                .map_err(|error| self.failed(error))?;
        rows.iter()
            .map(cluster_of)
            .collect::<Result<_, _>>()
            .map_err(|error| self.failed(error))
    }

    pub(super) async fn connected(
        &self,
        name: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        self.run(
            sqlx::query(
                "UPDATE clusters SET last_connected_at = ?1, last_seen_at = ?1,
                     agent_version = coalesce(nullif(?2, ''), agent_version)
                 WHERE name = ?3",
            )
            .bind(millis(now))
            .bind(agent)
            .bind(name),
        )
        .await
    }

    pub(super) async fn status(
        &self,
        name: &str,
        kubernetes: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        self.run(
            sqlx::query(
                "UPDATE clusters SET last_seen_at = ?1,
                     kubernetes_version = coalesce(nullif(?2, ''), kubernetes_version),
                     agent_version = coalesce(nullif(?3, ''), agent_version)
                 WHERE name = ?4",
            )
            .bind(millis(now))
            .bind(kubernetes)
            .bind(agent)
            .bind(name),
        )
        .await
    }

    pub(super) async fn seen(&self, name: &str, now: SystemTime) -> Result<(), Error> {
        self.run(
            sqlx::query("UPDATE clusters SET last_seen_at = ? WHERE name = ?")
                .bind(millis(now))
                .bind(name),
        )
        .await
    }

    async fn run(
        &self,
        query: sqlx::query::Query<'_, Sqlite, sqlx::sqlite::SqliteArguments>,
    ) -> Result<(), Error> {
        query
            .execute(&self.pool)
            .await
            .map(drop)
            .map_err(|error| self.failed(error))
    }

    fn failed(&self, error: sqlx::Error) -> Error {
        self.damaged(&error.to_string())
    }

    fn damaged(&self, what: &str) -> Error {
        Error::Database {
            path: self.path.clone(),
            what: what.to_owned(),
        }
    }
}

fn cluster_of(row: &SqliteRow) -> Result<ClusterRecord, sqlx::Error> {
    let time = |column: &str| -> Result<Option<SystemTime>, sqlx::Error> {
        Ok(row.try_get::<Option<i64>, _>(column)?.map(time_of))
    };
    Ok(ClusterRecord {
        name: row.try_get("name")?,
        created_at: time_of(row.try_get("created_at")?),
        enrolled_at: time("enrolled_at")?,
        last_connected_at: time("last_connected_at")?,
        last_seen_at: time("last_seen_at")?,
        kubernetes_version: row.try_get("kubernetes_version")?,
        agent_version: row.try_get("agent_version")?,
    })
}

fn millis(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

fn time_of(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
