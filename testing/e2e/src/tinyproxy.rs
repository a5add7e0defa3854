//! A real Tinyproxy.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::process::Process;
use crate::{eventually, free_address, tools};

pub struct Tinyproxy {
    pub process: Process,
    pub address: SocketAddr,
}

impl Tinyproxy {
    /// With further lines of configuration.
    pub async fn start(dir: &Path, more: &str) -> Result<Self> {
        let dir = dir.join("tinyproxy");
        std::fs::create_dir_all(&dir)?;
        let address = free_address()?;
        let config = format!(
            "Port {}\nListen {}\nTimeout 600\nMaxClients 100\nLogLevel Connect\n{more}\n",
            address.port(),
            address.ip(),
        );
        let file = dir.join("tinyproxy.conf");
        std::fs::write(&file, config)?;
        let mut command = Command::new(tools::find("tinyproxy")?);
        command.arg("-d").arg("-c").arg(&file);
        let process = Process::start("tinyproxy", &dir, command)?;
        eventually(Duration::from_secs(10), "Tinyproxy listens", || async {
            process.check_running().await?;
            match TcpStream::connect(address).await {
                Ok(_) => Ok(()),
                Err(error) => bail!("{error}: {}", process.log()),
            }
        })
        .await?;
        Ok(Self { process, address })
    }

    /// What it did, one line a step.
    pub fn accesses(&self) -> String {
        self.process.stdout() + &self.process.log()
    }
}
