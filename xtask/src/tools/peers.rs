//! What Throwline is measured beside. Only benches drive these, and do without.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{apt_install, unpack};
use crate::run;

struct Peer {
    name: &'static str,
    /// Inside `.tools`, where we put it.
    inside: &'static str,
    by_hand: &'static str,
}

const SSH: &str = "by hand: install the packages openssh-client and openssh-server";

const PEERS: [Peer; 5] = [
    Peer {
        name: "ssh",
        inside: "openssh-client/usr/bin/ssh",
        by_hand: SSH,
    },
    Peer {
        name: "ssh-keygen",
        inside: "openssh-client/usr/bin/ssh-keygen",
        by_hand: SSH,
    },
    Peer {
        name: "sshd",
        inside: "openssh-server/usr/sbin/sshd",
        by_hand: SSH,
    },
    Peer {
        name: "rathole",
        inside: "rathole/bin/rathole",
        by_hand: "by hand: put a rathole with TLS and WebSocket on the path",
    },
    Peer {
        name: "wstunnel",
        inside: "wstunnel/bin/wstunnel",
        by_hand: "by hand: put wstunnel on the path",
    },
];

/// What `bench narrow` makes its network with, and the package that holds each. They are of use to root
/// alone, so they are installed for real.
const NETWORK: [(&str, &str); 5] = [
    ("ip", "iproute2"),
    ("tc", "iproute2"),
    ("iptables", "iptables"),
    ("ethtool", "ethtool"),
    ("nsenter", "util-linux"),
];

impl Peer {
    fn present(&self, dir: &Path) -> Option<PathBuf> {
        let ours = dir.join(self.inside);
        run::on_path(self.name).or_else(|| Some(ours).filter(|file| file.is_file()))
    }

    fn fetch(&self, dir: &Path) -> Result<()> {
        match self.name {
            "rathole" => rathole(dir),
            // Neither crates.io nor Debian has it.
            "wstunnel" => bail!("it is not fetched"),
            "sshd" => {
                let target = dir.join("openssh-server");
                // Linked by it, and on few machines; it lies beside it and is looked for there.
                unpack(dir, "libwrap0", &target)?;
                unpack(dir, "openssh-server", &target)
            }
            _ => unpack(dir, "openssh-client", &dir.join("openssh-client")),
        }
    }
}

/// Those that are there, each with its place.
pub(super) fn present(dir: &Path) -> impl Iterator<Item = (&'static str, PathBuf)> {
    PEERS
        .iter()
        .filter_map(move |peer| Some((peer.name, peer.present(dir)?)))
}

/// Fetches those that are not there; what could not be fetched is printed, and is no failure.
pub(crate) fn install(root: &Path) -> Result<()> {
    install_some(root, |_| true)
}

/// The same for `bench narrow` alone: OpenSSH, and what its network is made with.
pub(crate) fn install_narrow(root: &Path) -> Result<()> {
    install_some(root, |peer| peer.name.starts_with("ssh"))?;
    for (name, package) in NETWORK {
        if run::on_path(name).is_none()
            && let Err(error) = apt_install(package)
        {
            println!("missing: {name}: {error:#}; by hand: install the package {package}");
        }
    }
    Ok(())
}

fn install_some(root: &Path, is_wanted: fn(&Peer) -> bool) -> Result<()> {
    let dir = root.join(".tools");
    std::fs::create_dir_all(&dir).with_context(|| format!("could not make {}", dir.display()))?;
    for peer in PEERS.iter().filter(|peer| is_wanted(peer)) {
        if peer.present(&dir).is_some() {
            continue;
        }
        if let Err(error) = peer.fetch(&dir) {
            println!("missing: {}: {error:#}; {}", peer.name, peer.by_hand);
        }
    }
    Ok(())
}

/// From crates.io, with the parts that the benches use. Not by its own lock file, whose `time`
/// today's compilers reject.
fn rathole(dir: &Path) -> Result<()> {
    const PARTS: &str = "server,client,websocket";
    let from = ["rathole", "--version", "0.5.0"];
    let parts = ["--no-default-features", "--features", PARTS];
    build(dir, "rathole", &[&from[..], &parts].concat())
}

/// Has cargo install it into `.tools/NAME`.
fn build(dir: &Path, name: &str, arguments: &[&str]) -> Result<()> {
    let mut build = run::cargo(dir);
    build.arg("install").args(arguments);
    build.arg("--root").arg(dir.join(name));
    if !run::shown(&mut build)? {
        bail!("it could not be fetched or built");
    }
    Ok(())
}
