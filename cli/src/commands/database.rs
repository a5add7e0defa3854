//! The shared database: how it is named, and `throwline database migrate`.

use std::io::Read;

use anyhow::{Context, bail};
use throwline_certs::Database;
use throwline_certs::authority::Authority;

use crate::args;

/// A URL is a few hundred bytes; anything longer is the wrong file.
const MAX_URL: u64 = 16 * 1024;

pub(super) async fn migrate(args: args::DatabaseMigrate) -> anyhow::Result<()> {
    let database = named(&args.database)?.context("give --database or --database-file")?;
    if Authority::migrate(&database).await? {
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
            let mut text = String::new();
            std::fs::File::open(file)
                .and_then(|file| file.take(MAX_URL).read_to_string(&mut text))
                .with_context(|| {
                    format!("cannot read the database's URL from {}", file.display())
                })?;
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
    Ok(Some(database))
}
