//! A real Squid, as companies run it: with users, over TLS, and looking into TLS.

use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::pki::Authority;
use crate::process::{Process, unprivileged};
use crate::{eventually, free_address, tools, unique};

/// The user that [`Doors::known`] and [`Doors::over_tls`] let in.
pub const USER: &str = "ann";
/// Their password: what a URL, a header or a line of text could get wrong.
pub const PASSWORD: &str = "p@ss:w/rd%é #?";
/// The same as it stands in a URL.
pub const PASSWORD_IN_URL: &str = "p%40ss%3Aw%2Frd%25%C3%A9%20%23%3F";

/// Where it listens.
#[derive(Clone, Copy)]
pub struct Doors {
    /// Lets everyone through.
    pub open: SocketAddr,
    /// Lets [`USER`] through.
    pub known: SocketAddr,
    /// The same, and speaks TLS itself; its certificate is `localhost`'s.
    pub over_tls: SocketAddr,
    /// Lets everyone through, and ends their TLS to look into it.
    pub inspecting: SocketAddr,
}

pub struct Squid {
    pub process: Process,
    pub doors: Doors,
    /// The CA of [`Doors::over_tls`] and [`Doors::inspecting`].
    pub ca_file: PathBuf,
    place: Place,
}

impl Squid {
    /// It alone knows `name`, as an address of this machine, and trusts `upstream_ca` (PEM) on
    /// the connections that it makes while it inspects.
    pub async fn start(name: &str, upstream_ca: &str) -> Result<Self> {
        let doors = Doors {
            open: free_address()?,
            known: free_address()?,
            over_tls: free_address()?,
            inspecting: free_address()?,
        };
        let place = Place::new()?;
        place.furnish(name, upstream_ca, doors)?;
        place.make_certificate_store().await?;
        let this = Self {
            process: place.spawn()?,
            doors,
            ca_file: place.file("ca.pem"),
            place,
        };
        this.listens().await?;
        Ok(this)
    }

    /// Starts it with the same doors, after it was killed.
    pub async fn restart(&mut self) -> Result<()> {
        self.process = self.place.spawn()?;
        self.listens().await
    }

    async fn listens(&self) -> Result<()> {
        eventually(Duration::from_secs(20), "Squid listens", || async {
            self.process.check_running().await?;
            match TcpStream::connect(self.doors.open).await {
                Ok(_) => Ok(()),
                Err(error) => bail!("{error}: {}", self.log()),
            }
        })
        .await
    }

    /// One line a connection or request that ended.
    pub fn accesses(&self) -> String {
        std::fs::read_to_string(self.place.file("access.log")).unwrap_or_default()
    }

    /// What it logs of itself.
    pub fn log(&self) -> String {
        let own = std::fs::read_to_string(self.place.file("cache.log"));
        format!("{}{}", self.process.log(), own.unwrap_or_default())
    }
}

/// A directory, the program, and whom it runs as.
struct Place {
    binary: PathBuf,
    account: Option<(u32, u32)>,
    /// The prefix of its shared memory.
    service: String,
    dir: tempfile::TempDir,
}

impl Place {
    fn new() -> Result<Self> {
        Ok(Self {
            binary: std::fs::canonicalize(tools::find("squid")?)?,
            // Squid does not run as root, and another account cannot enter the stories' directory.
            account: unprivileged(&["proxy", "nobody"])?,
            service: unique("tl"),
            dir: tempfile::Builder::new()
                .prefix("throwline-squid-")
                .tempdir()?,
        })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn furnish(&self, name: &str, upstream_ca: &str, doors: Doors) -> Result<()> {
        let authority = Authority::new("Squid's CA")?;
        let (certificate, key) = authority.server(&["localhost"])?;
        for (file, text) in [
            ("ca.pem", authority.pem()),
            ("ca.key", &authority.key_pem()),
            ("cert.pem", &certificate),
            ("cert.key", &key),
            ("upstream.pem", upstream_ca),
            ("hosts", &format!("127.0.0.1 {name}\n")),
            ("users", &users()?),
            ("squid.conf", &self.config(doors)?),
        ] {
            std::fs::write(self.file(file), text)?;
        }
        // Its error pages are in a package of their own; it does without.
        std::fs::create_dir(self.file("errors"))?;
        self.give()
    }

    fn spawn(&self) -> Result<Process> {
        self.forget();
        let mut command = self.plain(&self.binary);
        command.args(["-N", "-n", &self.service, "-f"]);
        command.arg(self.file("squid.conf"));
        Process::start("squid", self.dir.path(), command)
    }

    /// Where its package lies: `/`, or where it was unpacked.
    fn package(&self) -> Result<&Path> {
        let package = self.binary.ancestors().nth(3);
        package.context("squid does not lie in usr/sbin")
    }

    fn config(&self, doors: Doors) -> Result<String> {
        let Doors {
            open,
            known,
            over_tls,
            inspecting,
        } = doors;
        let (dir, package) = (self.dir.path().display(), self.package()?.display());
        let (helpers, share) = (
            format!("{package}/usr/lib/squid"),
            format!("{package}/usr/share/squid"),
        );
        let (open_port, inspecting_port) = (open.port(), inspecting.port());
        let config = format!(
            "http_port {open}
             http_port {known}
             https_port {over_tls} tls-cert={dir}/cert.pem tls-key={dir}/cert.key
             http_port {inspecting} ssl-bump tls-cert={dir}/ca.pem tls-key={dir}/ca.key generate-host-certificates=on
             sslcrtd_program {helpers}/security_file_certgen -s {dir}/certificates -M 4MB
             sslcrtd_children 1 startup=1
             acl beginning at_step SslBump1
             ssl_bump peek beginning
             ssl_bump bump all
             tls_outgoing_options cafile={dir}/upstream.pem
             http_upgrade_request_protocols websocket allow all
             auth_param basic program {helpers}/basic_ncsa_auth {dir}/users
             auth_param basic children 1 startup=1
             auth_param basic realm squid
             acl without_user localport {open_port} {inspecting_port}
             acl with_user proxy_auth REQUIRED
             http_access allow without_user
             http_access allow with_user
             http_access deny all
             visible_hostname proxy.invalid
             hosts_file {dir}/hosts
             dns_nameservers 127.0.0.1
             pid_filename none
             cache deny all
             cache_mem 8 MB
             memory_cache_shared off
             sslproxy_session_cache_size 0
             cache_log {dir}/cache.log
             access_log stdio:{dir}/access.log
             cache_store_log none
             coredump_dir {dir}
             mime_table {share}/mime.conf
             icon_directory {share}/icons
             error_directory {dir}/errors
             err_page_stylesheet none
             unlinkd_program {helpers}/unlinkd
             pinger_enable off
             shutdown_lifetime 0 seconds\n"
        );
        // A line that begins with a space continues the one before.
        let lines = config.lines().map(str::trim_start);
        Ok(lines.flat_map(|line| [line, "\n"]).collect())
    }

    /// What the inspecting port keeps its certificates in.
    async fn make_certificate_store(&self) -> Result<()> {
        let maker = self.package()?.join("usr/lib/squid/security_file_certgen");
        let mut command = self.plain(&maker);
        command.args(["-c", "-s"]).arg(self.file("certificates"));
        command.args(["-M", "4MB"]);
        let output = command.output().await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "security_file_certgen: {error}");
        Ok(())
    }

    fn plain(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().current_dir("/");
        if let Some((user, group)) = self.account {
            command.uid(user).gid(group);
        }
        command
    }

    /// Makes what is there the account's own.
    fn give(&self) -> Result<()> {
        let Some((user, group)) = self.account else {
            return Ok(());
        };
        for entry in std::fs::read_dir(self.dir.path())? {
            chown(entry?.path(), Some(user), Some(group))?;
        }
        Ok(chown(self.dir.path(), Some(user), Some(group))?)
    }

    /// Removes the shared memory that it leaves behind.
    fn forget(&self) {
        for entry in std::fs::read_dir("/dev/shm")
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            if name.to_string_lossy().starts_with(&self.service) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.forget();
    }
}

/// htpasswd's file, with a salted hash that Squid's helper knows.
fn users() -> Result<String> {
    let salted = std::process::Command::new(tools::find("openssl")?)
        .args(["passwd", "-apr1", PASSWORD])
        .output()?;
    ensure!(salted.status.success(), "openssl passwd failed");
    Ok(format!("{USER}:{}", String::from_utf8(salted.stdout)?))
}
