//! Single values, by a key: the relay's URL, the pin of the CA, the version of the revocations.

use super::{Store, Tx, bounded, done};
use crate::error::Error;

/// Where the pin of the one CA of all relays stands among the settings.
const CA_PIN: &str = "ca-pin";
/// The lock for making the CA: any number that nothing else in the database uses.
const CA_LOCK: i64 = 0x7468_726f_776c_696e;

impl Store {
    /// The pin of the one CA of all relays. Until the transaction has ended, other readers of
    /// it wait.
    pub(crate) async fn ca_pin(&self, tx: &mut Tx) -> Result<Option<String>, Error> {
        if let Tx::Postgres(tx) = tx {
            let lock = sqlx::query("SELECT pg_advisory_xact_lock($1)").bind(CA_LOCK);
            let locked = bounded(lock.execute(&mut **tx)).await;
            locked.map_err(|error| self.failed(error))?;
        }
        within!(self, tx, connection =>
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(CA_PIN)
                .fetch_optional(connection))
    }

    pub(crate) async fn set_ca_pin(&self, tx: &mut Tx, pin: &str) -> Result<(), Error> {
        within!(self, tx, connection => done(
            sqlx::query("INSERT INTO settings (key, value) VALUES ($1, $2)")
                .bind(CA_PIN)
                .bind(pin)
                .execute(connection)))
    }

    pub(crate) async fn setting(&self, key: &str) -> Result<Option<String>, Error> {
        on!(self, pool =>
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(key)
                .fetch_optional(pool))
    }

    pub(crate) async fn set_setting(&self, key: &str, value: &str) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "INSERT INTO settings (key, value) VALUES ($1, $2)
                 ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )
            .bind(key)
            .bind(value)
            .execute(pool)))
    }
}
