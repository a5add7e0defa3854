//! A real nginx that ends TLS in front of a relay, as people run it.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::pki::Authority;
use crate::process::Process;
use crate::{eventually, tools};

pub struct Nginx {
    pub process: Process,
    /// The CA that agents and users must be given.
    pub ca_file: PathBuf,
    pub access_log: PathBuf,
}

impl Nginx {
    /// Listens on `listen`, forwards to `backend`, and cuts what is silent for `idle_seconds`.
    pub async fn start(
        dir: &Path,
        listen: SocketAddr,
        backend: SocketAddr,
        idle_seconds: u32,
    ) -> Result<Self> {
        let dir = dir.join("nginx");
        std::fs::create_dir_all(&dir)?;
        let authority = Authority::new("nginx's CA")?;
        let (certificate, key) = authority.server(&["localhost", "127.0.0.1"])?;
        let ca_file = dir.join("ca.pem");
        std::fs::write(&ca_file, authority.pem())?;
        std::fs::write(dir.join("cert.pem"), certificate)?;
        std::fs::write(dir.join("key.pem"), key)?;
        let root = dir.display();
        let config = format!(
            "daemon off;
             master_process off;
             worker_processes 1;
             pid {root}/nginx.pid;
             error_log stderr info;
             events {{ worker_connections 1024; }}
             http {{
               access_log {root}/access.log;
               client_body_temp_path {root}/body; proxy_temp_path {root}/proxy;
               fastcgi_temp_path {root}/fastcgi; uwsgi_temp_path {root}/uwsgi; scgi_temp_path {root}/scgi;
               map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
               server {{
                 listen {listen} ssl;
                 ssl_certificate {root}/cert.pem;
                 ssl_certificate_key {root}/key.pem;
                 ssl_protocols TLSv1.2 TLSv1.3;
                 location / {{
                   proxy_pass http://{backend};
                   proxy_http_version 1.1;
                   proxy_set_header Host $http_host;
                   proxy_set_header Upgrade $http_upgrade;
                   proxy_set_header Connection $connection_upgrade;
                   proxy_read_timeout {idle_seconds}s;
                   proxy_send_timeout {idle_seconds}s;
                 }}
               }}
             }}\n"
        );
        let file = dir.join("nginx.conf");
        std::fs::write(&file, config)?;
        let mut command = Command::new(tools::find("nginx")?);
        command
            .arg("-p")
            .arg(&dir)
            .arg("-c")
            .arg(&file)
            .args(["-e", "stderr"]);
        let process = Process::start("nginx", &dir, command)?;
        eventually(Duration::from_secs(10), "nginx listens", || async {
            process.check_running().await?;
            match TcpStream::connect(listen).await {
                Ok(_) => Ok(()),
                Err(error) => bail!("{error}: {}", process.log()),
            }
        })
        .await?;
        Ok(Self {
            process,
            ca_file,
            access_log: dir.join("access.log"),
        })
    }

    pub fn accesses(&self) -> String {
        std::fs::read_to_string(&self.access_log).unwrap_or_default()
    }
}
