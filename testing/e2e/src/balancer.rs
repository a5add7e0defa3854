//! Real balancers in front of relays, run by the very files of `deploy/balancers`.
//!
//! What a file names by way of example (addresses, ports, paths, limits) is replaced by what a
//! test has, see `Site::placeholders`; a file that no longer holds one of these texts fails.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::pki::Authority;
use crate::process::Process;
use crate::{eventually, tools};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Product {
    Haproxy,
    Nginx,
    Envoy,
}

/// Who ends TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Terminate,
    Passthrough,
}

/// Where a balancer stands.
#[derive(Debug, Clone)]
pub struct Site {
    pub dir: PathBuf,
    pub mode: Mode,
    pub listen: SocketAddr,
    /// All with one port, and with one for their admin listeners.
    pub relays: [SocketAddr; 3],
    pub admin_port: u16,
    /// From where relays see the balancer come.
    pub source: IpAddr,
    /// What may be silent for how long.
    pub idle_seconds: u32,
}

/// A running one.
pub struct Balancer {
    pub process: Process,
    product: Product,
    site: Site,
    config: PathBuf,
}

impl Product {
    fn name(self) -> &'static str {
        match self {
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    fn extension(self) -> &'static str {
        match self {
            Self::Haproxy => "cfg",
            Self::Nginx => "conf",
            Self::Envoy => "yaml",
        }
    }
}

impl Site {
    /// Makes the certificate that a balancer shows, and the CA that signed it.
    pub fn prepare(&self) -> Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let authority = Authority::new("the balancer's CA")?;
        let (certificate, key) = authority.server(&["localhost", "127.0.0.1"])?;
        std::fs::write(self.ca_file(), authority.pem())?;
        std::fs::write(self.file("pem"), format!("{certificate}{key}"))?;
        std::fs::write(self.file("key"), key)?;
        Ok(())
    }

    /// The CA that agents and users must be given where the balancer ends TLS.
    pub fn ca_file(&self) -> PathBuf {
        self.dir.join("ca.pem")
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("relay.example.com.{extension}"))
    }

    /// The product's file with what this site has.
    fn config(&self, product: Product) -> Result<String> {
        let mode = match self.mode {
            Mode::Terminate => "terminate",
            Mode::Passthrough => "passthrough",
        };
        let name = format!("{}-{mode}.{}", product.name(), product.extension());
        let file = tools::root().join("deploy/balancers").join(&name);
        let mut text =
            std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        for (example, ours) in self.placeholders(product)? {
            ensure!(text.contains(&example), "{name} does not hold {example:?}");
            text = text.replace(&example, &ours);
        }
        Ok(text)
    }

    /// Each text of a file that a test replaces, and what it puts there.
    fn placeholders(&self, product: Product) -> Result<Vec<(String, String)>> {
        let mut all: Vec<(String, String)> = Vec::new();
        let mut put = |example: &str, ours: &dyn std::fmt::Display| {
            all.push((example.to_owned(), ours.to_string()));
        };
        let (ip, port) = (self.listen.ip(), self.listen.port());
        let (source, idle, root) = (self.source, self.idle_seconds, self.dir.display());
        let relay_port = self.relays[0].port();
        for (number, relay) in (1..).zip(&self.relays) {
            ensure!(relay.port() == relay_port, "relays have different ports");
            put(&format!("relay-{number}.internal"), &relay.ip());
        }
        let is_terminating = self.mode == Mode::Terminate;
        match product {
            Product::Haproxy => {
                put("bind :443", &format!("bind {ip}:{port}"));
                put(":8443", &format!(":{relay_port}"));
                put("port 9090", &format!("port {}", self.admin_port));
                put("source 0.0.0.0", &format!("source {source}"));
                put("timeout tunnel 60s", &format!("timeout tunnel {idle}s"));
                // More than an ordinary account may have descriptors for.
                put("maxconn 50000", &"maxconn 500");
                if is_terminating {
                    put("/etc/haproxy", &root);
                }
            }
            Product::Nginx => {
                put("listen 443", &format!("listen {ip}:{port}"));
                put(":8443", &format!(":{relay_port}"));
                put("proxy_bind off", &format!("proxy_bind {source}"));
                put("/run/nginx.pid", &format!("{root}/nginx.pid"));
                put("/var/log/nginx", &root);
                // There is no master process to change it, nor perhaps such a user.
                put("user www-data;\n", &"");
                if is_terminating {
                    put("read_timeout 60s", &format!("read_timeout {idle}s"));
                    put("send_timeout 60s", &format!("send_timeout {idle}s"));
                    put("/etc/nginx", &root);
                    // A package compiles directories in that are not there without it.
                    put("http {", &format!("http {{{}", temporary(&self.dir)));
                } else {
                    put("proxy_timeout 60s", &format!("proxy_timeout {idle}s"));
                    let modules = self.dir.join("modules-enabled");
                    put("/etc/nginx/modules-enabled", &modules.display());
                }
            }
            Product::Envoy => {
                let (any, ours) = ("address: 0.0.0.0, port_value:", "port_value:");
                put(
                    &format!("{any} 443"),
                    &format!("address: {ip}, {ours} {port}"),
                );
                put(&format!("{any} 0"), &format!("address: {source}, {ours} 0"));
                put("port_value: 8443", &format!("port_value: {relay_port}"));
                put(
                    "port_value: 9090",
                    &format!("port_value: {}", self.admin_port),
                );
                put("idle_timeout: 60s", &format!("idle_timeout: {idle}s"));
                if is_terminating {
                    put("/etc/envoy", &root);
                }
            }
        }
        Ok(all)
    }
}

fn temporary(dir: &Path) -> String {
    let mut text = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = write!(text, "\n    {kind}_temp_path {}/{kind};", dir.display());
    }
    text
}

impl Balancer {
    /// Starts it at a site that was prepared, and waits until it listens.
    pub async fn start(product: Product, site: &Site) -> Result<Self> {
        let config = site.dir.join(format!("balancer.{}", product.extension()));
        std::fs::write(&config, site.config(product)?)?;
        if product == Product::Nginx && site.mode == Mode::Passthrough {
            load_stream(&site.dir.join("modules-enabled"))?;
        }
        let process = spawn(product, site, &config)?;
        let this = Self {
            process,
            product,
            site: site.clone(),
            config,
        };
        this.listens().await?;
        Ok(this)
    }

    /// The same again, after its process was killed.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = spawn(self.product, &self.site, &self.config)?;
        self.listens().await
    }

    /// HAProxy's reload: a new process takes the listener, the old one keeps its connections.
    pub async fn reload(&self) -> Result<()> {
        ensure!(self.product == Product::Haproxy, "only HAProxy can, here");
        let loaded = || self.process.log().matches("Loading success").count();
        let before = loaded();
        self.process.signal(Signal::USR2);
        eventually(Duration::from_secs(20), "HAProxy has reloaded", || async {
            ensure!(loaded() > before, "{}", self.process.log());
            Ok(())
        })
        .await
    }

    /// SIGKILL, to all of it.
    pub async fn kill(&self) -> Result<()> {
        let pid = self.process.pid();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        self.process.kill().await?;
        // HAProxy's worker notices the end of its master, but not at once.
        for child in children.split_whitespace() {
            if let Some(child) = child.parse().ok().and_then(Pid::from_raw) {
                // It may have noticed.
                let _ = rustix::process::kill_process(child, Signal::KILL);
            }
        }
        eventually(Duration::from_secs(20), "nobody listens", || async {
            ensure!(TcpStream::connect(self.site.listen).await.is_err());
            Ok(())
        })
        .await
    }

    async fn listens(&self) -> Result<()> {
        let limit = Duration::from_secs(20);
        eventually(limit, "the balancer listens", || async {
            self.process.check_running().await?;
            match TcpStream::connect(self.site.listen).await {
                Ok(_) => Ok(()),
                Err(error) => bail!("{error}: {}", self.process.log()),
            }
        })
        .await
    }
}

/// Where the stream module is a separate file, nginx has to be configured to load it.
fn load_stream(dir: &Path) -> Result<()> {
    let module = tools::find("nginx-stream")?;
    std::fs::create_dir_all(dir)?;
    if module
        .extension()
        .is_some_and(|extension| extension == "so")
    {
        let line = format!("load_module {};\n", module.display());
        std::fs::write(dir.join("stream.conf"), line)?;
    }
    Ok(())
}

fn spawn(product: Product, site: &Site, config: &Path) -> Result<Process> {
    let mut command = Command::new(tools::find(product.name())?);
    match product {
        // With a master, which a reload needs; its worker ends with it.
        Product::Haproxy => command.arg("-W").arg("-f").arg(config),
        // In one process, so that nothing outlives it when it is killed.
        Product::Nginx => command
            .arg("-p")
            .arg(&site.dir)
            .arg("-c")
            .arg(config)
            .args(["-e", "stderr", "-g", "daemon off; master_process off;"]),
        Product::Envoy => command
            .arg("-c")
            .arg(config)
            .args(["--disable-hot-restart", "--concurrency", "1"])
            .args(["--log-level", "info"]),
    };
    Process::start(product.name(), &site.dir, command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_its_placeholders_and_nothing_of_the_example_is_left() {
        for mode in [Mode::Terminate, Mode::Passthrough] {
            let site = Site {
                dir: PathBuf::from("/site"),
                mode,
                listen: "127.0.0.1:1".parse().unwrap(),
                relays: [2, 3, 4].map(|last| SocketAddr::from(([127, 0, 0, last], 5))),
                admin_port: 6,
                source: IpAddr::from([127, 0, 0, 7]),
                idle_seconds: 8,
            };
            for product in [Product::Haproxy, Product::Nginx, Product::Envoy] {
                let text = site.config(product).unwrap();
                let settings = text
                    .lines()
                    .filter(|line| !line.trim_start().starts_with('#'));
                for line in settings {
                    for example in [".internal", "8443", "9090", "60s", "/etc/", "0.0.0.0"] {
                        assert!(!line.contains(example), "{product:?}, {mode:?}: {line}");
                    }
                }
            }
        }
    }
}
