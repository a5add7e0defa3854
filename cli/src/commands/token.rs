//! `throwline token create`.

use std::os::fd::AsFd;

use anyhow::bail;
use rustix::fs::FileType;
use throwline_authority::{Authority, Subject};
use throwline_certs::files;

use crate::args;
use crate::commands::database;

pub(super) async fn create(args: args::TokenCreate) -> anyhow::Result<()> {
    let subject = match (args.cluster, args.user) {
        (Some(name), None) => Subject::Cluster(name),
        (None, Some(name)) => Subject::User {
            name,
            groups: args.groups,
        },
        _ => bail!("give either --cluster or --user"),
    };
    let authority = Authority::builder(&args.state_dir)
        .database(database::named(&args.database)?)
        .open()
        .await?
        .with_system_names(args.system_names.names()?);
    let relay = authority.relay_url().await?;
    let token = authority.create_token(&subject, args.ttl, &relay).await?;
    let line = format!("{token}\n");
    match args.out {
        Some(file) => files::write_new_private(&file, line.as_bytes())?,
        None => {
            print!("{line}");
            if is_open_file(std::io::stdout()) {
                eprintln!(
                    "Other users of this machine can read the file that the token went to, so it \
                     will not be accepted: run 'chmod 600' on it, or use --out FILE."
                );
            }
        }
    }
    Ok(())
}

/// Whether a shell sent this output to a file that others can read, as `>` makes it.
fn is_open_file(output: impl AsFd) -> bool {
    rustix::fs::fstat(output).is_ok_and(|file| {
        let is_file = FileType::from_raw_mode(file.st_mode) == FileType::RegularFile;
        is_file && file.st_mode & 0o044 != 0
    })
}
