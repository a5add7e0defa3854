//! The ways from the user's machine to the cluster, each with what it runs there.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use throwline_e2e::kubectl::Version;
use throwline_e2e::process::Process;
use throwline_e2e::{Kubectl, Proxy, User, eventually, free_address, tools};

use super::site::{CLUSTER, Site, Ssh};
use crate::openssh;
use crate::rows::DIRECT;
use crate::ways::THROWLINE;

/// Both halves: the cluster's `ssh -R` leads to the server, this one from it.
const SSH: &str = "ssh -L to ssh -R";

/// What can be compared, in the order of the report.
pub(super) const NAMES: [&str; 3] = [DIRECT, SSH, THROWLINE];

/// How long a way may take to come up, over the slowest link.
const START: Duration = Duration::from_secs(60);
/// Longest that a command of a measurement may take.
const LIMIT: Duration = Duration::from_secs(30);

/// One way, and kubectl by it.
pub(super) struct Way {
    pub(super) name: &'static str,
    /// Name and version of what carries it; empty for the direct way.
    pub(super) version: String,
    pub(super) kubectl: Kubectl,
    tunnel: Tunnel,
}

/// What runs on the user's machine.
enum Tunnel {
    None,
    Ssh { forward: Box<Forward> },
    Throwline { proxy: Box<Proxy> },
}

/// A client of `sshd` with a local port.
struct Forward {
    dir: PathBuf,
    ssh: Ssh,
    entry: SocketAddr,
    client: Process,
}

impl Forward {
    fn start(dir: PathBuf, ssh: Ssh) -> anyhow::Result<Self> {
        let entry = free_address()?;
        let client = Self::dial(&dir, &ssh, entry)?;
        Ok(Self {
            dir,
            ssh,
            entry,
            client,
        })
    }

    fn dial(dir: &Path, ssh: &Ssh, entry: SocketAddr) -> anyhow::Result<Process> {
        let forward = format!("{entry}:{}", ssh.door);
        ssh.access.client("ssh", dir, ssh.listen, ["-L", &forward])
    }

    async fn reconnect(&mut self) -> anyhow::Result<()> {
        self.client.stop(START).await?;
        self.client = Self::dial(&self.dir, &self.ssh, self.entry)?;
        Ok(())
    }
}

impl Way {
    /// Dials again, so that what one connection learned of the last link is not taken to the next.
    pub(super) async fn reconnect(&mut self) -> anyhow::Result<()> {
        match &mut self.tunnel {
            Tunnel::None => {}
            Tunnel::Ssh { forward } => forward.reconnect().await?,
            Tunnel::Throwline { proxy } => {
                proxy.process.stop(START).await?;
                proxy.restart().await?;
            }
        }
        self.answers().await
    }

    /// Waits for a first answer; so whatever the way keeps warm is warm.
    async fn answers(&self) -> anyhow::Result<()> {
        let answered = || async { self.kubectl.ok(&["get", "--raw", "/version"]).await };
        eventually(START, "a first answer", answered)
            .await
            .with_context(|| self.name)?;
        Ok(())
    }
}

/// The ways of these names, in the namespace of the user, and why others are left out.
pub(super) async fn start(
    names: &[&'static str],
    site: &Site,
    dir: &Path,
) -> anyhow::Result<(Vec<Way>, Vec<String>)> {
    let newest = tools::newest_kubectl()?;
    let mut ways = Vec::new();
    let mut left_out = Vec::new();
    for name in names.iter().copied() {
        let way = match (name, &site.ssh) {
            (SSH, None) => {
                left_out.push(format!("{SSH}: OpenSSH is not installed."));
                continue;
            }
            (SSH, Some(ssh)) => over_ssh(ssh, site, &newest, dir)?,
            (THROWLINE, _) => over_throwline(site, &newest, dir).await?,
            _ => Way {
                name: DIRECT,
                version: String::new(),
                kubectl: kubectl(&newest, &site.kubeconfig, dir, DIRECT),
                tunnel: Tunnel::None,
            },
        };
        way.answers().await?;
        ways.push(way);
    }
    Ok((ways, left_out))
}

fn over_ssh(ssh: &Ssh, site: &Site, newest: &Version, dir: &Path) -> anyhow::Result<Way> {
    let ssh = Ssh {
        access: ssh.access.clone(),
        ..*ssh
    };
    let forward = Forward::start(dir.to_owned(), ssh)?;
    let text = std::fs::read_to_string(&site.kubeconfig)?;
    let kubeconfig = dir.join("ssh.kubeconfig");
    // Its certificate is loopback's, too.
    let (there, here) = (site.api_server.to_string(), forward.entry.to_string());
    std::fs::write(&kubeconfig, text.replace(&there, &here))?;
    Ok(Way {
        name: SSH,
        version: openssh::version()?,
        kubectl: kubectl(newest, &kubeconfig, dir, "ssh"),
        tunnel: Tunnel::Ssh {
            forward: Box::new(forward),
        },
    })
}

async fn over_throwline(site: &Site, newest: &Version, dir: &Path) -> anyhow::Result<Way> {
    let user = User::login(dir, "bench", &site.token, &[]).await?;
    let proxy = Proxy::start(&user, &[CLUSTER], &[]).await?;
    let kubectl = kubectl(newest, &proxy.kubeconfig, dir, "throwline")
        .context(&format!("throwline-{CLUSTER}"));
    Ok(Way {
        name: THROWLINE,
        version: crate::ways::throwline_version()?,
        kubectl,
        tunnel: Tunnel::Throwline {
            proxy: Box::new(proxy),
        },
    })
}

/// With a home for this way alone: kubectl keeps what it discovered there.
fn kubectl(newest: &Version, kubeconfig: &Path, dir: &Path, name: &str) -> Kubectl {
    let home = dir.join(format!("home-{name}"));
    Kubectl::new(newest, kubeconfig, &home)
        .namespace(CLUSTER)
        .within(LIMIT)
}
