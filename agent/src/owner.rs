//! The enrolled agent as the owner of its carriers: it proves its identity, takes their lines, and
//! keeps the certificate renewed over them.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::Rng;
use throwline_certs::{Identity, jws, sha256, tls};
use throwline_ops::Shutdown;
use throwline_tunnel::carrier::{DialConfig, DialError, IncomingStream, Prover};
use throwline_tunnel::proto::messages::{AgentStatus, Role};
use tokio::sync::watch;

use crate::agent::Agent;
use crate::carriers::{Any, Failure, Owner};
use crate::config::Config;
use crate::{lines, renewal, state};

pub(crate) struct Enrolled {
    pub(crate) agent: Arc<Agent>,
    pub(crate) config: Config,
    pub(crate) status: watch::Receiver<AgentStatus>,
}

impl Owner for Enrolled {
    fn dialling(&self) -> Result<DialConfig, Failure> {
        let identity = self.agent.identity();
        let plaintext = self.config.relay.scheme() == "http";
        let tls = (!plaintext)
            .then(|| tls::carrier_client(&self.agent.roots, self.config.extra_ca.as_deref()));
        let mut dialling = DialConfig::new(
            self.config.relay.clone(),
            tls.transpose()?,
            Arc::new(prover(&identity)),
            Role::Agent,
            self.agent.instance.clone(),
        );
        dialling.timing = self.config.timing.carrier.clone();
        let extra_ca = self.config.extra_ca.as_deref();
        let proxy_tls = || tls::proxy_client(extra_ca);
        dialling.proxies = (self.config.proxies).trusting(&self.config.relay, proxy_tls)?;
        if let Some(ws) = &self.config.limits.ws {
            dialling.ws = ws.clone();
        }
        if let Some(mux) = &self.config.limits.mux {
            dialling.mux = mux.clone();
        }
        Ok(dialling)
    }

    fn take(&self, stream: IncomingStream, leaving: &Shutdown) {
        // A line's task is not bound to the carrier's: its stream tells it when the carrier is gone.
        tokio::spawn(lines::take(self.agent.clone(), stream, leaving.clone()));
    }

    fn status(&self) -> watch::Receiver<AgentStatus> {
        self.status.clone()
    }

    fn is_awaited(&self) -> bool {
        self.agent.kept.is_awaited()
    }

    /// Somebody may have enrolled this state directory anew.
    fn failed(&self, failure: &Failure) {
        if matches!(
            failure,
            Failure::Dial(DialError::Unauthenticated | DialError::CertificateExpired { .. })
        ) && let Ok((identity, _)) = state::identity(&self.config.state_dir)
            && identity.id() == self.agent.identity().id()
            && identity.serial() != self.agent.identity().serial()
            && self.agent.replace(identity).is_ok()
        {
            tracing::info!("the state directory holds a new identity");
        }
    }
}

/// Renews the certificate at two thirds of its life, over whichever carrier is up; then each
/// carrier is replaced by one that proves the new one. Never ends.
pub(crate) async fn keep_renewed(agent: Arc<Agent>, config: Config, carriers: Any) {
    loop {
        tokio::time::sleep(until(agent.identity().renew_at())).await;
        let carrier = carriers.carrier().await;
        match renewal::renew(&agent, &carrier, &config.state_dir).await {
            Ok(not_after) => {
                let days = until(not_after).as_secs() / 86_400;
                tracing::info!(days, "the agent's certificate was renewed");
                carriers.replace_all();
            }
            Err(error) => {
                let hours = until(agent.identity().not_after()).as_secs() / 3600;
                tracing::warn!(%error, hours, "the agent's certificate could not be renewed yet");
                let share = rand::rng().random_range(0.8..1.2);
                tokio::time::sleep(config.timing.renew_retry.mul_f64(share)).await;
            }
        }
    }
}

fn prover(identity: &Arc<Identity>) -> Prover {
    let (asserting, signing) = (identity.clone(), identity.clone());
    Prover {
        assertion: Box::new(move |claims| Ok(jws::sign(&asserting, claims)?)),
        sign: Box::new(move |message| Ok(signing.sign(message)?)),
        sha256,
        id: identity.id().to_string(),
    }
}

fn until(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::now()).unwrap_or_default()
}
