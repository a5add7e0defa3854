//! `ssh -R`: OpenSSH's server where the relay would be, its client where the agent would be, and
//! the port that it opens there. Its own defaults, so also its own choice of cipher.

use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use throwline_e2e::process::{Process, unprivileged};
use throwline_e2e::{free_address, tools};
use tokio::process::Command;

use super::{Distance, Held, Route, Side, Site};

pub(super) const NAME: &str = "ssh -R";

/// Whom the server runs as when we are root: as such it would want a directory and a user that
/// only its package's installation makes.
const ACCOUNT: &str = "nobody";

pub(super) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("ssh")?)
        .arg("-V")
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(text.split(',').next().unwrap_or_default().trim().to_owned())
}

pub(super) async fn route(site: &Site, distance: Distance) -> anyhow::Result<Route> {
    let server = std::fs::canonicalize(tools::find("sshd")?)?;
    let client = tools::find("ssh")?;
    let keygen = tools::find("ssh-keygen")?;
    let mut held = Held::default();
    let (listen, door) = (free_address()?, free_address()?);
    let dialled = distance.hop(listen, &mut held).await?;

    // Another account cannot enter the site's directory.
    let dir = tempfile::Builder::new()
        .prefix("throwline-bench-ssh-")
        .tempdir()?;
    let at = |name: &str| dir.path().join(name);
    for key in ["host", "user"] {
        let mut command = std::process::Command::new(&keygen);
        command.args(["-q", "-t", "ed25519", "-N", "", "-f"]);
        let made = command.arg(at(key)).output()?;
        ensure!(made.status.success(), "ssh-keygen failed: {made:?}");
    }
    // Without PAM it would look into a file that is root's whether the account is locked.
    let config = format!(
        "ListenAddress {listen}\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\n\
         StrictModes no\nUsePAM yes\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         AllowTcpForwarding yes\n",
        at("host").display(),
        at("user.pub").display(),
    );
    std::fs::write(at("config"), config)?;

    let account = unprivileged(&[ACCOUNT])?;
    let mut command = Command::new(&server);
    command.env_clear().current_dir("/");
    if let Some(libraries) = libraries(&server) {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command.args(["-D", "-e", "-f"]).arg(at("config"));
    let user = match account {
        Some((user, group)) => {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711))?;
            for file in ["host", "user.pub", "config"] {
                chown(at(file), Some(user), Some(group))?;
            }
            command.uid(user).gid(group);
            ACCOUNT.to_owned()
        }
        None => own_name()?,
    };
    let server = Process::start("sshd", dir.path(), command)?;

    let mut command = Command::new(client);
    command
        .args(["-N", "-F", "/dev/null", "-i"])
        .arg(at("user"));
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
    let forward = format!("{door}:{}", site.upstream.addr);
    command.args(["-p", &dialled.port().to_string(), "-R", &forward]);
    command.arg(format!("{user}@{}", dialled.ip()));
    let client = Process::start("ssh", dir.path(), command)?;

    let entry = distance.hop(door, &mut held).await?;
    let target = site.bare(entry)?;
    let open = || async {
        server.check_running().await?;
        target.connect().await?.get(1).await
    };
    client
        .until(super::START, "ssh has opened its port", open)
        .await
        .with_context(|| server.log())?;
    let parts = vec![(Side::Relay, server.pid()), (Side::Agent, client.pid())];
    held.keep((client, server, dir));
    Ok(Route {
        target,
        kubectl: None,
        parts,
        _held: held,
    })
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
