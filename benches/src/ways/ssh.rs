//! `ssh -R`: OpenSSH's server where the relay would be, its client where the agent would be, and
//! the port that it opens there. Its own defaults, so also its own choice of cipher.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use throwline_e2e::process::{Process, unprivileged};
use throwline_e2e::{free_address, tools};
use tokio::process::Command;

use super::peer_agents::{PeerAgents, free_addresses};
use super::{Distance, Held, Route, Side, Site, first_answer};

pub(super) const NAME: &str = "ssh -R";

/// Whom the server runs as when we are root: as such it would want a directory and a user that
/// only its package's installation makes.
const ACCOUNT: &str = "nobody";

/// Clients that dial at once: by default the server drops some of more than ten.
const AT_ONCE: usize = 8;

pub(super) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("ssh")?)
        .arg("-V")
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(text.split(',').next().unwrap_or_default().trim().to_owned())
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;
    let account = Account::new()?;
    let server = account.server(listen)?;
    let client = account.client(dialled, door, site.upstream.addr)?;
    let target = site.bare(distance.hop(door, &mut held).await?)?;
    first_answer(&target, &client, &[&server]).await?;
    let parts = vec![(Side::Relay, server.pid()), (Side::Agent, client.pid())];
    held.keep((client, server, account));
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
    let account = Account::new()?;
    let server = account.server(listen)?;
    let dial = move |doors: &[SocketAddr]| {
        let each = doors.iter();
        each.map(|door| account.client(listen, *door, upstream))
            .collect()
    };
    Ok(PeerAgents::new(server, doors, AT_ONCE, dial))
}

/// The account that the server runs as and admits, and the keys of both ends.
struct Account {
    dir: tempfile::TempDir,
    server: PathBuf,
    /// User and group to run the server as, when we are root.
    ids: Option<(u32, u32)>,
    name: String,
}

impl Account {
    fn new() -> anyhow::Result<Self> {
        let server = std::fs::canonicalize(tools::find("sshd")?)?;
        let keygen = tools::find("ssh-keygen")?;
        // Another account cannot enter the site's directory.
        let dir = tempfile::Builder::new()
            .prefix("throwline-bench-ssh-")
            .tempdir()?;
        for key in ["host", "user"] {
            let mut command = std::process::Command::new(&keygen);
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
            let made = command.arg(dir.path().join(key)).output()?;
            ensure!(made.status.success(), "ssh-keygen failed: {made:?}");
        }
        let ids = unprivileged(&[ACCOUNT])?;
        let name = match ids {
            Some(_) => ACCOUNT.to_owned(),
            None => own_name()?,
        };
        Ok(Self {
            dir,
            server,
            ids,
            name,
        })
    }

    fn at(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn server(&self, listen: SocketAddr) -> anyhow::Result<Process> {
        // Without PAM it would look into a file that is root's whether the account is locked.
        let config = format!(
            "ListenAddress {listen}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
             StrictModes no\nUsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
             AllowTcpForwarding yes\n",
            self.at("host").display(),
            self.at("user.pub").display(),
        );
        std::fs::write(self.at("config"), config)?;
        let mut command = Command::new(&self.server);
        command.env_clear().current_dir("/");
        if let Some(libraries) = libraries(&self.server) {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command.args(["-D", "-e", "-f"]).arg(self.at("config"));
        if let Some((user, group)) = self.ids {
            std::fs::set_permissions(self.dir.path(), std::fs::Permissions::from_mode(0o711))?;
            for file in ["host", "user.pub", "config"] {
                chown(self.at(file), Some(user), Some(group))?;
            }
            command.uid(user).gid(group);
        }
        Process::start("sshd", self.dir.path(), command)
    }

    /// Has the server open `door` for what lies at `to`.
    fn client(
        &self,
        dialled: SocketAddr,
        door: SocketAddr,
        to: SocketAddr,
    ) -> anyhow::Result<Process> {
        let mut command = Command::new(tools::find("ssh")?);
        command
            .args(["-N", "-F", "/dev/null", "-i"])
            .arg(self.at("user"));
        for option in [
            "BatchMode=yes",
            "IdentitiesOnly=yes",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "ExitOnForwardFailure=yes",
            // It dials once; the server may not listen yet.
            "ConnectionAttempts=20",
        ] {
            command.args(["-o", option]);
        }
        let forward = format!("{door}:{to}");
        command.args(["-p", &dialled.port().to_string(), "-R", &forward]);
        command.arg(format!("{}@{}", self.name, dialled.ip()));
        Process::start(&format!("ssh-{}", door.port()), self.dir.path(), command)
    }
}

/// Where libraries lie that were unpacked beside the server; none where it is installed.
fn libraries(server: &Path) -> Option<PathBuf> {
    let package = server.ancestors().nth(3)?;
    let mut entries = std::fs::read_dir(package.join("usr/lib")).ok()?.flatten();
    let multiarch = |name: &str| name.ends_with("-linux-gnu");
    let found = entries.find(|entry| multiarch(&entry.file_name().to_string_lossy()));
    found
        .map(|entry| entry.path())
        .filter(|_| package != Path::new("/"))
}

/// The account that this process runs as: a server that is not root admits no other.
fn own_name() -> anyhow::Result<String> {
    let id = std::process::Command::new("id").arg("-un").output()?;
    Ok(String::from_utf8(id.stdout)?.trim().to_owned())
}
