//! rathole over WebSocket and TLS: its server where the relay would be, its client where the agent
//! would be.

use std::path::Path;

use anyhow::{Context, ensure};
use throwline_e2e::pki::Authority;
use throwline_e2e::process::Process;
use throwline_e2e::{free_address, tools};
use tokio::process::Command;

use super::{Distance, Held, Route, Side, Site};

pub(super) const NAME: &str = "rathole (wss)";

/// Guards nothing: it lies on this machine for the length of a run.
const PASSWORD: &str = "bench";

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
    let program = tools::find("rathole")?;
    let dir = site.room(&format!("rathole-{}", distance.label()))?;
    certificate(&dir)?;
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;

    let server = format!(
        "[server]\nbind_addr = \"{listen}\"\ndefault_token = \"bench\"\n\
         [server.transport]\ntype = \"websocket\"\n\
         [server.transport.tcp]\nnodelay = true\n\
         [server.transport.tls]\npkcs12 = \"{}\"\npkcs12_password = \"{PASSWORD}\"\n\
         [server.transport.websocket]\ntls = true\n\
         [server.services.bench]\nbind_addr = \"{door}\"\nnodelay = true\n",
        dir.join("identity.pfx").display()
    );
    let client = format!(
        "[client]\nremote_addr = \"localhost:{}\"\ndefault_token = \"bench\"\n\
         [client.transport]\ntype = \"websocket\"\n\
         [client.transport.tcp]\nnodelay = true\n\
         [client.transport.tls]\ntrusted_root = \"{}\"\nhostname = \"localhost\"\n\
         [client.transport.websocket]\ntls = true\n\
         [client.services.bench]\nlocal_addr = \"{}\"\nnodelay = true\n",
        dialled.port(),
        dir.join("ca.pem").display(),
        site.upstream.addr
    );
    let run = |name: &str, config: &str| {
        let file = dir.join(format!("{name}.toml"));
        std::fs::write(&file, config)?;
        let mut command = Command::new(&program);
        command.env("RUST_LOG", "warn").arg(file);
        Process::start(name, &dir, command)
    };
    let server = run("server", &server)?;
    let client = run("client", &client)?;

    let target = site.bare(distance.hop(door, &mut held).await?)?;
    let open = || async {
        server.check_running().await?;
        target.connect().await?.get(1).await
    };
    client
        .until(super::START, "rathole has opened its port", open)
        .await
        .with_context(|| server.log())?;
    let parts = vec![(Side::Relay, server.pid()), (Side::Agent, client.pid())];
    held.keep((client, server));
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
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
