//! wstunnel over WebSocket and TLS: its server where the relay would be, its client where the agent
//! would be. By its defaults: frames are not masked, and one connection is kept ready for each port.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context;
use throwline_e2e::pki::Authority;
use throwline_e2e::process::Process;
use throwline_e2e::{free_address, tools};
use tokio::process::Command;

use super::peer_agents::{PeerAgents, free_addresses};
use super::{Distance, Held, Route, Side, Site, first_answer};

pub(super) const NAME: &str = "wstunnel (wss)";

/// Agents that dial at once.
const AT_ONCE: usize = 50;

/// As "wstunnel 10.6.2".
pub(super) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("wstunnel")?)
        .arg("--version")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().last().unwrap_or_default();
    Ok(format!("wstunnel {version}"))
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;
    let pair = Pair::new(site.room(&format!("wstunnel-{}", distance.label()))?)?;
    let server = pair.server(listen)?;
    let client = pair.client(dialled, &[door], site.upstream.addr)?;
    let target = site.bare(distance.hop(door, &mut held).await?)?;
    first_answer(&target, &client, &[&server]).await?;
    let parts = vec![(Side::Relay, server.pid()), (Side::Agent, client.pid())];
    held.keep((client, server));
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
}

/// A server, and clients with a reverse tunnel for each agent: to the server a reverse tunnel is
/// what an agent is, with a connection that waits.
pub(super) fn idle_agents(site: &Site, most: usize) -> anyhow::Result<PeerAgents> {
    let (listen, upstream) = (free_address()?, site.upstream.addr);
    let doors = free_addresses(most)?;
    let pair = Pair::new(site.room("wstunnel-idle")?)?;
    let server = pair.server(listen)?;
    let dial = move |doors: &[SocketAddr]| Ok(vec![pair.client(listen, doors, upstream)?]);
    Ok(PeerAgents::new(server, doors, AT_ONCE, dial))
}

/// What a server and its clients have in common.
struct Pair {
    program: PathBuf,
    dir: PathBuf,
}

impl Pair {
    fn new(dir: PathBuf) -> anyhow::Result<Self> {
        let authority = Authority::new("wstunnel's CA")?;
        let (certificate, key) = authority.server(&["localhost", "127.0.0.1"])?;
        for (file, text) in [
            ("ca.pem", authority.pem()),
            ("cert.pem", &certificate),
            ("cert.key", &key),
        ] {
            std::fs::write(dir.join(file), text)?;
        }
        let program = tools::find("wstunnel")?;
        Ok(Self { program, dir })
    }

    fn server(&self, listen: SocketAddr) -> anyhow::Result<Process> {
        let mut command = self.command("server");
        command
            .arg("--tls-certificate")
            .arg(self.dir.join("cert.pem"))
            .arg("--tls-private-key")
            .arg(self.dir.join("cert.key"))
            .arg(format!("wss://{listen}"));
        Process::start("server", &self.dir, command)
    }

    fn client(
        &self,
        dialled: SocketAddr,
        doors: &[SocketAddr],
        to: SocketAddr,
    ) -> anyhow::Result<Process> {
        let mut command = self.command("client");
        // In the place of the system's roots.
        command
            .env("SSL_CERT_FILE", self.dir.join("ca.pem"))
            .arg("--tls-verify-certificate");
        for door in doors {
            command.arg("-R").arg(format!("tcp://{door}:{to}"));
        }
        command.arg(format!("wss://{dialled}"));
        let first = doors.first().context("a client without a tunnel")?;
        Process::start(&format!("client-{}", first.port()), &self.dir, command)
    }

    fn command(&self, role: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args([role, "--log-lvl", "WARN"]);
        command
    }
}
