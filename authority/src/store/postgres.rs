//! The tables in a PostgreSQL that several relays share, and how they get there.

use throwline_certs::tls;
use throwline_database::Database;

use super::{Store, migrations::POSTGRES};
use crate::error::Error;

/// Reads are short, and a relay's writes come with enrolments, renewals, and agents that come
/// and go: a few thousand a second fit through these.
const CONNECTIONS: u32 = 8;

/// Opens; makes the tables or brings them up to date if need be, and the role may.
pub(crate) async fn open(database: &Database) -> Result<Store, Error> {
    migrate(database).await?;
    Ok(Store::Postgres {
        pool: database.pool(CONNECTIONS),
        database: database.clone(),
    })
}

/// Brings the tables up to date; `false` when they were.
pub(crate) async fn migrate(database: &Database) -> Result<bool, Error> {
    tls::provide_to_libraries();
    Ok(POSTGRES.migrate(database).await?)
}
