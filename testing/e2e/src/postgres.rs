//! A real PostgreSQL in a private directory, on a free port.

use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use throwline_authority::Authority;
use throwline_database::Database;
use tokio::process::Command;

use crate::process::{Process, unprivileged};
use crate::{eventually, free_address, tools};

/// The database's owner.
pub const OWNER: &str = "owner";
/// The relays' role, as docs/operating.md has it.
pub const ROLE: &str = "throwline_relay";

/// The SQL that the documentation gives to operators.
pub fn rights() -> Result<String> {
    let text = include_str!("../../../docs/operating.md");
    let (_, rest) = text
        .split_once("```sql\n")
        .context("no SQL in operating.md")?;
    let (rights, _) = rest.split_once("```").context("the SQL has no end")?;
    Ok(rights.to_owned())
}

/// Makes all tables, as "throwline database migrate" does; whether there was something to do.
pub async fn migrate(database: &Database) -> Result<bool> {
    let of_authority = Authority::migrate(database).await?;
    let of_relay = throwline_relay::registry::postgres::migrate(database).await?;
    Ok(of_authority || of_relay)
}

pub struct Postgres {
    process: Process,
    address: SocketAddr,
    /// The binaries' directory: it has psql and initdb too.
    binaries: PathBuf,
    account: Option<(u32, u32)>,
    dir: tempfile::TempDir,
}

impl Postgres {
    /// With one empty database, `throwline`, which every local role may enter without a password.
    pub async fn start() -> Result<Self> {
        let postgres = std::fs::canonicalize(tools::find("postgres")?)?;
        let binaries = postgres
            .parent()
            .context("a binary has a directory")?
            .to_owned();
        // PostgreSQL does not run as root.
        let account = unprivileged(&["postgres", "nobody"])?;
        let dir = tempfile::Builder::new().prefix("throwline-pg-").tempdir()?;
        if let Some((user, group)) = account {
            chown(dir.path(), Some(user), Some(group))?;
        }
        let data = dir.path().join("data");
        let mut initdb = plain(&binaries.join("initdb"), account);
        initdb.arg("-D").arg(&data).args([
            "-U",
            OWNER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]);
        let output = initdb.output().await?;
        ensure!(
            output.status.success(),
            "initdb failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let address = free_address()?;
        let process = spawn(dir.path(), &binaries, account, address)?;
        let this = Self {
            process,
            address,
            binaries,
            account,
            dir,
        };
        this.ready().await?;
        this.sql_in("postgres", OWNER, "CREATE DATABASE throwline")
            .await?;
        Ok(this)
    }

    /// The same with our tables, and the relays' own role.
    pub async fn with_role() -> Result<Self> {
        let this = Self::start().await?;
        migrate(&Database::from_url(&this.url(OWNER))?).await?;
        this.sql(OWNER, &rights()?).await?;
        Ok(this)
    }

    /// The URL for this role, without a password.
    pub fn url(&self, role: &str) -> String {
        url(role, self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Runs a text with psql as this role; what it prints, bare.
    pub async fn sql(&self, role: &str, text: &str) -> Result<String> {
        self.sql_in("throwline", role, text).await
    }

    async fn sql_in(&self, database: &str, role: &str, text: &str) -> Result<String> {
        let output = plain(&self.binaries.join("psql"), None)
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"])
            .args(["-h", &self.address.ip().to_string()])
            .args(["-p", &self.address.port().to_string()])
            .args(["-U", role, "-d", database, "-c", text])
            .output()
            .await?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "psql: {error}");
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// From now on it refuses connections without TLS, and shows this certificate.
    pub async fn require_tls(&self, certificate: &str, key: &str) -> Result<()> {
        let data = self.dir.path().join("data");
        for (name, text) in [
            ("server.crt", certificate),
            ("server.key", key),
            ("pg_hba.conf", "hostssl all all 127.0.0.1/8 trust\n"),
        ] {
            let file = data.join(name);
            std::fs::write(&file, text)?;
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600))?;
            if let Some((user, group)) = self.account {
                chown(&file, Some(user), Some(group))?;
            }
        }
        self.sql(OWNER, "ALTER SYSTEM SET ssl = on").await?;
        self.sql(OWNER, "SELECT pg_reload_conf()").await?;
        eventually(Duration::from_secs(30), "PostgreSQL speaks TLS", || async {
            let of_this = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
            let is_tls = self.sql(OWNER, of_this).await?;
            ensure!(is_tls == "t", "{is_tls}");
            Ok(())
        })
        .await
    }

    /// Stops it at once, as a crash of its machine would.
    pub async fn stop(&self) -> Result<()> {
        // Immediate shutdown: the postmaster ends its children too.
        self.process.signal(rustix::process::Signal::QUIT);
        self.process.ended(Duration::from_secs(20)).await?;
        Ok(())
    }

    /// Starts it again, here or at another address.
    pub async fn start_at(&mut self, address: SocketAddr) -> Result<()> {
        self.address = address;
        self.process = spawn(self.dir.path(), &self.binaries, self.account, address)?;
        self.ready().await
    }

    async fn ready(&self) -> Result<()> {
        eventually(Duration::from_secs(30), "PostgreSQL answers", || async {
            self.process.check_running().await?;
            self.sql_in("postgres", OWNER, "SELECT 1").await
        })
        .await
        .map(drop)
        .with_context(|| self.log())
    }
}

/// The URL for a role of a server at this address.
pub fn url(role: &str, address: SocketAddr) -> String {
    format!("postgres://{role}@{address}/throwline?sslmode=disable")
}

fn spawn(
    dir: &Path,
    binaries: &Path,
    account: Option<(u32, u32)>,
    address: SocketAddr,
) -> Result<Process> {
    let mut command = plain(&binaries.join("postgres"), account);
    command
        .arg("-D")
        .arg(dir.join("data"))
        .args(["-h", &address.ip().to_string()])
        .args(["-p", &address.port().to_string(), "-k"])
        .arg(dir)
        .args(["-c", "fsync=off"]);
    Process::start("postgres", dir, command)
}

fn plain(program: &Path, account: Option<(u32, u32)>) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").current_dir("/");
    if let Some((user, group)) = account {
        command.uid(user).gid(group);
    }
    command
}
