//! The agent's life from start to stop.

use std::sync::Arc;
use std::time::Duration;

use prometheus::Registry;
use throwline_certs::revocation::Keeper;
use throwline_ops::{Drain, Readiness, ReadinessGuard, Shutdown, admin, network};
use throwline_tunnel::proto::messages::AgentStatus;
use throwline_uplink::{Carriers, Config as UplinkConfig, Environment, Pool};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::audit::{Audit, Limits as AuditLimits, Sink};
use crate::config::Config;
use crate::error::Error;
use crate::identity::AgentIdentity;
use crate::lines::{BulkCarrier, LineAcceptor, LineRegistry, UserOptions};
use crate::live::LiveRegistry;
use crate::metrics::Metrics;
use crate::quotas::Quotas;
use crate::request::{ApiServer, Gateway};
use crate::session::SessionServer;
use crate::uplink_handler::{self, AgentUplink, BulkUplink};
use crate::upstream::{Upstream, uid};
use crate::{state, status_report};

/// How long the last audit events may take to be written when the agent stops.
const FLUSH: Duration = Duration::from_secs(5);
/// How often `/readyz` is updated by the state of the audit.
const AUDIT_CHECK: Duration = Duration::from_secs(1);

/// The parts of a running agent, built from the bottom up.
struct Parts {
    identity: Arc<AgentIdentity>,
    api_server: Arc<ApiServer>,
    live: Arc<LiveRegistry>,
    lines: Arc<LineRegistry>,
    quotas: Quotas,
    drain: Drain,
    acceptor: Arc<LineAcceptor>,
}

/// Runs an enrolled agent until `shutdown`; losses of the relay or the API server do not end it.
///
/// # Errors
/// What keeps an agent from starting: no identity, no access to the cluster, no audit.
pub async fn run(
    config: Config,
    admin: Option<TcpListener>,
    shutdown: Shutdown,
) -> Result<(), Error> {
    let (identity, roots) = state::identity(&config.state_dir)?;
    let registry = Registry::new();
    let metrics = Metrics::register(&registry)?;
    let upstream = Upstream::load(
        config.cluster.clone(),
        config.limits.upstream,
        metrics.clone(),
    )
    .await?;
    let name = identity.id().name();
    // Before any carrier: with a copied state directory, this agent would serve another cluster's
    // name.
    uid::check(&upstream, name, config.cluster_uid.as_deref()).await?;
    let sink = open_audit(&config, &metrics)?;

    // The admin listener serves while the rest drains, so that /readyz shows it.
    let (end, ended) = Shutdown::new();
    let readiness = Readiness::new();
    let admin = admin.map(|listener| {
        tokio::spawn(admin::run(
            listener,
            registry.clone(),
            readiness.clone(),
            ended.clone(),
        ))
    });

    let identity = Arc::new(AgentIdentity::new(identity, roots)?);
    let revocations = Arc::new(Keeper::new(identity.validator().clone(), &config.state_dir));
    let parts = Parts::build(
        &config,
        identity,
        upstream,
        sink.clone(),
        &metrics,
        &shutdown,
    );
    tracing::info!(cluster = parts.acceptor.cluster, relay = %config.relay, "the agent has started");

    let auditing = spawn(report_audit(sink.clone(), readiness.condition("audit")));
    let (report, status) = watch::channel(AgentStatus::default());
    let watching = spawn(status_report::watch(
        parts.api_server.clone(),
        config.credential_extra,
        config.timing.status,
        report,
        readiness.condition("api-server"),
    ));
    // The last list that was saved counts before the first carrier, so that a restart readmits
    // nothing.
    revocations.load();
    let live = parts.live.clone();
    let revoking = spawn(async move { live.follow_revocations().await });
    let (lines, quotas) = (parts.lines.clone(), parts.quotas.clone());
    let ticking = spawn(async move { lines.tick(|| quotas.update_gauges()).await });
    let grace = config.timing.drain;
    let handler = Arc::new(AgentUplink {
        identity: parts.identity.clone(),
        acceptor: parts.acceptor.clone(),
        api_server: parts.api_server.clone(),
        revocations,
        config: config.clone(),
        status,
    });
    let carriers = Carriers::new();
    let network = network::changes();
    let pool = Pool::start(
        handler.clone(),
        carriers.clone(),
        config.timing.carriers.clone(),
        Environment {
            shutdown: shutdown.clone(),
            ready: Some(readiness.condition("relay")),
            network: network.clone(),
            metrics: metrics.uplink,
        },
    );
    let bulk = Pool::start(
        Arc::new(BulkUplink(handler.clone())),
        parts.acceptor.bulk.carriers().clone(),
        UplinkConfig {
            count: 1,
            quiet: true,
            ..config.timing.carriers.clone()
        },
        Environment {
            shutdown,
            ready: None,
            network,
            metrics: metrics.bulk_uplink,
        },
    );
    let renewing = spawn(uplink_handler::keep_renewed(handler, carriers));
    // Carriers stay open during the drain, because the sessions run over them.
    let (remaining, remaining_bulk) = tokio::join!(pool.ended(), bulk.ended());
    // No certificate is requested that this process would not use any more.
    drop((renewing, watching));
    if let Err(left) = parts.drain.drained_within(grace).await {
        tracing::info!(
            left,
            "sessions are cut off, because the time to drain is over"
        );
    }
    // Lines first, so that their RESET leaves while the carriers still send.
    parts.lines.stop();
    parts.live.close();
    drop((ticking, auditing, revoking));
    let reason = "the agent is stopping";
    tokio::join!(remaining.close(reason), remaining_bulk.close(reason));
    // Behind the last session, whose end is an event too.
    if !sink.flushed(FLUSH).await {
        tracing::error!("the last audit events could not be written");
    }
    end.trigger();
    if let Some(admin) = admin {
        // Its end was requested here; a panic in it has no further effect.
        if let Ok(result) = admin.await {
            result.map_err(Error::Admin)?;
        }
    }
    Ok(())
}

impl Parts {
    fn build(
        config: &Config,
        identity: Arc<AgentIdentity>,
        upstream: Upstream,
        sink: Sink,
        metrics: &Metrics,
        shutdown: &Shutdown,
    ) -> Self {
        let limits = &config.limits;
        let cluster = identity.identity().id().name().to_owned();
        let quotas = Quotas::new(limits.quotas, metrics.clone());
        let live = Arc::new(LiveRegistry::new(identity.validator().clone(), &cluster));
        let lines = LineRegistry::new(limits.lines, live.clone(), metrics.clone());
        let gateway = Gateway::new(
            upstream,
            sink,
            quotas.clone(),
            metrics.clone(),
            limits.request,
        );
        let api_server = gateway.api_server().clone();
        let drain = Drain::new();
        let sessions = SessionServer::new(
            Arc::new(gateway),
            quotas.clone(),
            metrics.clone(),
            limits.session,
        );
        let acceptor = Arc::new(LineAcceptor {
            cluster,
            instance: uuid::Uuid::new_v4().to_string(),
            identity: identity.clone(),
            live: live.clone(),
            lines: lines.clone(),
            sessions,
            users: UserOptions {
                credential_extra: config.credential_extra,
                system_names: config.system_names.clone(),
            },
            bulk: Arc::new(BulkCarrier::default()),
            quotas: quotas.clone(),
            metrics: metrics.clone(),
            drain: drain.clone(),
            shutdown: shutdown.clone(),
        });
        Self {
            identity,
            api_server,
            live,
            lines,
            quotas,
            drain,
            acceptor,
        }
    }
}

/// A task that ends with its handle.
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(task))
}

fn open_audit(config: &Config, metrics: &Metrics) -> Result<Sink, Error> {
    let limits = AuditLimits {
        queue: config.limits.audit_queue,
        required: config.audit_required,
        ..AuditLimits::default()
    };
    Sink::open(&config.audit, limits, metrics.clone()).map_err(|source| Error::Audit {
        target: audit_target(&config.audit),
        source,
    })
}

/// The agent is not ready while a required audit refuses requests. Never ends.
async fn report_audit(sink: Sink, condition: ReadinessGuard) {
    loop {
        match sink.refuses() {
            true => condition.not_ready("it cannot be written, so requests are refused"),
            false => condition.ready(),
        }
        tokio::time::sleep(AUDIT_CHECK).await;
    }
}

fn audit_target(audit: &Audit) -> String {
    match audit {
        Audit::Stdout => "standard output".to_owned(),
        Audit::File(path) => path.display().to_string(),
        Audit::Off => "nowhere".to_owned(),
    }
}
