//! `throwline relay`.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use throwline_certs::Database;
use throwline_certs::authority::{Authority, Lives, Subject};
use throwline_certs::spiffe::check_relay_instance;
use throwline_ops::Shutdown;
use throwline_relay::registry::postgres::{self, Postgres};
use throwline_relay::{Config, Relay, Tls};

use crate::args;
use crate::commands::{database, listen, listen_if, until_second_signal};

/// How long the first administrator has to sign in.
const FIRST_TOKEN_TTL: Duration = Duration::from_secs(60 * 60);

/// The user that the first token enrols. What it may do is up to each cluster's RBAC, as for
/// anybody; its group is there to be bound.
const ADMIN_USER: &str = "admin";
const ADMIN_GROUP: &str = "throwline-admins";

pub(super) async fn run(args: args::Relay) -> anyhow::Result<()> {
    throwline_ops::limits::raise_open_files();
    let (shutdown, second) = Shutdown::from_signals().context("cannot listen for signals")?;
    let listener = listen(args.listen, "agents and users (--listen)").await?;
    let admin = listen_if(args.admin_listen, "the admin endpoints (--admin-listen)").await?;
    let lives = Lives {
        user: args.user_certificate_life,
        agent: args.agent_certificate_life,
        ..Lives::default()
    };
    if let Some(instance) = &args.instance {
        check_relay_instance(instance)?;
    }
    let database = database::named(&args.database)?;
    let authority = Authority::builder(&args.state_dir)
        .database(database.clone())
        .open_or_create(&args.public_url)
        .await?
        .with_lives(lives);
    authority.set_relay_url(&args.public_url).await?;

    if authority.was_created() {
        let subject = Subject::User {
            name: ADMIN_USER.to_owned(),
            groups: vec![ADMIN_GROUP.to_owned()],
        };
        let token = authority
            .create_token(&subject, FIRST_TOKEN_TTL, &args.public_url)
            .await?;
        eprintln!(
            "First start. The token below enrols the administrator (user {ADMIN_USER}, group {ADMIN_GROUP}) once, within an hour:\n  \
             throwline login --token-file -\n\
             More: throwline token create --state-dir {}",
            args.state_dir.display()
        );
        println!("{token}");
    }

    let tls = match (args.tls_cert, args.tls_key) {
        (Some(cert), Some(key)) => Tls::Files { cert, key },
        _ if args.plaintext => Tls::Plaintext,
        _ => Tls::Own,
    };
    let mut config = Config::new(args.public_url, tls);
    config.trusted_proxies = args.trusted_proxies;
    config.proxy_protocol = args.proxy_protocol;
    config.timing.carrier.ping_interval = args.ping_interval;
    config.timing.drain_timeout = args.drain_timeout;
    config.timing.drain_spread = args.drain_spread;
    let limits = &mut config.limits;
    limits.carriers = args.max_carriers.unwrap_or(limits.carriers);
    limits.half_open = args.max_half_open.unwrap_or(limits.half_open);
    limits.handshakes_per_second = args.max_handshakes.unwrap_or(limits.handshakes_per_second);
    limits.lines_per_user = args.max_lines_per_user.unwrap_or(limits.lines_per_user);

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
        own.belief = args.registry_belief;
        registry = Some(Postgres::start(database, own, &metrics)?);
    }
    let mut relay = Relay::new(authority, config).metrics(metrics);
    if let Some(registry) = &registry {
        relay = relay.registry(Arc::new(registry.clone()));
    }
    if let Some((listener, address)) = peers {
        relay = relay.peers(listener, address);
    }
    until_second_signal(second, async {
        let ended = relay.run(listener, admin, shutdown).await;
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
