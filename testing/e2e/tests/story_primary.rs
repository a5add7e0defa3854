//! The way to the database: the name behind which it moves, and the certificate that it shows.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use throwline_database::Database;
use throwline_e2e::environment::{USER, private_dir, said, throwline};
use throwline_e2e::metrics::Metrics;
use throwline_e2e::postgres::{self, OWNER, Postgres, ROLE};
use throwline_e2e::suite::Skipped;
use throwline_e2e::{Process, Relay, Suite, User, eventually, free_address, pki, tools};
use tokio::process::Command;

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    Suite::new()
        .story("a_new_primary_behind_its_name_is_followed", a_new_primary)
        .story("the_database_proves_itself_by_tls", by_tls)
        .run(|| async { Ok(()) })
}

/// A name, of which only what runs here knows the address: hosts(5) in a mount namespace.
struct Name {
    unshare: PathBuf,
    hosts: PathBuf,
}

impl Name {
    const NAME: &str = "db.throwline.test";

    async fn new(dir: &Path) -> Result<Self> {
        let this = Self {
            unshare: tools::find("unshare")?,
            hosts: dir.join("hosts"),
        };
        this.lead_to(IpAddr::from([127, 0, 0, 1]))?;
        let nothing = Command::new("true");
        let tried = this.inside(nothing.as_std()).output().await?;
        if !tried.status.success() {
            let why = format!("mount namespaces need root: {}", said(&tried));
            return Err(Skipped(why).into());
        }
        Ok(this)
    }

    /// In place: what is mounted is the file, not its name.
    fn lead_to(&self, address: IpAddr) -> Result<()> {
        let text = format!("127.0.0.1 localhost\n{address} {}\n", Self::NAME);
        Ok(std::fs::write(&self.hosts, text)?)
    }

    /// The same command, to be run where the name is known.
    fn inside(&self, command: &std::process::Command) -> Command {
        let mut inside = Command::new(&self.unshare);
        inside
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount --bind \"$0\" /etc/hosts && exec \"$@\"")
            .arg(&self.hosts)
            .arg(command.get_program())
            .args(command.get_args());
        let environment = command.get_envs();
        inside
            .env_clear()
            .envs(environment.filter_map(|(name, value)| Some((name, value?))))
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .kill_on_drop(true);
        inside
    }
}

/// The database's name leads to another address, at which the database now is: the registry's
/// connection and the authority's pool go there by themselves.
async fn a_new_primary(_: Arc<()>) -> Result<()> {
    let mut server = Postgres::with_role().await?;
    let dir = private_dir()?;
    let name = Name::new(dir.path()).await?;
    let port = server.address().port();
    let at = |last| IpAddr::from([127, 0, 0, last]);
    server.stop().await?;
    server.start_at(SocketAddr::new(at(21), port)).await?;
    name.lead_to(at(21))?;

    let (listen, admin) = (free_address()?, free_address()?);
    let url = format!(
        "postgres://{ROLE}@{}:{port}/throwline?sslmode=disable",
        Name::NAME
    );
    let state = dir.path().join("relay-state");
    let mut relay = throwline(&dir.path().join("home"))?;
    for (flag, value) in [
        ("--listen", listen.to_string()),
        (
            "--public-url",
            format!("https://localhost:{}", listen.port()),
        ),
        ("--state-dir", state.display().to_string()),
        ("--admin-listen", admin.to_string()),
        ("--database", url),
        ("--instance", "one".to_owned()),
        ("--peer-listen", "127.0.0.1:0".to_owned()),
    ] {
        if flag == "--listen" {
            relay.arg("relay");
        }
        relay.arg(flag).arg(value);
    }
    let relay = Process::start("relay", dir.path(), name.inside(relay.as_std()))?;
    let up = || async {
        relay.check_running().await?;
        let now = Metrics::of(admin).await?;
        ensure!(now.sum("throwline_relay_database_up", &[]) == 1.0);
        ensure!(now.sum("throwline_relay_database_owed_writes", &[]) == 0.0);
        Ok(())
    };
    eventually(PATIENCE, "the relay is at the database", up).await?;
    // By the database's own address: who runs this does not know its name.
    let token = async |server: &Postgres, user: &str| {
        let url = server.url(ROLE);
        let made = throwline(&dir.path().join("home"))?
            .args(["token", "create", "--user", user, "--database", &url])
            .arg("--state-dir")
            .arg(&state)
            .output()
            .await?;
        ensure!(made.status.success(), "{}", said(&made));
        anyhow::Ok(String::from_utf8(made.stdout)?.trim().to_owned())
    };
    User::login(dir.path(), "before", &token(&server, "before").await?, &[]).await?;

    server.stop().await?;
    eventually(PATIENCE, "the relay has noticed", || async {
        let now = Metrics::of(admin).await?;
        ensure!(now.sum("throwline_relay_database_up", &[]) == 0.0);
        Ok(())
    })
    .await?;
    name.lead_to(at(22))?;
    server.start_at(SocketAddr::new(at(22), port)).await?;
    eventually(PATIENCE, "the relay has followed the name", up).await?;
    let rows = server.sql(OWNER, "SELECT instance FROM relays").await?;
    ensure!(rows == "one", "{rows:?}");
    User::login(dir.path(), "after", &token(&server, "after").await?, &[]).await?;
    relay.stop(PATIENCE).await.map(drop)
}

/// `verify-full` requires a certificate of the right CA and for the name of the server.
async fn by_tls(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let dir = private_dir()?;
    let (ours, other) = (pki::Authority::new("ours")?, pki::Authority::new("other")?);
    let (certificate, key) = ours.server(&["localhost"])?;
    server.require_tls(&certificate, &key).await?;
    let file = |name: &str, authority: &pki::Authority| -> Result<String> {
        let file = dir.path().join(name);
        std::fs::write(&file, authority.pem())?;
        Ok(file.display().to_string())
    };
    let (ours, other) = (file("ours.pem", &ours)?, file("other.pem", &other)?);
    let url = |host: &str, mode: &str, ca: &str| {
        let port = server.address().port();
        format!("postgres://{ROLE}@{host}:{port}/throwline?sslmode={mode}&sslrootcert={ca}")
    };
    let good = url("localhost", "verify-full", &ours);
    let relay = Relay::start(dir.path(), &["--database", &good, "--instance", "one"]).await?;
    eventually(PATIENCE, "the relay is at the database", || async {
        let now = relay.metrics().await?;
        ensure!(now.sum("throwline_relay_database_up", &[]) == 1.0);
        Ok(())
    })
    .await?;
    let token = relay.token(&["--user", USER]).await?;
    User::login(dir.path(), USER, &token, &[]).await?;
    let sessions = format!(
        "SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = '{ROLE}'"
    );
    let all_by_tls = server.sql(OWNER, &sessions).await?;
    ensure!(all_by_tls == "t", "{all_by_tls:?}");
    for (refused, url) in [
        ("another CA", url("localhost", "verify-full", &other)),
        ("another CA", url("localhost", "verify-ca", &other)),
        ("another name", url("127.0.0.1", "verify-full", &ours)),
        ("no TLS", postgres::url(ROLE, server.address())),
    ] {
        let connected = Database::from_url(&url)?.connect().await;
        ensure!(connected.is_err(), "{refused} was accepted");
    }
    // Its name is not asked for by this mode.
    let lax = Database::from_url(&url("127.0.0.1", "verify-ca", &ours))?;
    lax.connect().await?;
    Ok(())
}
