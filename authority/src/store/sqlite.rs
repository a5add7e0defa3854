//! The tables in a file of the state directory: for one relay.

use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use throwline_certs::files;

use super::{Store, migrations};
use crate::error::{BoxError, Error};

const FILE: &str = "authority.db";
/// How long a write waits for another process's. Writes take milliseconds; this bounds a stuck
/// disk.
const BUSY: Duration = Duration::from_secs(10);
/// SQLite has one writer; a few more connections serve the readers. All are open from the start
/// for good: when strangers hold every other descriptor, none could be opened.
const CONNECTIONS: u32 = 4;

/// Opens and migrates. The caller holds the lock of the state directory.
pub(crate) async fn open(dir: &Path) -> Result<Store, Error> {
    let path = dir.join(FILE);
    // Made here, so that it is private from the first byte; SQLite gives the mode to its other
    // files.
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
        .idle_timeout(None)
        .max_lifetime(None)
        .acquire_timeout(BUSY * 2)
        .connect_with(options)
        .await;
    let failed = |source: BoxError| Error::SqliteOpen {
        path: path.clone(),
        source,
    };
    let pool = pool.map_err(|error| failed(error.into()))?;
    migrations::SQLITE
        .run(&pool)
        .await
        .map_err(|error| failed(error.into()))?;
    let mut all = Vec::new();
    for _ in 0..CONNECTIONS {
        let one = pool.acquire().await;
        all.push(one.map_err(|error| failed(error.into()))?);
    }
    drop(all);
    Ok(Store::Sqlite { pool, path })
}
