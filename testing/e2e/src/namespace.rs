//! A network namespace for a process: changes to its link affect no other process.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use tokio::process::Command;

use crate::suite::Skipped;
use crate::{tools, unique};

/// A network namespace with one link to this one; both go with it.
pub struct Namespace {
    ip: PathBuf,
    name: String,
    near: String,
    far: String,
    /// Of this end.
    pub address: Ipv4Addr,
}

impl Namespace {
    pub async fn new() -> Result<Self> {
        let ip = tools::find("ip")?;
        let name = unique("tl");
        // 15 bytes at most for a link's name, and one /29 for each process of this test.
        let tail = &name[name.len().saturating_sub(10)..];
        let (near, far) = (format!("tn{tail}"), format!("tf{tail}"));
        let [_, a, b, c] = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(
            10,
            128 | (a << 6) | (b >> 2),
            (b << 6) | (c >> 2),
            (c << 6) | 1,
        );
        let there = Ipv4Addr::from(u32::from(address) + 1);
        let this = Self {
            ip,
            name,
            near: near.clone(),
            far: far.clone(),
            address,
        };
        if let Err(error) = this.run(&["netns", "add", &this.name]).await {
            return Err(error.context(Skipped("network namespaces need root".into())));
        }
        let name = this.name.as_str();
        let link = [
            "link", "add", &near, "type", "veth", "peer", "name", &far, "netns", name,
        ];
        this.run(&link).await?;
        let near_address = format!("{address}/29");
        this.run(&["addr", "add", &near_address, "dev", &near])
            .await?;
        this.run(&["link", "set", &near, "up"]).await?;
        let far_address = format!("{there}/29");
        let add = ["-n", name, "addr", "add", &far_address, "dev", &far];
        this.run(&add).await?;
        this.run(&["-n", name, "link", "set", &far, "up"]).await?;
        this.run(&["-n", name, "link", "set", "lo", "up"]).await?;
        Ok(this)
    }

    /// Takes the link `up` or `down`.
    pub async fn link(&self, state: &str) -> Result<()> {
        self.run(&["link", "set", &self.near, state]).await
    }

    /// The other end gets the address number `number` of its network, 2 to 6, instead of `before`.
    pub async fn readdress(&self, before: u32, number: u32) -> Result<()> {
        let name = self.name.as_str();
        for (what, number) in [("del", before), ("add", number)] {
            let address = Ipv4Addr::from(u32::from(self.address) + number - 1);
            let address = format!("{address}/29");
            let change = ["-n", name, "addr", what, &address, "dev", &self.far];
            self.run(&change).await?;
        }
        Ok(())
    }

    /// The same command, to be run there.
    pub fn inside(&self, command: &std::process::Command) -> Command {
        let mut inside = Command::new(&self.ip);
        inside
            .args(["netns", "exec", &self.name])
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear()
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            );
        inside
    }

    async fn run(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.ip).args(arguments).output().await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "ip {}: {error}",
            arguments.join(" ")
        );
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The link's other end goes with its namespace.
        let _ = std::process::Command::new(&self.ip)
            .args(["netns", "delete", &self.name])
            .status();
    }
}
