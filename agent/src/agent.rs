//! What all tasks of one agent share, and its life from start to stop.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus::Registry;
use throwline_certs::{Identity, Roots, Validator, tls};
use throwline_ops::{Drain, Readiness, Shutdown, admin};
use throwline_tunnel::proto::messages::AgentStatus;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::audit::{Limits as AuditLimits, Sink};
use crate::carriers::Carriers;
use crate::config::Config;
use crate::error::Error;
use crate::gateway::Gateway;
use crate::kept::Kept;
use crate::metrics::Metrics;
use crate::owner::{self, Enrolled};
use crate::upstream::Upstream;
use crate::{audit::Audit, state, status_report};

/// Shared by the carriers, their lines and the tasks beside them.
pub(crate) struct Agent {
    pub(crate) cluster: String,
    /// Tells two processes of one identity apart.
    pub(crate) instance: String,
    pub(crate) gateway: Arc<Gateway>,
    pub(crate) credential_extra: bool,
    pub(crate) room: Arc<Semaphore>,
    pub(crate) drain: Drain,
    /// No more sessions; those that there are end with their requests.
    pub(crate) shutdown: Shutdown,
    pub(crate) stop: Shutdown,
    pub(crate) kept: Arc<Kept>,
    pub(crate) roots: Roots,
    validator: Validator,
    identity: Mutex<Held>,
}

#[derive(Clone)]
struct Held {
    identity: Arc<Identity>,
    server: Arc<rustls::ServerConfig>,
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
    let audit = AuditLimits {
        queue: config.limits.lines.audit_queue,
        required: config.audit_required,
    };
    let sink =
        Sink::open(&config.audit, audit, metrics.clone()).map_err(|source| Error::Audit {
            target: audit_target(&config.audit),
            source,
        })?;

    // The admin listener goes on while the rest drains, so that /readyz says so.
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

    let (stop_trigger, stop) = Shutdown::new();
    let validator = Validator::new(roots.clone(), identity.id().domain().clone());
    let server = tls::session_server(&identity, &validator)?;
    let agent = Arc::new(Agent {
        cluster: identity.id().name().to_owned(),
        instance: uuid::Uuid::new_v4().to_string(),
        gateway: Arc::new(Gateway::new(
            upstream,
            sink,
            metrics.clone(),
            config.limits.session,
        )),
        credential_extra: config.credential_extra,
        room: Arc::new(Semaphore::new(config.limits.lines.most)),
        drain: Drain::new(),
        shutdown: shutdown.clone(),
        stop,
        kept: Kept::new(config.limits.kept, metrics.clone()),
        roots,
        validator,
        identity: Mutex::new(Held {
            identity: Arc::new(identity),
            server,
        }),
    });
    tracing::info!(cluster = agent.cluster, relay = %config.relay, "the agent has started");

    let (report, status) = watch::channel(AgentStatus::default());
    let watching = tokio::spawn(status_report::watch(
        agent.clone(),
        config.timing.status,
        report,
    ));
    let kept = agent.kept.clone();
    let looking = AbortOnDropHandle::new(tokio::spawn(async move { kept.look().await }));
    let grace = config.timing.drain;
    let carriers = Carriers::start(
        Arc::new(Enrolled {
            agent: agent.clone(),
            config: config.clone(),
            status,
        }),
        config.timing.carriers.clone(),
        shutdown,
        readiness.condition("relay"),
        metrics,
    );
    let renewing = owner::keep_renewed(agent.clone(), config, carriers.any());
    let renewing = tokio::spawn(renewing);
    let carriers = carriers.ended().await;
    renewing.abort();
    watching.abort();
    if let Err(left) = agent.drain.drained_within(grace).await {
        tracing::info!(
            left,
            "sessions are cut off, because the time to drain is over"
        );
    }
    stop_trigger.trigger();
    drop(looking);
    carriers.close().await;
    end.trigger();
    if let Some(admin) = admin {
        // Its end is ours by now; a panic in it is nobody's business any more.
        if let Ok(result) = admin.await {
            result.map_err(Error::Admin)?;
        }
    }
    Ok(())
}

impl Agent {
    pub(crate) fn identity(&self) -> Arc<Identity> {
        self.held().identity
    }

    /// What new sessions are accepted with.
    pub(crate) fn session_server(&self) -> (Arc<rustls::ServerConfig>, &Validator) {
        (self.held().server, &self.validator)
    }

    pub(crate) fn validator(&self) -> &Validator {
        &self.validator
    }

    /// New sessions and carriers use the new identity; those that live go on with the old.
    pub(crate) fn replace(&self, identity: Identity) -> Result<(), throwline_certs::Error> {
        let server = tls::session_server(&identity, &self.validator)?;
        *self.identity.lock().unwrap_or_else(PoisonError::into_inner) = Held {
            identity: Arc::new(identity),
            server,
        };
        Ok(())
    }

    pub(crate) fn count_line(&self, end: &str) {
        self.gateway.metrics().lines.with_label_values(&[end]).inc();
    }

    fn held(&self) -> Held {
        self.identity
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn audit_target(audit: &Audit) -> String {
    match audit {
        Audit::Stdout => "standard output".to_owned(),
        Audit::File(path) => path.display().to_string(),
        Audit::Off => "nowhere".to_owned(),
    }
}
