//! `ssh -R`: OpenSSH's server where the relay would be, its client where the agent would be, and
//! the port that it opens there.

use anyhow::Context;
use throwline_e2e::free_address;

use super::{Distance, Held, Route, Side, Site};
use crate::openssh::Server;

pub(super) use crate::openssh::version;

pub(super) const NAME: &str = "ssh -R";

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;

    // Another account cannot enter the site's directory.
    let dir = tempfile::Builder::new()
        .prefix("throwline-bench-ssh-")
        .tempdir()?;
    let server = Server::start(dir.path(), listen)?;
    let forward = format!("{door}:{}", site.upstream.addr);
    let client = server
        .access()
        .client(dir.path(), dialled, ["-R", &forward])?;

    let entry = distance.hop(door, &mut held).await?;
    let target = site.bare(entry)?;
    let open = || async {
        server.process.check_running().await?;
        target.connect().await?.get(1).await
    };
    client
        .until(super::START, "ssh has opened its port", open)
        .await
        .with_context(|| server.process.log())?;
    let parts = vec![
        (Side::Relay, server.process.pid()),
        (Side::Agent, client.pid()),
    ];
    held.keep((client, server, dir));
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
}
