//! The tables in a PostgreSQL that several relays share, and how they get there.

use super::{Store, migrations::POSTGRES as MIGRATIONS};
use crate::{Database, Error, database};
use sqlx::{PgConnection, migrate::MigrateError};
use std::time::Duration;

/// Reads are short, and a relay's writes come with enrolments, renewals, and agents that come
/// and go: a few thousand a second fit through these.
const CONNECTIONS: u32 = 8;
/// How long a start may wait for another relay's migration.
const MIGRATION: Duration = Duration::from_secs(60);

/// Opens; makes the tables or brings them up to date if need be, and the role may.
pub(in crate::authority) async fn open(database: &Database) -> Result<Store, Error> {
    migrate(database).await?;
    Ok(Store::Postgres {
        pool: database.pool(CONNECTIONS),
        database: database.clone(),
    })
}

/// Brings the tables up to date; `false` when they were.
pub(in crate::authority) async fn migrate(database: &Database) -> Result<bool, Error> {
    let mut connection = database.connect().await?;
    // Asked first, because a relay's own role may not even try.
    let state = schema(&mut connection).await;
    let migrated = match state.map_err(|error| database.failed(&error))? {
        Schema::Current => Ok(false),
        Schema::Newer => Err(database.failed_because(
            "its tables were made by a newer version of throwline: use that version here too"
                .to_owned(),
        )),
        Schema::Behind => run(database, &mut connection).await.map(|()| true),
    };
    database::close(connection).await;
    migrated
}

enum Schema {
    Behind,
    Current,
    Newer,
}

async fn schema(connection: &mut PgConnection) -> Result<Schema, sqlx::Error> {
    let exists: bool = sqlx::query_scalar("SELECT to_regclass('_sqlx_migrations') IS NOT NULL")
        .fetch_one(&mut *connection)
        .await?;
    if !exists {
        return Ok(Schema::Behind);
    }
    let applied: Vec<i64> =
        sqlx::query_scalar("SELECT version FROM _sqlx_migrations WHERE success")
            .fetch_all(connection)
            .await?;
    if applied
        .iter()
        .any(|version| !MIGRATIONS.version_exists(*version))
    {
        return Ok(Schema::Newer);
    }
    let all = MIGRATIONS
        .iter()
        .all(|ours| applied.contains(&ours.version));
    Ok(if all { Schema::Current } else { Schema::Behind })
}

async fn run(database: &Database, connection: &mut PgConnection) -> Result<(), Error> {
    // Under sqlx's advisory lock: of relays that start together, one migrates and the others
    // find it done. What this session allows a query is too short for that.
    let patient = format!(
        "SET statement_timeout = '{0}s'; SET lock_timeout = '{0}s'",
        MIGRATION.as_secs()
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(patient))
        .execute(&mut *connection)
        .await
        .map_err(|error| database.failed(&error))?;
    match tokio::time::timeout(
        MIGRATION * 2,
        MIGRATIONS.run_direct(None, connection, false),
    )
    .await
    {
        Ok(Ok(())) => {
            tracing::info!(%database, "the database's tables are up to date");
            Ok(())
        }
        Ok(Err(error)) if may_not(&error) => Err(database.failed_because(format!(
            "its tables are missing or old, and the role {} may not make them: run \
             \"throwline database migrate\" once as the database's owner, then grant the role its \
             rights as docs/operating.md shows",
            database.role()
        ))),
        Ok(Err(error)) => Err(database.failed_because(error.to_string())),
        Err(_) => Err(database.failed_because("its migration did not end in time".to_owned())),
    }
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
