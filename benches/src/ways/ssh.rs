//! `ssh -R`: OpenSSH's server where the relay would be, its client where the agent would be, and
//! the port that it opens there.

use std::net::SocketAddr;

use throwline_e2e::free_address;

use super::peer_agents::{PeerAgents, free_addresses};
use super::{Distance, Held, Route, Side, Site, first_answer};
use crate::openssh::Server;

pub(super) use crate::openssh::version;

pub(super) const NAME: &str = "ssh -R";

/// Clients that dial at once: by default the server drops some of more than ten.
const AT_ONCE: usize = 8;

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;
    let dir = room()?;
    let Server { process, access } = Server::start(dir.path(), listen)?;
    let forward = format!("{door}:{}", site.upstream.addr);
    let client = access.client("ssh", dir.path(), dialled, ["-R", &forward])?;
    let target = site.bare(distance.hop(door, &mut held).await?)?;
    first_answer(&target, &client, &[&process]).await?;
    let parts = vec![(Side::Relay, process.pid()), (Side::Agent, client.pid())];
    held.keep((client, process, dir));
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
}

/// A server, and a client process for each agent.
pub(super) fn idle_agents(site: &Site, most: usize) -> anyhow::Result<PeerAgents> {
    let (listen, upstream) = (free_address()?, site.upstream.addr);
    let doors = free_addresses(most)?;
    let dir = room()?;
    let Server { process, access } = Server::start(dir.path(), listen)?;
    let dial = move |doors: &[SocketAddr]| {
        let client = |door: &SocketAddr| {
            let (name, forward) = (format!("ssh-{}", door.port()), format!("{door}:{upstream}"));
            access.client(&name, dir.path(), listen, ["-R", &forward])
        };
        doors.iter().map(client).collect()
    };
    Ok(PeerAgents::new(process, doors, AT_ONCE, dial))
}

/// A directory that another account can enter, which it cannot with the site's.
fn room() -> std::io::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("throwline-bench-ssh-")
        .tempdir()
}
