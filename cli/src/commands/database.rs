//! The shared database: how it is named, and `throwline database migrate`.

use anyhow::{Context, bail};
use throwline_authority::Authority;
use throwline_certs::files;
use throwline_database::Database;
use throwline_relay::registry::postgres;

use crate::args;

pub(super) async fn migrate(args: args::DatabaseMigrate) -> anyhow::Result<()> {
    let database = named(&args.database)?.context("give --database or --database-file")?;
    // Each has separate tables.
    let of_authority = Authority::migrate(&database).await?;
    let of_relay = postgres::migrate(&database).await?;
    if of_authority || of_relay {
        println!("The tables of {database} are up to date now.");
    } else {
        println!("The tables of {database} were up to date.");
    }
    Ok(())
}

/// The database that was named, if one was.
pub(super) fn named(args: &args::SharedDatabase) -> anyhow::Result<Option<Database>> {
    let url = match (&args.database, &args.database_file) {
        (Some(url), _) => url.clone(),
        (None, Some(file)) => {
            let text = files::read_text(file)?.with_context(|| {
                format!(
                    "cannot read the database's URL: there is no {}",
                    file.display()
                )
            })?;
            if Database::from_url(&text)?.url_has_password() {
                // Again, now that it is known to hold a secret.
                files::read_secret(file)?;
            }
            text
        }
        (None, None) => return Ok(None),
    };
    let database = Database::from_url(&url)?;
    // The same option may come from the environment, where a password is well.
    let in_arguments = std::env::args().any(|argument| argument.contains(url.trim()));
    if database.url_has_password() && in_arguments {
        bail!(
            "a password on the command line can be read by everybody on this machine: put the \
             URL into a file and give --database-file, or into the environment as \
             THROWLINE_DATABASE, or leave the password to PGPASSFILE"
        );
    }
    if let Some(danger) = database.exposure() {
        tracing::warn!(
            %database,
            danger,
            "the connection to the database is not safe: use sslmode=verify-full"
        );
    }
    Ok(Some(database))
}
