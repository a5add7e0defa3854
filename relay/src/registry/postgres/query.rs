//! What every query on the registry's connection needs.

use std::time::Duration;

use sqlx::postgres::Postgres;
use throwline_database::QUERY;

use super::notice::CHANNEL;

/// Why a connection was given up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("{0}")]
    Database(#[from] sqlx::Error),
    #[error("the connection was cut")]
    Cut,
    #[error("a query was not answered within {QUERY:?}")]
    Silent,
}

/// Gives the connection up with a query that is not answered in time.
pub(super) async fn bounded<T>(
    work: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, Lost> {
    match tokio::time::timeout(QUERY, work).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(Lost::Silent),
    }
}

pub(super) fn millis(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX)
}

/// Sends notices with the transaction.
pub(super) async fn notify(
    tx: &mut sqlx::Transaction<'_, Postgres>,
    notices: &[String],
) -> Result<(), sqlx::Error> {
    sqlx::query("SELECT pg_notify($1, notice) FROM unnest($2::text[]) AS notice")
        .bind(CHANNEL)
        .bind(notices)
        .execute(&mut **tx)
        .await
        .map(drop)
}
