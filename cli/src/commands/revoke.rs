//! `throwline revoke`.

use throwline_authority::{Authority, Target};
use throwline_certs::revocation::parse_serial;

use crate::args::{self, Revoke};
use crate::commands::database;

pub(super) async fn run(command: Revoke) -> anyhow::Result<()> {
    let (target, at) = match command {
        Revoke::User(args) => (Target::User(args.name), args.at),
        Revoke::Cluster(args) => (Target::Cluster(args.name), args.at),
        Revoke::Certificate(args) => (Target::Certificate(parse_serial(&args.serial)?), args.at),
    };
    revoke(&target, &at).await
}

async fn revoke(target: &Target, at: &args::AuthorityAt) -> anyhow::Result<()> {
    let authority = Authority::builder(&at.state_dir)
        .database(database::named(&at.database)?)
        .open()
        .await?;
    let revoked = authority.revoke(target).await?;
    let what = match target {
        Target::User(name) => format!("the user {name}"),
        Target::Cluster(name) => format!("the cluster {name}"),
        Target::Certificate(serial) => format!("the certificate {serial} and its renewals"),
    };
    println!(
        "revoked {what}: {} valid certificate(s), {} open token(s); every relay and agent that is \
         connected refuses them within 10 s",
        revoked.certificates, revoked.tokens
    );
    match target {
        Target::Cluster(name) => println!(
            "The name {name} stays with this cluster: a new token enrols it again. To let another cluster \
             take it, run throwline cluster release {name} as well."
        ),
        Target::User(_) => println!("A new token enrols the user again."),
        Target::Certificate(_) => {}
    }
    Ok(())
}
