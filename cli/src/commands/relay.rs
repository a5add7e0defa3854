//! `throwline relay`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use throwline_authority::{Authority, Subject, Validity};
use throwline_certs::spiffe::check_relay_instance;
use throwline_certs::{Secret, files};
use throwline_database::Database;
use throwline_ops::Shutdown;
use throwline_ops::admin::DrainToken;
use throwline_relay::registry::postgres::{self, Postgres};
use throwline_relay::{Config, Relay, Tls};

use crate::args;
use crate::commands::common::{listen, listen_if, until_second_signal};
use crate::commands::database;

/// How long the first administrator has to sign in.
const FIRST_TOKEN_TTL: Duration = Duration::from_secs(60 * 60);

/// The file in the state directory that holds it, 0600.
const ADMIN_TOKEN: &str = "admin.token";

/// The file in the state directory that holds what `POST /drain` must bring, 0600.
const DRAIN_TOKEN: &str = "drain.token";

/// The user that the first token enrols. What it may do is up to each cluster's RBAC, as for
/// any user; its group is there to be bound.
const ADMIN_USER: &str = "admin";
const ADMIN_GROUP: &str = "throwline-admins";

pub(super) async fn run(args: args::Relay) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    let listener = listen(args.listen, "agents and users (--listen)").await?;
    let admin = listen_if(args.admin_listen, "the admin endpoints (--admin-listen)").await?;
    let lives = Validity {
        user: args.user_certificate_life,
        agent: args.agent_certificate_life,
        user_since_enrolment: args.user_enrolment_life,
        agent_absence: args.agent_absence,
        ..Validity::default()
    };
    if let Some(instance) = &args.instance {
        check_relay_instance(instance)?;
    }
    let database = database::named(&args.database)?;
    let authority = Authority::builder(&args.state_dir)
        .database(database.clone())
        .open_or_create(&args.public_url)
        .await?
        .with_validity(lives)
        .with_system_names(args.system_names.names()?);
    authority.set_relay_url(&args.public_url).await?;

    if authority.was_created() {
        let subject = Subject::User {
            name: ADMIN_USER.to_owned(),
            groups: vec![ADMIN_GROUP.to_owned()],
        };
        let token = authority
            .create_token(&subject, FIRST_TOKEN_TTL, &args.public_url)
            .await?;
        // Not to an output, which is collected into logs.
        let file = args.state_dir.join(ADMIN_TOKEN);
        files::write_private(&file, format!("{token}\n").as_bytes())?;
        let file = std::path::absolute(&file).unwrap_or(file);
        eprintln!(
            "First start. The token in this file enrols the administrator (user {ADMIN_USER}, \
             group {ADMIN_GROUP}) once, within an hour:\n  \
             throwline login --token-file {}\n\
             More tokens, for a cluster's agent and for a user:\n  \
             throwline token create --cluster NAME --out FILE --state-dir {dir}{database}\n  \
             throwline token create --user NAME --group GROUP --out FILE --state-dir {dir}{database}",
            file.display(),
            dir = args.state_dir.display(),
            database = if database.is_some() {
                " --database-file FILE"
            } else {
                ""
            },
        );
    }

    let tls = match (args.tls_cert, args.tls_key) {
        (Some(cert), Some(key)) => Tls::Files { cert, key },
        _ if args.plaintext => Tls::Plaintext,
        _ => Tls::Own,
    };
    let mut config = Config::new(args.public_url, tls);
    config.trusted_proxies = args.trusted_proxies;
    config.proxy_protocol = args.proxy_protocol;
    if admin.is_some() {
        // Another one at each start: what drains the relay reads it then.
        let token = Secret::generate().expose();
        files::write_private(&args.state_dir.join(DRAIN_TOKEN), token.as_bytes())?;
        config.drain_token = Some(DrainToken::new(&token));
    }
    config.timing.carrier.ping_interval = args.ping_interval;
    config.timing.drain_timeout = args.drain_timeout;
    config.timing.drain_spread = args.drain_spread;
    let limits = &mut config.limits;
    limits.carriers = args.max_carriers.unwrap_or(limits.carriers);
    limits.half_open = args.max_half_open.unwrap_or(limits.half_open);
    limits.handshakes_per_second = args.max_handshakes.unwrap_or(limits.handshakes_per_second);
    limits.lines_per_user = args.max_lines_per_user.unwrap_or(limits.lines_per_user);
    limits.lines_per_user_and_carrier = args
        .max_lines_per_user_and_carrier
        .unwrap_or(limits.lines_per_user_and_carrier);

    config.instance = args.instance.unwrap_or(config.instance);

    let metrics = prometheus::Registry::new();
    let (mut registry, mut peers) = (None, None);
    if let Some(database) = database {
        let listener = listen(args.peer_listen, "other relays (--peer-listen)").await?;
        let address = match args.peer_address {
            Some(address) => address,
            None => peer_address(&database, listener.local_addr()?).await?,
        };
        peers = Some((listener, address.clone()));
        let mut own = postgres::Config::new(config.instance.clone(), address);
        own.max_staleness = args.registry_max_staleness;
        postgres::migrate(&database).await?;
        registry = Some(Postgres::start(database, own, &metrics)?);
    }
    let pruned = authority.clone();
    let pruning = tokio::spawn(async move { pruned.prune_regularly().await });
    let mut relay = Relay::new(Arc::new(authority), config).metrics(metrics);
    if let Some(registry) = &registry {
        relay = relay.registry(Arc::new(registry.clone()));
    }
    if let Some((listener, address)) = peers {
        relay = relay.peers(listener, address);
    }
    until_second_signal(second, async {
        let ended = relay.run(listener, admin, shutdown).await;
        pruning.abort();
        if let Some(registry) = registry {
            registry.close().await;
        }
        ended
    })
    .await
}

/// Who reaches the database most likely reaches this machine by the address that it has there.
async fn peer_address(database: &Database, bound: SocketAddr) -> anyhow::Result<String> {
    if !bound.ip().is_unspecified() {
        return Ok(bound.to_string());
    }
    let address = database.local_address().await.context(
        "cannot tell by which address other relays reach this machine; give --peer-address",
    )?;
    Ok(SocketAddr::new(address, bound.port()).to_string())
}
