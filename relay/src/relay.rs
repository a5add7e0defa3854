//! The relay as a whole: runs its parts, and ends them in order.

mod build;
mod own_certificates;

use std::sync::Arc;
use std::time::Duration;

use throwline_certs::Directory;
use throwline_ops::{Readiness, ReadinessGuard, Shutdown, admin};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::config::Config;
use crate::error::Error;
use crate::http::Listener;
use crate::lifecycle::Lifecycle;
use crate::limits::admission::HandshakeAdmission;
use crate::live::LiveRegistry;
use crate::policy::{Everyone, Policy};
use crate::registry::{Memory, Registry};
use crate::session::RevocationFeed;
use own_certificates::OwnCertificates;

/// Why a relay that drains is not ready.
const DRAINING: &str = "draining";
/// How long the registry may take to announce the drain to the others.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long carriers may take for their close handshakes when the relay ends.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A relay that has not begun yet.
pub struct Relay {
    authority: Arc<dyn Directory>,
    config: Config,
    registry: Arc<dyn Registry>,
    policy: Arc<dyn Policy>,
    metrics: prometheus::Registry,
    peers: Option<(TcpListener, String)>,
}

/// The parts of a relay that is about to run.
struct Parts {
    config: Config,
    registry: Arc<dyn Registry>,
    public: Arc<Listener>,
    peers: Option<(TcpListener, Arc<Listener>)>,
    admission: HandshakeAdmission,
    revocations: Arc<RevocationFeed>,
    live: Arc<LiveRegistry>,
    own_certificates: OwnCertificates,
    lifecycle: Lifecycle,
}

impl Relay {
    /// With a registry in memory, and open to every enrolled user.
    pub fn new(authority: Arc<dyn Directory>, config: Config) -> Self {
        Self {
            authority,
            config,
            registry: Arc::new(Memory::default()),
            policy: Arc::new(Everyone),
            metrics: prometheus::Registry::new(),
            peers: None,
        }
    }

    /// Accepts lines from other relays of the set on `listener`, and forwards lines to agents that are
    /// connected to them. `address` (`HOST:PORT`) is how the others reach this listener; the
    /// registry must announce the same address.
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

    /// Where the metrics are registered; otherwise in a new registry.
    #[must_use]
    pub fn metrics(mut self, metrics: prometheus::Registry) -> Self {
        self.metrics = metrics;
        self
    }

    /// Serves until `shutdown` or `POST /drain` on `admin`, then drains: not ready, no new carriers
    /// or lines, peers are asked to move to the other relays, lines may end in peace for a while,
    /// carriers are closed. Without another relay there is nowhere to move: lines that can be resumed
    /// wait for this relay's successor, and until the others have ended this relay serves as before.
    ///
    /// # Errors
    /// [`Error`], where the relay could not begin, or its admin listener failed.
    pub async fn run(
        self,
        listener: TcpListener,
        admin: Option<TcpListener>,
        shutdown: Shutdown,
    ) -> Result<(), Error> {
        let readiness = Readiness::new();
        let listening = Arc::new(readiness.condition("listening"));
        let metrics = self.metrics.clone();
        let mut parts = self.build().await?;
        // Before the first carrier: what was revoked while no relay ran stays outside.
        let read = parts.revocations.refresh().await;
        read.map_err(Error::Revocations)?;

        let (admin_trigger, admin_shutdown) = Shutdown::new();
        let drain_requested = CancellationToken::new();
        let drain_token = parts.config.drain_token.clone();
        let admin = admin.map(|listener| {
            let (requested, listening) = (drain_requested.clone(), Arc::clone(&listening));
            // Before the answer, so that a relay that has answered is unready.
            let request = move || {
                listening.not_ready(DRAINING);
                requested.cancel();
            };
            tokio::spawn(async move {
                match drain_token {
                    Some(token) => {
                        admin::run_with_drain(
                            listener,
                            metrics,
                            readiness,
                            token,
                            request,
                            admin_shutdown,
                        )
                        .await
                    }
                    None => admin::run(listener, metrics, readiness, admin_shutdown).await,
                }
            })
        });
        listening.ready();
        info!(
            url = %parts.config.public_url,
            instance = %parts.config.instance,
            "the relay is up"
        );

        // Behind the first list of revocations, since this starts the listener for peers.
        parts.spawn();
        let accepting = Arc::clone(&parts.public).run(listener);
        let drain = async {
            tokio::select! {
                () = shutdown.requested() => {}
                () = drain_requested.cancelled() => {}
            }
            parts.drain(&listening).await;
        };
        // The listener ends with the drain's beginning, and is closed then.
        tokio::join!(accepting, drain);
        parts.close().await;

        // The admin listener ends last, so that /readyz and /metrics answer during the drain.
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
}

impl Parts {
    /// Starts everything but the public listener.
    fn spawn(&mut self) {
        let tasks = &self.lifecycle.tasks;
        let closing = &self.lifecycle.closing;
        let (revocations, token) = (Arc::clone(&self.revocations), closing.clone());
        tasks.spawn(async move { revocations.run(token).await });
        let (admission, token) = (self.admission.clone(), closing.clone());
        tasks.spawn(async move { token.run_until_cancelled(admission.drive()).await });
        let (certificates, token) = (std::mem::take(&mut self.own_certificates), closing.clone());
        tasks.spawn(async move { token.run_until_cancelled(certificates.keep_fresh()).await });
        if let Some((tcp, listener)) = self.peers.take() {
            tasks.spawn(listener.run(tcp));
        }
    }

    /// Ends when no carrier and no line needs this relay any more, or after the drain's timeout.
    async fn drain(&self, listening: &ReadinessGuard) {
        let (lifecycle, timing) = (&self.lifecycle, &self.config.timing);
        info!(
            lines = lifecycle.lines.in_progress(),
            "the relay is draining"
        );
        listening.not_ready(DRAINING);
        let relays = self.registry.relays();
        if *relays.borrow() == 1 {
            lifecycle.lines_ended(timing).await;
            // First the end, so that carriers are not asked to move: there is nowhere to move.
            self.end_all();
            lifecycle.draining.cancel();
            return;
        }
        lifecycle.draining.cancel();
        // So that the others prefer other routes. Without the database they find out by trying.
        let _ = tokio::time::timeout(ANNOUNCE_TIMEOUT, self.registry.drain()).await;
        let has_other_relays = *relays.borrow() > 0;
        lifecycle.emptied(timing, has_other_relays).await;
    }

    fn end_all(&self) {
        self.lifecycle.closing.cancel();
        self.live.close();
    }

    /// Ends everything, and waits for it.
    async fn close(&self) {
        let lifecycle = &self.lifecycle;
        self.end_all();
        lifecycle.tasks.close();
        let ended = tokio::time::timeout(CLOSE_TIMEOUT, lifecycle.tasks.wait());
        if ended.await.is_err() {
            warn!(
                tasks = lifecycle.tasks.len(),
                "some carriers did not end in time"
            );
        }
    }
}
