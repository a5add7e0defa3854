//! The far side of the link, a process in its namespace: the cluster with a pod, Throwline's relay and
//! agent, `sshd` and the cluster's `ssh -R`, and what a port-forward leads to.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::process::Process;
use throwline_e2e::suite::Skipped;
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{Agent, Relay, free_address};

use super::network::SITE;
use super::source;
use crate::openssh::{Access, Server};

/// The name of the cluster at the relay, and of its namespace.
pub(super) const CLUSTER: &str = "narrow";

/// What the user's side is given.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Site {
    /// Of the cluster's administrator, for the direct way.
    pub(super) kubeconfig: PathBuf,
    pub(super) api_server: SocketAddr,
    /// Throwline's, for `throwline login`.
    pub(super) token: String,
    pub(super) pod: String,
    /// Of the pod: see [`source`].
    pub(super) source_port: u16,
    /// None where OpenSSH is not installed.
    pub(super) ssh: Option<Ssh>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ssh {
    pub(super) access: Access,
    pub(super) listen: SocketAddr,
    /// Where the server has a port of the cluster's, by the `ssh -R` there.
    pub(super) door: SocketAddr,
}

/// Serves until the process is stopped; prints its [`Site`] as one line of JSON first. `ssh_dir` is a
/// directory that other accounts can enter.
pub(super) async fn serve(dir: &Path, ssh_dir: &Path) -> anyhow::Result<()> {
    let upstream = Upstream::at(dir, SITE).await?;
    upstream.needs_demo("a cluster in a network namespace")?;
    upstream.namespace_named(CLUSTER).await?;
    let pod = Pod::start(&upstream, CLUSTER, pod::IDLE).await?;

    let listen = here()?;
    let url = format!("https://{listen}");
    let relay = Relay::at(&dir.join("relay"), listen, &url, &[]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    // As in the other benches: peers write no audit.
    let arguments = ["--audit-log", "off"];
    let agent = Agent::start(dir, CLUSTER, &token, upstream.kubeconfig(), &arguments).await?;
    agent.connected().await?;
    let token = relay
        .token(&["--user", "bench", "--group", upstream.group()])
        .await?;

    let api_server = address_of(upstream.kubeconfig())?;
    let ssh = match ssh(ssh_dir, api_server) {
        Ok(ssh) => Some(ssh),
        Err(error) if error.is::<Skipped>() => None,
        Err(error) => return Err(error),
    };
    let source = source::bind().await?;
    let site = Site {
        kubeconfig: upstream.kubeconfig().to_owned(),
        api_server,
        token,
        pod: pod.name.clone(),
        source_port: source.local_addr()?.port(),
        ssh: ssh.as_ref().map(|(_, ssh)| Ssh {
            access: ssh.access.clone(),
            ..*ssh
        }),
    };
    println!("{}", serde_json::to_string(&site)?);
    // All of it runs until this process is stopped.
    source::serve(source).await
}

/// A free address that the user's side reaches.
fn here() -> anyhow::Result<SocketAddr> {
    Ok(SocketAddr::from((SITE, free_address()?.port())))
}

fn address_of(kubeconfig: &Path) -> anyhow::Result<SocketAddr> {
    let text = std::fs::read_to_string(kubeconfig)?;
    let server = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix("https://"));
    Ok(server.context("the cluster has no server")?.parse()?)
}

/// A server where the relay is, and a client beside the cluster that opens a port there.
fn ssh(dir: &Path, api_server: SocketAddr) -> anyhow::Result<((Server, Process), Ssh)> {
    let listen = here()?;
    let door = SocketAddr::from((Ipv4Addr::LOCALHOST, free_address()?.port()));
    let server = Server::start(dir, listen)?;
    let access = server.access.clone();
    let forward = format!("{door}:{api_server}");
    let client = access.client("ssh", dir, listen, ["-R", &forward])?;
    let ssh = Ssh {
        access,
        listen,
        door,
    };
    Ok(((server, client), ssh))
}
