//! `throwline cluster release`.

use std::time::SystemTime;

use anyhow::bail;
use throwline_authority::Authority;

use crate::args;
use crate::commands::database;
use crate::output;

pub(super) async fn release(args: args::ClusterRelease) -> anyhow::Result<()> {
    let authority = Authority::builder(&args.at.state_dir)
        .database(database::named(&args.at.database)?)
        .open()
        .await?;
    let name = &args.name;
    let Some(released) = authority.release_cluster(name).await? else {
        bail!("no cluster is called {name}; \"throwline clusters\" lists those that are");
    };
    println!("The name {name} is free: the next cluster that is enrolled under it has it.");
    if let Some(until) = released.certificates_until {
        let until = until.duration_since(SystemTime::UNIX_EPOCH)?.as_millis();
        let until = output::rfc3339(u64::try_from(until)?).unwrap_or_default();
        println!(
            "Agents of the old cluster are no longer renewed, and may connect until {until}: stop them, \
             or revoke them (throwline revoke cluster {name}), before you enrol another cluster: lines \
             may still go to them."
        );
    }
    Ok(())
}
