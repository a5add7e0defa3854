//! rathole over WebSocket and TLS: its server where the relay would be, its client where the agent
//! would be.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use throwline_e2e::pki::Authority;
use throwline_e2e::process::Process;
use throwline_e2e::{free_address, tools};
use tokio::process::Command;

use super::peer_agents::{PeerAgents, free_addresses};
use super::{Distance, Held, Route, Side, Site, first_answer};

pub(super) const NAME: &str = "rathole (wss)";

/// Guards nothing: it lies on this machine for the length of a run.
const PASSWORD: &str = "bench";

/// Agents that dial at once, each with all its connections.
const AT_ONCE: usize = 50;

pub(super) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("rathole")?)
        .arg("--version")
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.lines().find_map(|line| {
        let (name, version) = line.split_once(':')?;
        (name.trim() == "Build Version").then(|| version.trim().to_owned())
    });
    let version = version.unwrap_or_else(|| text.lines().next().unwrap_or_default().to_owned());
    Ok(format!("rathole {version}"))
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let dir = site.room(&format!("rathole-{}", distance.label()))?;
    let mut held = Held::default();
    let tunnel = Tunnel::start(dir, site.upstream.addr, distance, &mut held).await?;
    let target = site.bare(distance.hop(tunnel.door, &mut held).await?)?;
    first_answer(&target, &tunnel.client, &[&tunnel.server]).await?;
    let parts = tunnel.parts().to_vec();
    held.keep(tunnel);
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
}

/// A server, and clients with a service for each agent: to the server a service is what an agent
/// is, with its control connection and the data connections that are kept ready for it.
pub(super) fn idle_agents(site: &Site, most: usize) -> anyhow::Result<PeerAgents> {
    let (listen, upstream) = (free_address()?, site.upstream.addr);
    let pair = Pair::new(site.room("rathole-idle")?)?;
    let doors = free_addresses(most)?;
    let server = pair.server(listen, &doors)?;
    let dial = move |doors: &[SocketAddr]| Ok(vec![pair.client(listen, doors, upstream)?]);
    Ok(PeerAgents::new(server, doors, AT_ONCE, dial))
}

/// A server that has opened one port, and the client that holds what lies behind it.
pub(super) struct Tunnel {
    pub(super) client: Process,
    pub(super) server: Process,
    /// Where the server is to be connected to.
    pub(super) door: SocketAddr,
}

impl Tunnel {
    /// To what lies at `to`, which is beside the client.
    pub(super) async fn start(
        dir: PathBuf,
        to: SocketAddr,
        distance: Distance,
        held: &mut Held,
    ) -> anyhow::Result<Self> {
        let (listen, door) = (free_address()?, free_address()?);
        let dialled = distance.hop(listen, held).await?;
        let pair = Pair::new(dir)?;
        Ok(Self {
            server: pair.server(listen, &[door])?,
            client: pair.client(dialled, &[door], to)?,
            door,
        })
    }

    pub(super) fn parts(&self) -> [(Side, u32); 2] {
        [
            (Side::Relay, self.server.pid()),
            (Side::Agent, self.client.pid()),
        ]
    }
}

/// What a server and its clients have in common.
struct Pair {
    program: PathBuf,
    dir: PathBuf,
}

impl Pair {
    fn new(dir: PathBuf) -> anyhow::Result<Self> {
        let program = tools::find("rathole")?;
        certificate(&dir)?;
        Ok(Self { program, dir })
    }

    fn server(&self, listen: SocketAddr, doors: &[SocketAddr]) -> anyhow::Result<Process> {
        let mut config = format!(
            "[server]\nbind_addr = \"{listen}\"\ndefault_token = \"bench\"\n\
             [server.transport]\ntype = \"websocket\"\n\
             [server.transport.tcp]\nnodelay = true\n\
             [server.transport.tls]\npkcs12 = \"{}\"\npkcs12_password = \"{PASSWORD}\"\n\
             [server.transport.websocket]\ntls = true\n",
            self.dir.join("identity.pfx").display()
        );
        for door in doors {
            config.push_str(&format!(
                "[server.services.{}]\nbind_addr = \"{door}\"\nnodelay = true\n",
                service(*door)
            ));
        }
        self.run("server", &config)
    }

    fn client(
        &self,
        dialled: SocketAddr,
        doors: &[SocketAddr],
        to: SocketAddr,
    ) -> anyhow::Result<Process> {
        let mut config = format!(
            "[client]\nremote_addr = \"localhost:{}\"\ndefault_token = \"bench\"\n\
             [client.transport]\ntype = \"websocket\"\n\
             [client.transport.tcp]\nnodelay = true\n\
             [client.transport.tls]\ntrusted_root = \"{}\"\nhostname = \"localhost\"\n\
             [client.transport.websocket]\ntls = true\n",
            dialled.port(),
            self.dir.join("ca.pem").display()
        );
        for door in doors {
            config.push_str(&format!(
                "[client.services.{}]\nlocal_addr = \"{to}\"\nnodelay = true\n",
                service(*door)
            ));
        }
        let first = doors.first().context("a client without a service")?;
        self.run(&format!("client-{}", first.port()), &config)
    }

    fn run(&self, name: &str, config: &str) -> anyhow::Result<Process> {
        let file = self.dir.join(format!("{name}.toml"));
        std::fs::write(&file, config)?;
        let mut command = Command::new(&self.program);
        command.env("RUST_LOG", "warn").arg(file);
        Process::start(name, &self.dir, command)
    }
}

/// Both ends name a service by the port that is opened for it.
fn service(door: SocketAddr) -> String {
    format!("port-{}", door.port())
}

/// A server's certificate in the one format that rathole reads, by a CA that its client trusts.
fn certificate(dir: &Path) -> anyhow::Result<()> {
    let authority = Authority::new("rathole's CA")?;
    let (certificate, key) = authority.server(&["localhost"])?;
    for (file, text) in [
        ("ca.pem", authority.pem()),
        ("cert.pem", &certificate),
        ("cert.key", &key),
    ] {
        std::fs::write(dir.join(file), text)?;
    }
    let mut command = std::process::Command::new(tools::find("openssl")?);
    command.current_dir(dir).args([
        "pkcs12",
        "-export",
        "-in",
        "cert.pem",
        "-inkey",
        "cert.key",
        "-out",
        "identity.pfx",
    ]);
    command.args(["-passout", &format!("pass:{PASSWORD}")]);
    let made = command.output()?;
    ensure!(made.status.success(), "openssl pkcs12 failed: {made:?}");
    Ok(())
}
