//! `throwline token create`.

use anyhow::bail;
use throwline_certs::authority::{Authority, Subject};

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
        .await?;
    let relay = authority.relay_url().await?;
    let token = authority.create_token(&subject, args.ttl, &relay).await?;
    println!("{token}");
    Ok(())
}
