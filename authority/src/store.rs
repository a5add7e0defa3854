//! The authority's tables: in SQLite, which several processes of one machine may have open, or
//! in PostgreSQL, which several relays share. The SQL is the same; see `migrations/`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::{PgPool, Postgres, Sqlite, SqlitePool, Transaction};
use throwline_database::{self as database, Database};

use crate::error::{ContentError, Error};

#[derive(Clone, Debug)]
pub(crate) enum Store {
    Sqlite { pool: SqlitePool, path: PathBuf },
    Postgres { pool: PgPool, database: Database },
}

/// Changes that are made together or not at all: dropped, they are taken back.
pub(crate) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

/// Runs a query on whichever database there is. Its parameters are `$1`, `$2` and so on, which
/// both accept.
macro_rules! on {
    ($store:expr, $pool:ident => $query:expr) => {
        match $store {
            Store::Sqlite { pool: $pool, .. } => $query.await,
            Store::Postgres { pool: $pool, .. } => bounded($query).await,
        }
        .map_err(|error| $store.failed(error))
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
        .map_err(|error| $store.failed(error))
    };
}

// Below the macros, which they use.
mod certificates;
mod clusters;
mod migrations;
mod postgres;
mod revocations;
mod settings;
mod sqlite;
mod tokens;

pub(crate) use certificates::{Predecessor, Unusable, key_hash};
pub(crate) use postgres::{migrate, open as open_postgres};
pub(crate) use revocations::IssueLock;
pub(crate) use sqlite::open as open_sqlite;
pub(crate) use tokens::Refused;

impl Store {
    pub(crate) async fn begin(&self) -> Result<Tx, Error> {
        match self {
            // Immediate: a transaction that reads first and writes later could not wait for others.
            Self::Sqlite { pool, .. } => pool.begin_with("BEGIN IMMEDIATE").await.map(Tx::Sqlite),
            // Here a row's second writer waits for the first and then looks at the row again.
            Self::Postgres { pool, .. } => bounded(pool.begin()).await.map(Tx::Postgres),
        }
        .map_err(|error| self.failed(error))
    }

    pub(crate) async fn commit(&self, tx: Tx) -> Result<(), Error> {
        match tx {
            Tx::Sqlite(tx) => tx.commit().await,
            Tx::Postgres(tx) => bounded(tx.commit()).await,
        }
        .map_err(|error| self.failed(error))
    }

    /// The database, where relays share one.
    pub(crate) fn shared(&self) -> Option<&Database> {
        match self {
            Self::Sqlite { .. } => None,
            Self::Postgres { database, .. } => Some(database),
        }
    }

    fn failed(&self, error: sqlx::Error) -> Error {
        match self {
            Self::Sqlite { path, .. } => Error::Sqlite {
                path: path.clone(),
                source: error.into(),
            },
            Self::Postgres { database, .. } => database.failed(&error).into(),
        }
    }

    fn unreadable(&self, source: ContentError) -> Error {
        let database = match self {
            Self::Sqlite { path, .. } => path.display().to_string(),
            Self::Postgres { database, .. } => database.to_string(),
        };
        Error::Content { database, source }
    }
}

/// A server that is cut off sends nothing; SQLite has its own limit.
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

fn millis(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

fn time_of(millis: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(u64::try_from(millis).unwrap_or(0))
}
