//! The agent's part in its carriers: proves its identity, accepts their lines, and renews the certificate
//! over them.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::FutureExt as _;
use rand::Rng;
use throwline_certs::Identity;
use throwline_certs::revocation::Keeper;
use throwline_ops::Shutdown;
use throwline_tunnel::carrier::{Carrier, Connection, DialConfig, DialError, IncomingStream, dial};
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{AgentStatus, Role};
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_tunnel::revocations::follow;
use throwline_uplink::{Carriers, RelayTarget, Successor, UplinkHandler};
use tokio::sync::watch;

use crate::config::Config;
use crate::connect_error::ConnectError;
use crate::identity::AgentIdentity;
use crate::lines::LineAcceptor;
use crate::renewal::{self, RenewalError};
use crate::request::ApiServer;
use crate::state::{self, secret::Turn};

mod revocations;

use revocations::Lists;

/// How often a wait for days reads the clock again.
const CLOCK_CHECK: Duration = Duration::from_secs(60);
/// Between attempts to renew a certificate that has expired, ± 20 %: without it there is no line.
const URGENT: Duration = Duration::from_secs(15);
/// The longest wait on a relay's request.
const MAX_WAIT: Duration = Duration::from_secs(3600);

pub(crate) struct AgentUplink {
    pub(crate) identity: Arc<AgentIdentity>,
    pub(crate) acceptor: Arc<LineAcceptor>,
    pub(crate) api_server: Arc<ApiServer>,
    pub(crate) revocations: Arc<Keeper>,
    pub(crate) config: Config,
    pub(crate) status: watch::Receiver<AgentStatus>,
}

impl UplinkHandler for AgentUplink {
    type Error = ConnectError;

    async fn dial(&self, avoid: Vec<String>) -> Result<Connection, ConnectError> {
        let identity = self.identity.identity();
        if is_expired(&identity) {
            return Err(ConnectError::Expired);
        }
        let mut config = self.dial_config(&identity)?;
        config.avoid = avoid;
        Ok(dial(&config).await?)
    }

    fn accept(&self, stream: IncomingStream, retiring: &Shutdown) {
        // A line's task is not bound to the carrier's: its stream reports the carrier's end.
        let acceptor = self.acceptor.clone();
        let class = TrafficClass::Interactive;
        tokio::spawn(acceptor.accept(stream, class, retiring.clone()));
    }

    fn status(&self) -> Option<watch::Receiver<AgentStatus>> {
        Some(self.status.clone())
    }

    async fn follow_revocations(&self, carrier: Carrier, newest: watch::Receiver<u64>) {
        let known = Lists(self.revocations.clone());
        follow(carrier, newest, known).await;
    }

    async fn urgent(&self) {
        if !self.acceptor.lines.has_detached() {
            pending::<()>().await;
        }
    }

    /// This state directory may have been enrolled again meanwhile.
    fn failed(&self, error: &ConnectError) {
        if matches!(
            error,
            ConnectError::Dial(
                DialError::Unauthenticated
                    | DialError::Revoked
                    | DialError::CertificateExpired { .. }
            ) | ConnectError::Expired
        ) && let Ok((identity, _)) = state::identity(&self.config.state_dir)
            && identity.id() == self.identity.identity().id()
            && identity.serial() != self.identity.identity().serial()
            && self.identity.replace(identity).is_ok()
        {
            tracing::info!("the state directory holds a new identity");
        } else if let ConnectError::Dial(DialError::CertificateExpired { .. }) = error {
            self.identity.expired.notify_one();
        }
    }
}

/// The same for the agent's carrier for bulk.
pub(crate) struct BulkUplink(pub(crate) Arc<AgentUplink>);

impl UplinkHandler for BulkUplink {
    type Error = ConnectError;

    async fn dial(&self, _avoid: Vec<String>) -> Result<Connection, ConnectError> {
        let mut config = self.0.dial_config(&self.0.identity.identity())?;
        config.class = TrafficClass::Bulk;
        Ok(dial(&config).await?)
    }

    fn accept(&self, stream: IncomingStream, retiring: &Shutdown) {
        let acceptor = self.0.acceptor.clone();
        tokio::spawn(acceptor.accept(stream, TrafficClass::Bulk, retiring.clone()));
    }

    async fn needed(&self) {
        self.0.acceptor.bulk.needed().await;
    }

    async fn unused(&self, carrier: &Carrier) {
        self.0.acceptor.bulk.unused(carrier).await;
    }
}

impl AgentUplink {
    /// Each carrier is replaced by one that proves the present identity.
    fn replace_carriers(&self, carriers: &Carriers) {
        carriers.replace_all();
        self.acceptor.bulk.carriers().replace_all();
    }

    fn dial_config(&self, identity: &Identity) -> Result<DialConfig, ConnectError> {
        let relay = RelayTarget {
            url: &self.config.relay,
            roots: &self.identity.roots,
            trust: self.config.trust(),
            proxies: &self.config.proxies,
        };
        let mut config = relay.dial_config(identity, Role::Agent, &self.acceptor.instance)?;
        config.shares_identity = self.config.state_secret.is_some();
        config.timing = self.config.timing.carrier.clone();
        if let Some(ws) = &self.config.limits.ws {
            config.ws = ws.clone();
        }
        if let Some(mux) = &self.config.limits.mux {
            config.mux = mux.clone();
        }
        Ok(config)
    }

    /// Renews over a carrier that is there, or over one for this alone if the certificate has expired.
    async fn renew(
        &self,
        carriers: &Carriers,
        is_expired_at_relay: bool,
        successor: &mut Successor,
    ) -> Result<SystemTime, RenewalError> {
        let (agent, state_dir) = (&self.identity, &self.config.state_dir);
        let identity = agent.identity();
        if !is_expired_at_relay && !is_expired(&identity) {
            let end = tokio::time::sleep(until(identity.not_after()));
            tokio::select! {
                carrier = carriers.carrier() => {
                    return renewal::renew(agent, &carrier, state_dir, successor).await;
                }
                // There was no carrier until then, so there will be none with this certificate.
                () = end => {}
            }
        }
        let mut config = self.dial_config(&identity)?;
        config.for_renewal = true;
        let connection = Box::pin(dial(&config)).await.map_err(ConnectError::from)?;
        let renewed = renewal::renew(agent, &connection.carrier, state_dir, successor).await;
        connection.carrier.close(CloseCode::Normal, "renewed");
        renewed
    }
}

/// Renews the certificate at two thirds of its life, or when it has expired; then each carrier is
/// replaced by one that proves the new one. Never ends.
pub(crate) async fn keep_renewed(uplink: Arc<AgentUplink>, carriers: Carriers) {
    let (agent, config) = (&uplink.identity, &uplink.config);
    let upstream = uplink.api_server.upstream();
    let mut successor = Successor::default();
    loop {
        let identity = agent.identity();
        // In parts: the machine may sleep meanwhile, and the clock be set.
        let due = until(identity.renew_at()).min(CLOCK_CHECK);
        let is_expired_at_relay = tokio::select! {
            () = tokio::time::sleep(due) => false,
            () = agent.expired.notified() => true,
        };
        if !is_expired_at_relay && !until(agent.identity().renew_at()).is_zero() {
            continue;
        }
        if let Some(secret) = &config.state_secret {
            match secret
                .turn(upstream, &agent.identity(), &uplink.acceptor.instance)
                .await
            {
                Ok(Turn::Ours) => {}
                Ok(Turn::Renewed(identity)) => {
                    adopt(agent, config, *identity);
                    uplink.replace_carriers(&carriers);
                    continue;
                }
                // Two replicas that renew one certificate with two keys would be reported as a
                // stolen key.
                Ok(Turn::Wait(wait)) => {
                    tokio::time::sleep(wait).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(%error, "the certificate is not renewed, since it could not be saved");
                    pause(config.timing.renew_retry).await;
                    continue;
                }
            }
        }
        let renewed = uplink.renew(&carriers, is_expired_at_relay, &mut successor);
        match renewed.await {
            Ok(not_after) => {
                let days = until(not_after).as_secs() / 86_400;
                tracing::info!(days, "the agent's certificate was renewed");
                uplink.replace_carriers(&carriers);
                if let Some(secret) = &config.state_secret
                    && let Err(error) = secret.save(upstream, &config.state_dir).await
                {
                    // The one in the Secret is valid for another third of its life.
                    tracing::warn!(%error, "the renewed certificate is in the state directory only");
                }
                // A notification about the old one is void.
                let _ = agent.expired.notified().now_or_never();
            }
            Err(error) => {
                let wait = wait_after(&error, is_expired_at_relay, &uplink);
                let hours = until(agent.identity().not_after()).as_secs() / 3600;
                if error.is_final() {
                    tracing::error!(%error, hours, "the agent's certificate cannot be renewed");
                } else {
                    tracing::warn!(%error, hours, "the agent's certificate could not be renewed yet");
                }
                pause(wait).await;
            }
        }
    }
}

/// Uses what another replica has renewed; on a failure the old identity remains, which is valid for a while.
fn adopt(agent: &AgentIdentity, config: &Config, identity: Identity) {
    let saved = identity.save(&config.state_dir);
    match saved.and_then(|()| agent.replace(identity)) {
        Ok(()) => tracing::info!("another replica has renewed the agent's certificate"),
        Err(error) => {
            tracing::warn!(%error, "the certificate that another replica has renewed cannot be used")
        }
    }
}

async fn pause(mean: Duration) {
    let share = rand::rng().random_range(0.8..1.2);
    tokio::time::sleep(mean.mul_f64(share)).await;
}

/// Until the next attempt: what the relay asks for; else less where nothing works before it.
fn wait_after(error: &RenewalError, is_expired_at_relay: bool, uplink: &AgentUplink) -> Duration {
    let usual = uplink.config.timing.renew_retry;
    let is_urgent = is_expired_at_relay || is_expired(&uplink.identity.identity());
    match error.retry_after() {
        Some(asked) => asked.clamp(Duration::from_secs(1), MAX_WAIT),
        None if is_urgent && !error.is_final() => usual.min(URGENT),
        None => usual,
    }
}

/// By this machine's clock.
fn is_expired(identity: &Identity) -> bool {
    identity.not_after() <= SystemTime::now()
}

fn until(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::now()).unwrap_or_default()
}
