//! Relays that share a real PostgreSQL.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use throwline_authority::{Authority, Subject};
use throwline_certs::PendingIdentity;
use throwline_certs::directory::RedeemError;
use throwline_certs::enrol::Asker;
use throwline_database::Database;
use throwline_e2e::environment::{CLUSTER, USER, no_cluster, private_dir, said, throwline};
use throwline_e2e::forwarder::Forwarder;
use throwline_e2e::postgres::{self, OWNER, Postgres, ROLE};
use throwline_e2e::{Agent, Relay, Suite, User, contains, eventually, free_address, lacks};
use throwline_relay::registry::postgres::{Config, Postgres as Shared};
use throwline_relay::registry::{Presence, Registry};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    Suite::new()
        .story("the_minimal_role_works_and_may_not_more", the_minimal_role)
        .story(
            "tables_of_one_set_for_all_are_taken_over",
            tables_are_taken_over,
        )
        .story("one_ca_for_all", one_ca_for_all)
        .story("one_of_fifty_redeems", one_of_fifty_redeems)
        .story("relays_share_who_is_who_and_where", relays_share)
        .story("an_outage_is_lived_through_and_a_move_followed", an_outage)
        .story("two_relays_of_one_name_are_told", two_of_one_name)
        .story("a_notice_of_a_stranger_is_not_believed", strange_notices)
        .run(|| async { Ok(()) })
}

async fn the_minimal_role(_: Arc<()>) -> Result<()> {
    let server = Postgres::start().await?;
    let dir = private_dir()?;
    server
        .sql(OWNER, "CREATE ROLE throwline_relay LOGIN")
        .await?;
    // Nothing is there yet, and the role may not make it: the error has the remedy.
    let role = Database::from_url(&server.url(ROLE))?;
    let error = match Authority::migrate(&role).await {
        Ok(_) => bail!("the role made the tables"),
        Err(error) => error.to_string(),
    };
    contains(&error, "throwline database migrate")?;
    let url = server.url(OWNER);
    let output = throwline(dir.path())?
        .args(["database", "migrate", "--database", &url])
        .output()
        .await?;
    ensure!(output.status.success(), "{}", said(&output));
    server
        .sql(
            OWNER,
            &postgres::rights()?.replace("CREATE ROLE throwline_relay LOGIN;", ""),
        )
        .await?;
    let relay = Relay::start(dir.path(), &["--database", &server.url(ROLE)]).await?;
    let token = relay.token(&["--user", USER]).await?;
    User::login(dir.path(), USER, &token, &[]).await?;
    for forbidden in [
        "CREATE TABLE more (x int)",
        "DROP TABLE tokens",
        "DELETE FROM tokens",
        "UPDATE tokens SET name = 'root'",
        "DELETE FROM revocations",
        "UPDATE certificates SET not_after = 0",
        "UPDATE certificates SET name = 'root'",
        "DELETE FROM clusters",
        "DELETE FROM settings",
        "UPDATE tunnels SET cluster = 'other'",
        "DELETE FROM authority_migrations",
        "DELETE FROM relay_migrations",
    ] {
        let refused = server.sql(ROLE, forbidden).await;
        ensure!(refused.is_err(), "the role may: {forbidden}");
    }
    Ok(())
}

/// The migrations while authority and relay had one set: name, and text as it was.
const OLD_SET: [(&str, &str); 3] = [
    ("shared", include_str!("old_schema/0001_shared.sql")),
    ("renewals", include_str!("old_schema/0002_renewals.sql")),
    (
        "revocations",
        include_str!("old_schema/0003_revocations.sql"),
    ),
];

/// The tables as a relay of that time left them, at each version.
async fn old_tables(version: usize) -> Result<Postgres> {
    let server = Postgres::start().await?;
    let record = "CREATE TABLE _sqlx_migrations (
            version BIGINT PRIMARY KEY, description TEXT NOT NULL,
            installed_on TIMESTAMPTZ NOT NULL DEFAULT now(), success BOOLEAN NOT NULL,
            checksum BYTEA NOT NULL, execution_time BIGINT NOT NULL)";
    server.sql(OWNER, record).await?;
    for (at, (name, text)) in OLD_SET.iter().take(version).enumerate() {
        server.sql(OWNER, text).await?;
        let number = at + 1;
        let applied = format!(
            "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
             VALUES ({number}, '{name}', true, sha384(convert_to($file${text}$file$, 'UTF8')), 1)"
        );
        server.sql(OWNER, &applied).await?;
    }
    let rows = "INSERT INTO settings VALUES ('relay-url', 'https://relay.example.com/');
        INSERT INTO clusters (name, created_at) VALUES ('prod', 1);
        INSERT INTO relays VALUES ('one', '127.0.0.1:1', '0.1.0', 1, now(), false);
        INSERT INTO tunnels (relay, carrier, cluster, agent_instance, since)
            VALUES ('one', 1, 'prod', 'a', 1)";
    server.sql(OWNER, rows).await?;
    Ok(server)
}

async fn tables_are_taken_over(_: Arc<()>) -> Result<()> {
    for version in 1..=OLD_SET.len() {
        let server = old_tables(version).await?;
        let owner = Database::from_url(&server.url(OWNER))?;
        ensure!(postgres::migrate(&owner).await?, "{version}");
        ensure!(!postgres::migrate(&owner).await?, "{version} again");
        for (table, all) in [
            ("authority_migrations", "1 2 3"),
            ("relay_migrations", "1 2 3"),
        ] {
            let select =
                format!("SELECT string_agg(version::text, ' ' ORDER BY version) FROM {table}");
            let recorded = server.sql(OWNER, &select).await?;
            ensure!(recorded == all, "{table} of {version}: {recorded}");
        }
        // What was there is still there, and in the form of today.
        let kept =
            "SELECT (SELECT value FROM settings) || ' ' || name || ' ' || cluster || certificate
                    FROM clusters, tunnels";
        let kept = server.sql(OWNER, kept).await?;
        ensure!(kept == "https://relay.example.com/ prod prod", "{kept}");
        ensure!(
            server
                .sql(OWNER, "SELECT count(*) FROM revocations")
                .await?
                == "0"
        );
    }
    // The role of a relay may not take them over, and can use the newest all the same.
    let server = old_tables(OLD_SET.len()).await?;
    let rights = postgres::rights()?;
    let rights = rights.replace("authority_migrations, relay_migrations", "_sqlx_migrations");
    server.sql(OWNER, &rights).await?;
    let role = Database::from_url(&server.url(ROLE))?;
    ensure!(!postgres::migrate(&role).await?);
    let own = "SELECT to_regclass('authority_migrations') IS NULL";
    ensure!(server.sql(OWNER, own).await? == "t");
    // A database of a version that is not known here is left alone.
    let server = old_tables(OLD_SET.len()).await?;
    let newer = "INSERT INTO _sqlx_migrations VALUES (4, 'more', now(), true, '', 1)";
    server.sql(OWNER, newer).await?;
    let owner = Database::from_url(&server.url(OWNER))?;
    let error = postgres::migrate(&owner).await.err();
    contains(&format!("{error:?}"), "newer version")?;
    Ok(())
}

async fn one_ca_for_all(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let database = Some(Database::from_url(&server.url(ROLE))?);
    let url = "https://relay.example.com".parse()?;
    let dir = private_dir()?;
    let open = |name: &str| {
        let builder = Authority::builder(&dir.path().join(name));
        builder.database(database.clone())
    };
    // Two at once on an empty database: one makes the CA, and the error of the other is to copy it.
    let (one, two) = tokio::join!(
        open("a").open_or_create(&url),
        open("b").open_or_create(&url)
    );
    let (made, refused, state) = match (one, two) {
        (Ok(made), Err(refused)) => (made, refused, "a"),
        (Err(refused), Ok(made)) => (made, refused, "b"),
        (one, two) => bail!("not one of two: {one:?} {two:?}"),
    };
    ensure!(made.was_created());
    contains(&refused.to_string(), "holds no CA")?;
    contains(&refused.to_string(), "copy ca.pem and ca.key")?;
    Authority::open_or_create(&dir.path().join("other"), &url).await?;
    let refused = open("other").open_or_create(&url).await;
    contains(
        &format!("{:#}", refused.err().context("it was let in")?),
        "another CA",
    )?;
    std::fs::create_dir(dir.path().join("copy"))?;
    for file in ["ca.pem", "ca.key"] {
        std::fs::copy(
            dir.path().join(state).join(file),
            dir.path().join("copy").join(file),
        )?;
    }
    let copy = open("copy").open_or_create(&url).await?;
    ensure!(copy.roots() == made.roots() && !copy.was_created());
    // The key is not in the database: nothing there is as long.
    let dump = server
        .sql(OWNER, "SELECT string_agg(value, ' ') FROM settings")
        .await?;
    lacks(&dump, "PRIVATE KEY")?;
    Ok(())
}

async fn one_of_fifty_redeems(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let database = Some(Database::from_url(&server.url(ROLE))?);
    let dir = private_dir()?;
    let url = "https://relay.example.com".parse()?;
    let builder = Authority::builder(dir.path()).database(database);
    let (one, two) = (
        builder.clone().open_or_create(&url).await?,
        builder.open().await?,
    );
    let subject = Subject::Cluster(CLUSTER.into());
    let token = one
        .create_token(&subject, Duration::from_secs(60), &url)
        .await?;
    let tries = (0..50).map(|number| {
        let authority = if number % 2 == 0 { &one } else { &two }.clone();
        let token = token.clone();
        tokio::spawn(async move {
            let csr = PendingIdentity::generate()?.csr_pem();
            let asker = Asker::Cluster {
                uid: "one-of-fifty".to_owned(),
            };
            let request = token.request(&asker, csr)?;
            Ok::<_, anyhow::Error>(authority.redeem(&request).await)
        })
    });
    let (mut won, mut late) = (0, 0);
    for tried in tries.collect::<Vec<_>>() {
        match tried.await?? {
            Ok(_) => won += 1,
            Err(RedeemError::AlreadyRedeemed { .. }) => late += 1,
            Err(error) => bail!("{error}"),
        }
    }
    ensure!((won, late) == (1, 49), "{won} won, {late} were late");
    Ok(())
}

/// Two processes with one `--instance`: the later one has the name, the earlier one logs it, and
/// has it back when the later one has gone.
async fn two_of_one_name(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let url = server.url(ROLE);
    let start = |port: u16| {
        let mut config = Config::new("same".into(), format!("127.0.0.1:{port}"));
        config.heartbeat = Duration::from_millis(300);
        let metrics = prometheus::Registry::new();
        let shared = Shared::start(Database::from_url(&url)?, config, &metrics)?;
        anyhow::Ok((shared, metrics))
    };
    let registered = async |port: u16| {
        let rows = "SELECT string_agg(address, ' ') FROM relays";
        eventually(PATIENCE, "one has the name", || async {
            let rows = server.sql(OWNER, rows).await?;
            ensure!(rows == format!("127.0.0.1:{port}"), "{rows:?}");
            Ok(())
        })
        .await
    };
    let displaced = async |metrics: &prometheus::Registry, expected: f64| {
        eventually(PATIENCE, "it says whether it has its name", || async {
            let all = metrics.gather();
            let own = all
                .iter()
                .find(|of| of.name() == "throwline_relay_displaced");
            let own = own.and_then(|of| of.get_metric().first());
            let own = own.context("no such metric")?.get_gauge().get_value();
            ensure!(own == expected, "{own}");
            Ok(())
        })
        .await
    };
    let (earlier, of_earlier) = start(1)?;
    registered(1).await?;
    let (later, of_later) = start(2)?;
    registered(2).await?;
    displaced(&of_earlier, 1.0).await?;
    displaced(&of_later, 0.0).await?;
    registered(2).await?;
    later.close().await;
    registered(1).await?;
    displaced(&of_earlier, 0.0).await?;
    earlier.close().await;
    Ok(())
}

/// Any role of the database may NOTIFY. Its content is looked up in the tables.
async fn strange_notices(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let dir = private_dir()?;
    let kubeconfig = no_cluster(dir.path())?;
    let relay = ["--database", &server.url(ROLE), "--instance", "one"];
    let relay = Relay::start(dir.path(), &relay).await?;
    let agent = async |cluster: &str| {
        let token = relay.token(&["--cluster", cluster]).await?;
        let one = ["--carriers", "1"];
        let agent = Agent::start(dir.path(), cluster, &token, &kubeconfig, &one).await?;
        agent.connected().await?;
        anyhow::Ok(agent)
    };
    let _first = agent(CLUSTER).await?;
    let observer = observer(&server.url(ROLE), Duration::from_secs(600))?;
    eventually(PATIENCE, "the tunnel is known", || {
        connected(&observer, "one")
    })
    .await?;
    let of_one = "SELECT started_at || ' ' || carrier FROM tunnels JOIN relays ON instance = relay";
    let of_one = server.sql(OWNER, of_one).await?;
    let (epoch, carrier) = of_one.split_once(' ').context("no row")?;
    server.sql(OWNER, "CREATE ROLE stranger LOGIN").await?;
    let tunnel = r#""cluster":"ghost","agent_instance":"x","since":1"#;
    for said in [
        format!(r#"{{"kind":"up","relay":"one","epoch":{epoch},"carrier":99,{tunnel}}}"#),
        format!(r#"{{"kind":"down","relay":"one","epoch":{epoch},"carrier":{carrier}}}"#),
        format!(r#"{{"kind":"draining","relay":"one","epoch":{epoch}}}"#),
        format!(r#"{{"kind":"gone","relay":"one","epoch":{epoch}}}"#),
        format!(r#"{{"kind":"relay","relay":"two","epoch":{epoch}}}"#),
    ] {
        let notify = format!("NOTIFY throwline_registry, '{said}'");
        server.sql("stranger", &notify).await?;
    }
    // Notices come in their order: when the second agent is known, all of these were heard.
    let _second = agent("second").await?;
    eventually(PATIENCE, "the second tunnel is known", || async {
        match observer.find("second").await {
            Presence::Connected(_) => Ok(()),
            _ => bail!("it is not known"),
        }
    })
    .await?;
    connected(&observer, "one").await?;
    let ghost = observer.find("ghost").await;
    ensure!(!matches!(ghost, Presence::Connected(_)), "a ghost is known");
    ensure!(observer.peers().await.len() == 1, "a relay is made up");
    observer.close().await;
    Ok(())
}

/// What another relay of the set would know, with short times.
fn observer(url: &str, max_staleness: Duration) -> Result<Shared> {
    let mut config = Config::new("observer".into(), "127.0.0.1:1".into());
    config.heartbeat = Duration::from_millis(300);
    config.max_staleness = max_staleness;
    let metrics = prometheus::Registry::new();
    Ok(Shared::start(Database::from_url(url)?, config, &metrics)?)
}

async fn connected(registry: &Shared, relay: &str) -> Result<()> {
    match registry.find(CLUSTER).await {
        Presence::Connected(routes) => {
            ensure!(routes.iter().all(|route| route.here().is_none()));
            let peers = registry.peers().await;
            ensure!(peers.iter().any(|peer| peer.instance == relay), "{peers:?}");
            Ok(())
        }
        Presence::Gone(_) | Presence::Unseen => bail!("no tunnel is known"),
        Presence::Unknown(ago) => bail!("unknown since {ago:?}"),
    }
}

async fn relays_share(_: Arc<()>) -> Result<()> {
    let server = Postgres::with_role().await?;
    let dir = private_dir()?;
    let kubeconfig = no_cluster(dir.path())?;
    let url = server.url(ROLE);
    let front = free_address()?;
    let public = format!("https://localhost:{}", front.port());
    let (one_dir, two_dir) = (dir.path().join("one"), dir.path().join("two"));
    let one = Relay::at(
        &one_dir,
        front,
        &public,
        &["--database", &url, "--instance", "one"],
    )
    .await?;
    one.share_the_ca(&two_dir)?;
    let back = free_address()?;
    let two = Relay::at(
        &two_dir,
        back,
        &public,
        &["--database", &url, "--instance", "two"],
    )
    .await?;
    // A token made at one relay is good, and what it enrolled is known, by way of the other.
    let token = two.token(&["--cluster", CLUSTER]).await?;
    let agent = Agent::start(dir.path(), CLUSTER, &token, &kubeconfig, &[]).await?;
    agent.connected().await?;
    let token = two.token(&["--user", USER]).await?;
    let user = User::login(dir.path(), USER, &token, &[]).await?;
    let rows = "SELECT relay, cluster FROM tunnels";
    eventually(PATIENCE, "the tunnel has its row", || async {
        let rows = server.sql(OWNER, rows).await?;
        ensure!(rows == format!("one|{CLUSTER}"), "{rows:?}");
        Ok(())
    })
    .await?;
    let name = "throwline_relay_remote_tunnels";
    eventually(PATIENCE, "the other relay knows the tunnel", || async {
        let metrics = two.metrics().await?;
        ensure!(metrics.sum(name, &[]) == 1.0, "{}", metrics.text());
        Ok(())
    })
    .await?;
    // The same address now leads to the other relay: the identities are good there too.
    one.process.kill().await?;
    let balancer = Forwarder::start(front, &[back]).await?;
    eventually(
        PATIENCE,
        "the agent is accepted by the other relay",
        || async {
            let rows = server
                .sql(OWNER, "SELECT relay FROM tunnels WHERE relay = 'two'")
                .await?;
            ensure!(rows == "two", "{rows:?}");
            Ok(())
        },
    )
    .await?;
    let clusters = user.clusters().await?;
    contains(&clusters.to_string(), "true")?;
    // The dead relay did not delete its row; it expires.
    eventually(PATIENCE, "the dead relay is forgotten", || async {
        let rows = server.sql(OWNER, "SELECT instance FROM relays").await?;
        ensure!(rows == "two", "{rows:?}");
        Ok(())
    })
    .await?;
    agent.process.stop(PATIENCE).await?;
    two.process.stop(PATIENCE).await?;
    let left = server.sql(OWNER, "SELECT count(*) FROM relays").await?;
    ensure!(left == "0", "a relay that stopped left its row");
    drop(balancer);
    Ok(())
}

async fn an_outage(_: Arc<()>) -> Result<()> {
    let mut server = Postgres::with_role().await?;
    let dir = private_dir()?;
    let kubeconfig = no_cluster(dir.path())?;
    // Stands for the database's name: behind it, the address changes.
    let name = free_address()?;
    let forwarder = Forwarder::start(name, &[server.address()]).await?;
    let url = postgres::url(ROLE, name);
    let relay = Relay::start(dir.path(), &["--database", &url, "--instance", "one"]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    // The observers below are relays of the set, too, to which it cannot get.
    let one = ["--carriers", "1"];
    let agent = Agent::start(dir.path(), CLUSTER, &token, &kubeconfig, &one).await?;
    agent.connected().await?;
    let believer = observer(&url, Duration::from_secs(600))?;
    eventually(PATIENCE, "the tunnel is known", || {
        connected(&believer, "one")
    })
    .await?;
    let mut doubter = Config::new("doubter".into(), "127.0.0.1:1".into());
    doubter.heartbeat = Duration::from_millis(300);
    doubter.max_staleness = Duration::from_secs(3);
    let metrics = prometheus::Registry::new();
    let doubter = Shared::start(Database::from_url(&url)?, doubter, &metrics)?;
    eventually(PATIENCE, "the tunnel is known", || {
        connected(&doubter, "one")
    })
    .await?;

    server.stop().await?;
    eventually(PATIENCE, "the bound is reached", || async {
        match doubter.find(CLUSTER).await {
            Presence::Unknown(ago) => {
                ensure!(ago >= Duration::from_secs(3), "doubted after {ago:?}");
                Ok(())
            }
            _ => bail!("still believed"),
        }
    })
    .await?;
    connected(&believer, "one")
        .await
        .context("the cache was not believed")?;
    // The relay and its agent did not mind.
    agent.connected().await?;
    let up = relay
        .metrics()
        .await?
        .sum("throwline_relay_database_up", &[]);
    ensure!(up == 0.0, "the relay did not notice");
    ensure!(relay.metrics().await?.sum("throwline_relay_carriers", &[]) == 1.0);

    // Back, elsewhere.
    let moved = free_address()?;
    server.start_at(moved).await?;
    drop(forwarder);
    let forwarder = Forwarder::start(name, &[moved]).await?;
    eventually(PATIENCE, "it is known again", || connected(&doubter, "one")).await?;
    eventually(PATIENCE, "the relay is back too", || async {
        let metrics = relay.metrics().await?;
        ensure!(metrics.sum("throwline_relay_database_up", &[]) == 1.0);
        ensure!(metrics.sum("throwline_relay_database_owed_writes", &[]) == 0.0);
        Ok(())
    })
    .await?;
    believer.close().await;
    doubter.close().await;
    let left = server.sql(OWNER, "SELECT instance FROM relays").await?;
    ensure!(left == "one", "{left:?}");
    drop(forwarder);
    Ok(())
}
