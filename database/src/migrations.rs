//! Migrations, one set for each component that keeps tables in a shared database. Each set
//! records in its own table what was applied, so that the sets are independent of each other.
//!
//! Up to version `LEGACY_LAST` there was one set for all, recorded in `LEGACY`. The sets of today
//! have the same version numbers for what was in those files: a set whose own table is missing counts
//! as applied what that table records, and takes it over as soon as the role may. The old table stays,
//! for relays of the old version that still run.

use std::io;
use std::time::Duration;

use sqlx::migrate::{Migrate, MigrateError, Migration, MigrationType, Migrator};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqlSafeStr};

use crate::{Database, Error, close};

/// How long a start may wait for another relay's migration.
const MIGRATION: Duration = Duration::from_secs(60);
/// Where sqlx recorded the one set of all.
const LEGACY: &str = "_sqlx_migrations";
/// The last version of that set.
const LEGACY_LAST: i64 = 3;

/// A file `NNNN_what_it_does.sql`: its number, its words, its text. One that databases have seen never
/// changes: they keep its checksum.
pub type File = (i64, &'static str, &'static str);

/// The migrations of these files, in sqlx's form.
pub fn migrator(files: &[File]) -> Migrator {
    let migrations = files.iter().map(|(version, description, sql)| {
        let sql = (*sql).into_sql_str();
        let simple = MigrationType::Simple;
        Migration::new(*version, (*description).into(), simple, sql, false)
    });
    Migrator::with_migrations(migrations.collect())
}

/// The migrations of one component in PostgreSQL.
#[derive(Debug)]
pub struct Set {
    table: &'static str,
    migrator: Migrator,
}

/// How the tables stand to the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Schema {
    Behind,
    /// All is applied, but only [`LEGACY`] records it.
    Legacy,
    Current,
    Newer,
}

impl Set {
    /// The set that is recorded in `table`, a plain name.
    pub fn new(table: &'static str, files: &[File]) -> Self {
        let mut migrator = migrator(files);
        migrator.dangerous_set_table_name(table);
        Self { table, migrator }
    }

    /// The migrations, for sqlx.
    pub fn migrator(&self) -> &Migrator {
        &self.migrator
    }

    /// Brings the tables up to date; `false` when they were.
    ///
    /// # Errors
    /// The database cannot be reached, its tables are of a newer version, or they are old and this
    /// role may not change them.
    pub async fn migrate(&self, database: &Database) -> Result<bool, Error> {
        let mut connection = database.connect().await?;
        // Asked first, because a relay's own role may not even try.
        let schema = self.schema(&mut connection).await;
        let migrated = match schema.map_err(|error| database.failed(&error))? {
            Schema::Current => Ok(false),
            Schema::Newer => Err(database.failed_because(
                "its tables were made by a newer version of throwline: use that version here too"
                    .to_owned(),
            )),
            Schema::Legacy => match self.run(&mut connection).await {
                // The relays' role, for which the old record is enough.
                Err(error) if may_not(&error) => Ok(false),
                taken_over => self.done(database, taken_over),
            },
            Schema::Behind => {
                let applied = self.run(&mut connection).await;
                self.done(database, applied)
            }
        };
        close(connection).await;
        migrated
    }

    async fn schema(&self, connection: &mut PgConnection) -> Result<Schema, sqlx::Error> {
        let own = applied(connection, self.table).await?;
        let is_all = |applied: &[i64]| {
            let mut ours = self.migrator.iter();
            ours.all(|ours| applied.contains(&ours.version))
        };
        if !own.is_empty() {
            let is_known = |version: &i64| self.migrator.version_exists(*version);
            // Newer takes precedence over behind: tables that a later version has changed are not
            // written by this one.
            return Ok(match (own.iter().all(is_known), is_all(&own)) {
                (false, _) => Schema::Newer,
                (true, true) => Schema::Current,
                (true, false) => Schema::Behind,
            });
        }
        let legacy = applied(connection, LEGACY).await?;
        Ok(if legacy.iter().any(|version| *version > LEGACY_LAST) {
            Schema::Newer
        } else if is_all(&legacy) {
            Schema::Legacy
        } else {
            Schema::Behind
        })
    }

    async fn run(&self, connection: &mut PgConnection) -> Result<(), MigrateError> {
        // What a session allows a query is too short for this.
        let patient = format!(
            "SET statement_timeout = '{0}s'; SET lock_timeout = '{0}s'",
            MIGRATION.as_secs()
        );
        sqlx::raw_sql(AssertSqlSafe(patient))
            .execute(&mut *connection)
            .await?;
        let applying = tokio::time::timeout(MIGRATION * 2, self.apply(connection));
        applying.await.unwrap_or_else(|_| {
            let late = io::Error::new(io::ErrorKind::TimedOut, "its migration did not end in time");
            Err(sqlx::Error::Io(late).into())
        })
    }

    fn done(&self, database: &Database, run: Result<(), MigrateError>) -> Result<bool, Error> {
        match run {
            Ok(()) => {
                tracing::info!(%database, set = self.table, "the database's tables are up to date");
                Ok(true)
            }
            Err(error) if may_not(&error) => Err(database.failed_because(format!(
                "its tables are missing or old, and the role {} may not make them: run \
                 \"throwline database migrate\" once as the database's owner, then grant the role \
                 its rights as docs/operating.md shows",
                database.role()
            ))),
            Err(error) => Err(database.failed_because(error.to_string())),
        }
    }

    async fn apply(&self, connection: &mut PgConnection) -> Result<(), MigrateError> {
        // sqlx's advisory lock, under which older versions migrate too: of relays that start
        // together, one migrates and the others find it done. It ends with the connection.
        connection.lock().await?;
        self.take_over(connection).await?;
        self.migrator.run_direct(None, connection, false).await
    }

    /// Records what the one set of all has applied as applied by this one: all of it or nothing.
    async fn take_over(&self, connection: &mut PgConnection) -> Result<(), MigrateError> {
        if !applied(connection, self.table).await?.is_empty() {
            return Ok(());
        }
        let legacy = applied(connection, LEGACY).await?;
        let Some(last) = legacy.into_iter().max() else {
            return Ok(());
        };
        // A migration that stopped half-way must not be recorded as applied.
        if let Some(version) = connection.dirty_version(LEGACY).await? {
            return Err(MigrateError::Dirty(version));
        }
        let mut tx = connection.begin().await?;
        self.migrator
            .run_direct(Some(last.min(LEGACY_LAST)), &mut *tx, true)
            .await?;
        tx.commit().await?;
        Ok(())
    }
}

/// The versions that `table` records; none while it does not exist.
async fn applied(connection: &mut PgConnection, table: &str) -> Result<Vec<i64>, sqlx::Error> {
    let exists: bool = sqlx::query_scalar("SELECT to_regclass($1) IS NOT NULL")
        .bind(table)
        .fetch_one(&mut *connection)
        .await?;
    if !exists {
        return Ok(Vec::new());
    }
    let select = format!("SELECT version FROM {table} WHERE success");
    sqlx::query_scalar(AssertSqlSafe(select))
        .fetch_all(connection)
        .await
}

/// Whether the role lacks a right: insufficient_privilege.
fn may_not(error: &MigrateError) -> bool {
    let (MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _)) = error else {
        return false;
    };
    error
        .as_database_error()
        .and_then(|error| error.code())
        .is_some_and(|code| code == "42501")
}
