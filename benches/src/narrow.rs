//! Keystrokes and small commands beside bulk, on the link of a user's machine: slow, lossy or long.
//!
//! This process makes a network of namespaces and starts the others: the site, the user, and what
//! delays packets. It removes the network, with all processes in it, however it ends; only a kill takes
//! that away, and then the next run does it.

mod bulk;
mod cell;
mod figures;
mod link;
mod namespace;
mod network;
mod options;
mod path;
mod picture;
mod report;
mod site;
mod source;
mod table;
mod traffic;
mod typing;
mod user;
mod ways;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use throwline_e2e::environment::{private_dir, write_secret};
use throwline_e2e::tools;
use tokio::process::Command;
use tokio::signal::unix::{SignalKind, signal};

use self::link::ROUND_TRIP_MS;
use self::namespace::Namespace;
use self::network::Network;
use crate::helper::Helper;

pub(crate) use self::options::Options;

/// The file in the user's directory with what the site printed.
const SITE: &str = "site.json";
/// What the network is made with.
const TOOLS: [&str; 5] = ["ip", "tc", "iptables", "ethtool", "nsenter"];

/// The processes of a run beside the first one.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Part {
    Path,
    Site {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        ssh_dir: PathBuf,
    },
    User {
        /// The process that has made the network.
        #[arg(long)]
        owner: u32,
        /// With what the site printed.
        #[arg(long)]
        dir: PathBuf,
        #[command(flatten)]
        options: Box<Options>,
    },
}

pub(crate) async fn serve(part: Part) -> anyhow::Result<()> {
    match part {
        Part::Path => path::serve(network::DELAYED, Duration::from_millis(ROUND_TRIP_MS)),
        Part::Site { dir, ssh_dir } => site::serve(&dir, &ssh_dir).await,
        Part::User {
            owner,
            dir,
            options,
        } => {
            let site = std::fs::read_to_string(dir.join(SITE))?;
            let site = serde_json::from_str(&site).context("what the site printed")?;
            user::run(&options, owner, &site, &dir).await
        }
    }
}

pub(crate) async fn run(options: &Options) -> anyhow::Result<()> {
    options.cells()?;
    options.ways()?;
    for tool in TOOLS {
        if tools::find(tool).is_err() {
            bail!("{tool} is missing: run cargo xtask install --peers as root");
        }
    }
    // From here on a signal ends this process in its own time.
    let mut signals = Vec::new();
    for kind in [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
    ] {
        signals.push(signal(kind)?);
    }
    let signalled = futures::future::select_all(signals.iter_mut().map(|it| Box::pin(it.recv())));

    // They go last, when no process writes to them.
    let dirs = Dirs::make()?;
    Namespace::remove_abandoned()?;
    let network = Network::of(std::process::id());
    let mut made = Made(Some(&network));
    let outcome = tokio::select! {
        outcome = inside(&network, &dirs, options) => outcome,
        _ = signalled => Err(anyhow::anyhow!("interrupted")),
    };
    outcome.and(made.remove())
}

/// Removes the network, also where this process panics.
struct Made<'a>(Option<&'a Network>);

impl Made<'_> {
    fn remove(&mut self) -> anyhow::Result<()> {
        let removed = self.0.take().map_or(Ok(()), Network::remove);
        removed.context("not all namespaces were removed (ip netns list)")
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            eprintln!("{error:#}");
        }
    }
}

/// Where the processes write.
struct Dirs {
    site: tempfile::TempDir,
    user: tempfile::TempDir,
    /// For an account that cannot enter the others.
    ssh: tempfile::TempDir,
}

impl Dirs {
    fn make() -> anyhow::Result<Self> {
        let ssh = tempfile::Builder::new()
            .prefix("throwline-bench-ssh-")
            .permissions(std::fs::Permissions::from_mode(0o711))
            .tempdir()?;
        Ok(Self {
            site: private_dir()?,
            user: private_dir()?,
            ssh,
        })
    }
}

/// The whole run in the network that it makes first.
async fn inside(network: &Network, dirs: &Dirs, options: &Options) -> anyhow::Result<()> {
    network.make(options.congestion_control.as_deref())?;
    let program = std::env::current_exe()?;
    let within = |namespace: &Namespace| -> anyhow::Result<Command> {
        Ok(Command::from(namespace.command(&program)?))
    };
    let _path = Helper::start_by(within(&network.path)?, &["narrow-part", "path"]).await?;

    let (dir, ssh_dir) = (shown(dirs.site.path())?, shown(dirs.ssh.path())?);
    let arguments = ["narrow-part", "site", "--dir", dir, "--ssh-dir", ssh_dir];
    let (_site, site) = Helper::start_by(within(&network.site)?, &arguments)
        .await
        .context("the site")?;
    // Not an argument: it has a token.
    write_secret(&dirs.user.path().join(SITE), &site)?;

    let owner = std::process::id().to_string();
    let mut user = within(&network.user)?;
    user.args(["narrow-part", "user", "--owner", &owner]);
    user.args(["--dir", shown(dirs.user.path())?]);
    // Its options are those of this process, behind the name of the command.
    user.args(std::env::args_os().skip_while(|it| it != "narrow").skip(1));
    let status = user.kill_on_drop(true).status().await?;
    if !status.success() {
        bail!("narrow links were not measured as a whole ({status}): see above");
    }
    Ok(())
}

fn shown(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a directory whose name is not text")
}
