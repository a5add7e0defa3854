//! OpenSSH as it is installed, for the ways that it carries: a server with one account and one key,
//! and clients of it. Its own defaults, so also its own choice of cipher.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use throwline_e2e::process::{Process, unprivileged};
use throwline_e2e::tools;
use tokio::process::Command;

/// The server's account when we are root: as root it would need a directory and a user that
/// only its package's installation makes.
const ACCOUNT: &str = "nobody";

/// As "OpenSSH_9.2p1 Debian-2".
pub(crate) fn version() -> anyhow::Result<String> {
    let output = std::process::Command::new(tools::find("ssh")?)
        .arg("-V")
        .output()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok(text.split(',').next().unwrap_or_default().trim().to_owned())
}

/// A server; it ends when it is dropped.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) access: Access,
}

/// What a client needs to sign in, also one of another process.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub(crate) struct Access {
    key: PathBuf,
    account: String,
}

impl Server {
    /// Starts one. Its keys and its configuration are written to `dir`, which other accounts must be
    /// able to enter. It may not listen yet.
    pub(crate) fn start(dir: &Path, listen: SocketAddr) -> anyhow::Result<Self> {
        let server = std::fs::canonicalize(tools::find("sshd")?)?;
        let keygen = tools::find("ssh-keygen")?;
        let at = |name: &str| dir.join(name);
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

        let mut command = Command::new(&server);
        command.env_clear().current_dir("/");
        if let Some(libraries) = libraries(&server) {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command.args(["-D", "-e", "-f"]).arg(at("config"));
        let account = match unprivileged(&[ACCOUNT])? {
            Some((user, group)) => {
                std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o711))?;
                for file in ["host", "user.pub", "config"] {
                    chown(at(file), Some(user), Some(group))?;
                }
                command.uid(user).gid(group);
                ACCOUNT.to_owned()
            }
            None => own_name()?,
        };
        Ok(Self {
            process: Process::start("sshd", dir, command)?,
            access: Access {
                key: at("user"),
                account,
            },
        })
    }
}

impl Access {
    /// Starts a client that dials this address and forwards as `forward` has it, such as
    /// `["-R", "8080:localhost:80"]`. Its output goes to files of its name in `dir`. It may not be
    /// connected yet.
    pub(crate) fn client(
        &self,
        name: &str,
        dir: &Path,
        dialled: SocketAddr,
        forward: [&str; 2],
    ) -> anyhow::Result<Process> {
        let mut command = Command::new(tools::find("ssh")?);
        command.args(["-N", "-F", "/dev/null", "-i"]).arg(&self.key);
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
        command.args(["-p", &dialled.port().to_string()]);
        command.args(forward);
        command.arg(format!("{}@{}", self.account, dialled.ip()));
        Process::start(name, dir, command)
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
