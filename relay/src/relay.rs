//! The relay as a whole: what all its connections share, and the order in which it ends.

use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use throwline_certs::authority::Authority;
use throwline_certs::tls::{RelayCertificate, RelayIdentity, relay_server};
use throwline_ops::{Drain, Readiness, Shutdown, admin};
use throwline_tunnel::carrier::{AcceptConfig, IncomingStream};
use throwline_tunnel::proto::messages::Refusal;
use throwline_tunnel::splice::{self, Meter};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};
use url::Url;

use crate::accept::Gate;
use crate::config::{Config, Tls};
use crate::error::Error;
use crate::half_open::HalfOpen;
use crate::listener::{self, Door};
use crate::metrics::{Metrics, code_label};
use crate::origin::Trusted;
use crate::pace::Pace;
use crate::peers::{self, Peers};
use crate::policy::{Everyone, Policy};
use crate::rate::RateLimit;
use crate::registry::{Memory, Registry};
use crate::session::Seats;
use crate::tally::{Budgets, Tally};

/// How long the registry may take to tell of the drain.
const TELL: Duration = Duration::from_secs(2);
/// How long carriers may take to say goodbye when the relay ends.
const GOODBYE: Duration = Duration::from_secs(5);
/// Half of what the authority's pool has.
const RECORDING: usize = 4;
/// Beyond the spread, how long carriers have to move to other relays: a dial, and the end of the
/// requests that are under way.
const MOVE: Duration = Duration::from_secs(15);

/// A relay that has not begun yet.
pub struct Relay {
    authority: Authority,
    config: Config,
    registry: Arc<dyn Registry>,
    policy: Arc<dyn Policy>,
    metrics: prometheus::Registry,
    peers: Option<(TcpListener, String)>,
}

/// What every connection of one relay needs.
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) authority: Authority,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) metrics: Metrics,
    pub(crate) gate: Gate,
    /// `None` where there is one relay.
    pub(crate) peers: Option<Arc<Peers>>,
    /// Who is believed about a client's address.
    pub(crate) trusted: Trusted,
    pub(crate) half_open: HalfOpen,
    pub(crate) enrolments: RateLimit,
    pub(crate) seats: Seats,
    pub(crate) pace: Pace,
    pub(crate) lines_in_all: Tally,
    pub(crate) lines_per_user: Tally,
    pub(crate) lines_per_cluster: Tally,
    pub(crate) buffers_per_user: Budgets,
    pub(crate) buffers_per_cluster: Budgets,
    /// Held by each line.
    pub(crate) lines: Drain,
    /// Held by each carrier but those of other relays.
    pub(crate) carriers: Drain,
    /// Arrivals that are being written down: thousands come at once after an outage, and others
    /// need the database too.
    pub(crate) recording: Semaphore,
    /// How many relays of the set take lines; 0 while that is not known.
    pub(crate) relays: watch::Receiver<u32>,
    pub(crate) splice: splice::Config,
    pub(crate) meter: Arc<Meter>,
    /// No new work, and peers should move.
    pub(crate) draining: CancellationToken,
    /// All ends now.
    pub(crate) closing: CancellationToken,
    pub(crate) tasks: TaskTracker,
    pub(crate) started: Instant,
    /// `None` where a balancer ends TLS.
    pub(crate) tls: Option<Arc<ServerConfig>>,
}

impl Relay {
    /// With a registry in memory, and open to every enrolled user.
    pub fn new(authority: Authority, config: Config) -> Self {
        Self {
            authority,
            config,
            registry: Arc::new(Memory::default()),
            policy: Arc::new(Everyone),
            metrics: prometheus::Registry::new(),
            peers: None,
        }
    }

    /// Takes lines from other relays of the set on `listener`, and leads lines to agents that are
    /// connected to them. `address` (`HOST:PORT`) is how the others reach this listener; the
    /// registry must tell them the same.
    #[must_use]
    pub fn peers(mut self, listener: TcpListener, address: String) -> Self {
        self.peers = Some((listener, address));
        self
    }

    #[must_use]
    pub fn registry(mut self, registry: Arc<dyn Registry>) -> Self {
        self.registry = registry;
        self
    }

    #[must_use]
    pub fn policy(mut self, policy: Arc<dyn Policy>) -> Self {
        self.policy = policy;
        self
    }

    /// Where the metrics are registered; a registry of its own otherwise.
    #[must_use]
    pub fn metrics(mut self, metrics: prometheus::Registry) -> Self {
        self.metrics = metrics;
        self
    }

    /// Serves until `shutdown` or `POST /drain` on `admin`, then drains: not ready, nobody new is
    /// accepted, peers are told to move to the other relays if there are any, lines may end in
    /// peace for a while, carriers are closed.
    pub async fn run(
        self,
        listener: TcpListener,
        admin: Option<TcpListener>,
        shutdown: Shutdown,
    ) -> Result<(), Error> {
        let readiness = Readiness::new();
        let listening = readiness.condition("listening");
        let metrics = self.metrics.clone();
        let (shared, peers) = self.into_shared()?;
        let shared = Arc::new(shared);

        let (admin_trigger, admin_shutdown) = Shutdown::new();
        let asked = CancellationToken::new();
        let admin = admin.map(|listener| {
            let asked = asked.clone();
            let ask = move || asked.cancel();
            let run = admin::run_with_drain(listener, metrics, readiness, ask, admin_shutdown);
            tokio::spawn(run)
        });
        listening.ready();
        info!(
            url = %shared.config.public_url,
            instance = %shared.config.instance,
            "the relay is up"
        );

        if let (Some(listener), Some(peers)) = (peers, &shared.peers) {
            let door = Door::Peers(Arc::clone(peers));
            shared
                .tasks
                .spawn(listener::run(listener, Arc::clone(&shared), door));
        }
        let accepting = listener::run(listener, Arc::clone(&shared), Door::Public);
        let drain = async {
            tokio::select! {
                () = shutdown.requested() => {}
                () = asked.cancelled() => {}
            }
            info!(lines = shared.lines.in_progress(), "the relay is draining");
            listening.not_ready("draining");
            shared.draining.cancel();
            // So that the others prefer other ways. Without the database they find out by trying.
            let _ = tokio::time::timeout(TELL, shared.registry.drain()).await;
            shared.emptied().await;
        };
        // The listener ends with the drain's beginning, and is closed then.
        tokio::join!(accepting, drain);

        shared.closing.cancel();
        shared.tasks.close();
        if tokio::time::timeout(GOODBYE, shared.tasks.wait())
            .await
            .is_err()
        {
            warn!(
                tasks = shared.tasks.len(),
                "some carriers did not end in time"
            );
        }
        admin_trigger.trigger();
        if let Some(admin) = admin {
            match admin.await {
                Ok(ended) => ended.map_err(Error::Admin)?,
                Err(panicked) => warn!(error = %panicked, "the admin listener failed"),
            }
        }
        info!("the relay is down");
        Ok(())
    }

    fn into_shared(self) -> Result<(Shared, Option<TcpListener>), Error> {
        let config = self.config;
        let limits = &config.limits;
        check(&config)?;
        let metrics = Metrics::register(&self.metrics, limits)?;
        let gate = |audience: &Url| {
            Gate::new(
                self.authority.validator().clone(),
                audience,
                config.timing.clock_tolerance,
                limits.remembered_assertions,
                AcceptConfig {
                    instance: config.instance.clone(),
                    relays: 0,
                    timing: config.timing.carrier.clone(),
                    ws: config.ws.clone(),
                    mux: config.mux.clone(),
                    max_streams: limits.streams_per_carrier,
                },
            )
        };
        let (peer_listener, peers) = match self.peers {
            None => (None, None),
            Some((listener, address)) => {
                let url = peers::audience(&address).ok_or_else(|| {
                    Error::Config(format!("the address for peers {address} is not HOST:PORT"))
                })?;
                let identity = RelayIdentity::new(self.authority.clone(), &config.instance);
                let identity = Arc::new(identity.map_err(Error::Tls)?);
                let peers = Peers::new(identity, gate(&url), config.clone(), metrics.clone())?;
                (Some(listener), Some(Arc::new(peers)))
            }
        };
        let gate = gate(&config.public_url).of_set(self.registry.relays());
        let trusted = Trusted::new(&config.trusted_proxies);
        let clients_are_known = config.tls != Tls::Plaintext || !trusted.is_empty();
        if !clients_are_known {
            warn!(
                "every client will have the balancer's address in limits, logs and the audit; \
                 name the balancer with --trust-proxy"
            );
        }
        let shared = Shared {
            gate,
            peers,
            trusted,
            half_open: HalfOpen::new(
                limits.half_open,
                clients_are_known.then_some(limits.half_open_per_address),
                metrics.half_open.clone(),
                metrics.half_open_shed.clone(),
            ),
            enrolments: RateLimit::new(limits.enrolment_burst, limits.enrolments_per_minute),
            seats: Seats::new(limits.carriers, limits.carriers_per_identity),
            pace: Pace::new(limits.handshakes_per_second),
            lines_in_all: Tally::new(limits.lines),
            lines_per_user: Tally::new(limits.lines_per_user),
            lines_per_cluster: Tally::new(limits.lines_per_cluster),
            buffers_per_user: Budgets::new(
                limits.buffered_bytes_per_user,
                metrics.limit_counter("buffers-per-user"),
            ),
            buffers_per_cluster: Budgets::new(
                limits.buffered_bytes_per_cluster,
                metrics.limit_counter("buffers-per-cluster"),
            ),
            lines: Drain::new(),
            carriers: Drain::new(),
            recording: Semaphore::new(RECORDING),
            relays: self.registry.relays(),
            splice: splice::Config {
                budgets: vec![metrics.buffers()],
                ..splice::Config::default()
            },
            meter: metrics.meter(),
            metrics,
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            started: Instant::now(),
            tls: tls(&config, &self.authority)?,
            registry: self.registry,
            policy: self.policy,
            authority: self.authority,
            config,
        };
        Ok((shared, peer_listener))
    }
}

impl Shared {
    /// Waits until nobody needs this relay any more, at most the drain's timeout.
    async fn emptied(&self) {
        let timing = &self.config.timing;
        let end = Instant::now() + timing.drain_timeout;
        // Without another relay there is nowhere to go; what has no line is then only closed.
        if *self.relays.borrow() > 0 {
            let to_move = (timing.drain_spread + MOVE).min(timing.drain_timeout);
            if let Err(carriers) = self.carriers.drained_within(to_move).await {
                info!(carriers, "some carriers have not moved yet");
            }
        }
        let left = end.saturating_duration_since(Instant::now());
        if let Err(lines) = self.lines.drained_within(left).await {
            warn!(lines, "cut lines that did not end in time");
        }
    }

    /// A balancer may or may not have taken off the public URL's path.
    pub(crate) fn path_below_prefix<'p>(&self, path: &'p str) -> &'p str {
        let prefix = self.config.public_url.path().trim_end_matches('/');
        match path.strip_prefix(prefix) {
            Some(below) if below.starts_with('/') => below,
            _ => path,
        }
    }

    /// Refuses a stream: the one place, so that each refusal is counted.
    pub(crate) async fn refuse(&self, stream: IncomingStream, refused: Refusal) {
        self.metrics.refusal(code_label(refused.code()));
        debug!(code = ?refused.code(), reason = %refused, "refused a stream");
        stream.refuse(refused).await;
    }
}

fn tls(config: &Config, authority: &Authority) -> Result<Option<Arc<ServerConfig>>, Error> {
    let certificate = match &config.tls {
        Tls::Plaintext => return Ok(None),
        Tls::Own => RelayCertificate::Own {
            authority,
            public_url: &config.public_url,
        },
        Tls::Files { cert, key } => RelayCertificate::Files {
            cert: cert.clone(),
            key: key.clone(),
        },
    };
    relay_server(certificate).map(Some).map_err(Error::Tls)
}

fn check(config: &Config) -> Result<(), Error> {
    let scheme = config.public_url.scheme();
    if !matches!(scheme, "http" | "https") || config.public_url.host().is_none() {
        return Err(Error::Config(format!(
            "the public URL {} is not https://HOST[:PORT]",
            config.public_url
        )));
    }
    if config.limits.streams_per_carrier == 0 || config.limits.carriers == 0 {
        return Err(Error::Config(
            "a relay without carriers or streams would serve nobody".into(),
        ));
    }
    if config.proxy_protocol && config.trusted_proxies.is_empty() {
        return Err(Error::Config(
            "the PROXY protocol is only believed of balancers that are named; name them with \
             --trust-proxy"
                .into(),
        ));
    }
    Ok(())
}
