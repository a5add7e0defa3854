//! Keeps one carrier to the relay, for ever: dials, serves, and dials anew when it is lost, when the
//! relay drains, when the certificate was renewed, or when it has grown old.
//!
//! A replacement is made before the old carrier is let go, so that no user notices.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::Rng;
use throwline_certs::{Identity, jws, sha256, tls};
use throwline_ops::ReadinessGuard;
use throwline_tunnel::carrier::{Carrier, Connection, DialConfig, DialError, Prover, dial};
use throwline_tunnel::message;
use throwline_tunnel::proto::backoff::Backoff;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    AgentStatus, Control, ControlKind, ControlMessage, Drain, Role, StreamHeader, StreamKind,
};
use throwline_tunnel::proto::wire::CONTROL_CAP;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::config::Config;
use crate::error::Error;
use crate::metrics::Held;
use crate::said::Said;
use crate::{lines, renewal, state};

pub(crate) struct Keeper {
    agent: Arc<Agent>,
    config: Config,
    status: watch::Receiver<AgentStatus>,
    ready: ReadinessGuard,
    said: Said,
    backoff: Backoff,
    /// Each carrier's tasks, the old ones that are let go among them.
    serving: JoinSet<()>,
}

/// The carriers that outlive the keeper, while their sessions drain.
pub(crate) struct Left {
    current: Option<Carrier>,
    serving: JoinSet<()>,
}

/// Why the present carrier needs a successor.
enum Due {
    Lost,
    Replace,
    Stop,
}

impl Keeper {
    pub(crate) fn new(
        agent: Arc<Agent>,
        config: Config,
        status: watch::Receiver<AgentStatus>,
        ready: ReadinessGuard,
    ) -> Self {
        let backoff = Backoff::new(config.timing.backoff);
        Self {
            agent,
            config,
            status,
            ready,
            said: Said::default(),
            backoff,
            serving: JoinSet::new(),
        }
    }

    /// Ends with the shutdown only; gives back what still carries sessions.
    pub(crate) async fn run(mut self) -> Left {
        let shutdown = self.agent.shutdown.clone();
        let mut current: Option<Carrier> = None;
        loop {
            let dialled = tokio::select! {
                dialled = self.dial() => dialled,
                () = shutdown.requested() => break,
            };
            let due = match dialled {
                Ok(connection) => {
                    let (since, drain) = (Instant::now(), watch::channel(None));
                    let carrier = self.serve(connection, drain.0);
                    if let Some(old) = current.replace(carrier.clone()) {
                        self.serving.spawn(let_go(old));
                    }
                    let due = self.until_due(&carrier, drain.1).await;
                    self.backoff.lived(since.elapsed());
                    due
                }
                Err(error) => {
                    self.failed(&error);
                    Due::Lost
                }
            };
            let wait = match due {
                Due::Stop => break,
                Due::Replace => Duration::ZERO,
                Due::Lost => {
                    if current.as_ref().is_none_or(Carrier::is_closed) {
                        self.ready.not_ready("no carrier to a relay");
                    }
                    self.backoff.next(&mut rand::rng())
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = shutdown.requested() => break,
            }
            while self.serving.try_join_next().is_some() {}
        }
        self.ready.not_ready("the agent is stopping");
        Left {
            current,
            serving: self.serving,
        }
    }

    async fn dial(&self) -> Result<Connection, Failure> {
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
        Ok(Box::pin(dial(&dialling)).await?)
    }

    fn serve(&mut self, connection: Connection, drain: watch::Sender<Option<Drain>>) -> Carrier {
        let Connection {
            carrier,
            mut incoming,
            ..
        } = connection;
        if self.said.recovered() {
            tracing::info!(carrier = carrier.id(), "connected to the relay again");
        } else {
            tracing::info!(carrier = carrier.id(), relay = %self.config.relay, "connected to the relay");
        }
        self.ready.ready();
        let held = Held::new(&self.agent.gateway.metrics().carriers);
        let agent = self.agent.clone();
        let control = control(carrier.clone(), self.status.clone(), drain);
        self.serving.spawn(async move {
            let _held = held;
            let control = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(control));
            // A line's task is not bound to the carrier's: its stream tells it when the carrier is gone.
            while let Some(stream) = incoming.next().await {
                tokio::spawn(lines::take(agent.clone(), stream));
            }
            drop(control);
        });
        carrier
    }

    /// Waits until the carrier needs a successor, renewing the certificate on the way.
    async fn until_due(
        &mut self,
        carrier: &Carrier,
        mut drain: watch::Receiver<Option<Drain>>,
    ) -> Due {
        let rotate = Instant::now() + jittered(self.config.timing.rotate);
        let mut renew = Instant::now() + until(self.agent.identity().renew_at());
        let shutdown = self.agent.shutdown.clone();
        loop {
            tokio::select! {
                reason = carrier.closed() => {
                    if let Some(silent) = self.said.say("lost", Instant::now()) {
                        tracing::warn!(%reason, silent, "the carrier to the relay was lost");
                    }
                    return Due::Lost;
                }
                () = tokio::time::sleep_until(rotate) => return Due::Replace,
                () = tokio::time::sleep_until(renew) => {
                    if self.renew(carrier).await {
                        return Due::Replace;
                    }
                    renew = Instant::now() + jittered(self.config.timing.renew_retry);
                }
                Ok(()) = drain.changed() => {
                    let Some(asked) = drain.borrow_and_update().clone() else { continue };
                    let spread = Duration::from_millis(asked.spread_ms).min(self.config.timing.backoff.max_asked);
                    let delay = Duration::from_millis(asked.delay_ms).min(self.config.timing.backoff.max_asked);
                    let wait = delay + spread.mul_f64(rand::rng().random::<f64>());
                    tracing::info!(reason = asked.reason, ?wait, "the relay drains; moving to another");
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        _ = carrier.closed() => {}
                        () = shutdown.requested() => return Due::Stop,
                    }
                    return Due::Replace;
                }
                () = shutdown.requested() => return Due::Stop,
            }
        }
    }

    async fn renew(&mut self, carrier: &Carrier) -> bool {
        match renewal::renew(&self.agent, carrier, &self.config.state_dir).await {
            Ok(not_after) => {
                let days = until(not_after).as_secs() / 86_400;
                tracing::info!(days, "the agent's certificate was renewed");
                true
            }
            Err(error) => {
                let hours = until(self.agent.identity().not_after()).as_secs() / 3600;
                tracing::warn!(%error, hours, "the agent's certificate could not be renewed yet");
                false
            }
        }
    }

    fn failed(&mut self, error: &Failure) {
        let kind = error.kind();
        self.agent
            .gateway
            .metrics()
            .connect_failures
            .with_label_values(&[kind])
            .inc();
        if let Failure::Dial(error) = error
            && let Some(after) = error.retry_after()
        {
            self.backoff.honour(after);
        }
        if let Some(silent) = self.said.say(kind, Instant::now()) {
            tracing::warn!(%error, silent, relay = %self.config.relay, "cannot connect to the relay; trying on");
        }
        // Somebody may have enrolled this state directory anew.
        if matches!(
            error,
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

impl Left {
    /// Tells the relay that this agent goes away, and waits until it has been said.
    pub(crate) async fn close(mut self) {
        if let Some(carrier) = &self.current {
            carrier.close(CloseCode::GoingAway, "the agent stops");
            let _ = tokio::time::timeout(Duration::from_secs(2), carrier.closed()).await;
        }
        self.serving.shutdown().await;
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Dial(#[from] DialError),
    /// A CA file that cannot be read, and the like.
    #[error(transparent)]
    Own(#[from] throwline_certs::Error),
    #[error(transparent)]
    State(#[from] Error),
}

impl Failure {
    /// For the log's memory and the metric's label.
    fn kind(&self) -> &'static str {
        match self {
            Self::Own(_) | Self::State(_) => "own-files",
            Self::Dial(error) => match error {
                DialError::BadUrl { .. } => "bad-url",
                DialError::Resolve { .. } => "resolve",
                DialError::Connect { .. } => "connect",
                DialError::Tls { .. } => "tls",
                DialError::Proxy { fault, .. } => fault.kind(),
                DialError::UnknownIssuer { .. } => "unknown-issuer",
                DialError::ServerCertificateExpired { .. } => "server-certificate-expired",
                DialError::WrongHost { .. } => "wrong-host",
                DialError::Http { .. } => "http",
                DialError::NotARelay { .. } => "not-a-relay",
                DialError::Unauthenticated => "unauthenticated",
                DialError::ClockSkew { .. } => "clock-skew",
                DialError::CertificateExpired { .. } => "certificate-expired",
                DialError::Version { .. } => "version",
                DialError::Refused(_) => "refused",
                DialError::Timeout { .. } => "timeout",
                _ => "other",
            },
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

/// The control stream: our status whenever it changes, the relay's wishes as they come.
async fn control(
    carrier: Carrier,
    mut status: watch::Receiver<AgentStatus>,
    drain: watch::Sender<Option<Drain>>,
) {
    let header = StreamHeader {
        kind: Some(StreamKind::Control(Control::default())),
    };
    let stream = match carrier.open(header).await {
        Ok((stream, _)) => stream,
        Err(error) => return tracing::warn!(%error, "the relay took no control stream"),
    };
    let (mut read, mut write) = tokio::io::split(stream);
    let sending = async {
        loop {
            let now = status.borrow_and_update().clone();
            // Nothing is known before the first answer of the API server.
            if now != AgentStatus::default() {
                let told = ControlMessage {
                    kind: Some(ControlKind::AgentStatus(now)),
                };
                message::write(&mut write, &told, CONTROL_CAP).await?;
            }
            if status.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    };
    let receiving = async {
        loop {
            let told: ControlMessage = message::read(&mut read, CONTROL_CAP).await?;
            // Kinds of a later version are not for us.
            if let Some(ControlKind::Drain(asked)) = told.kind {
                let _ = drain.send(Some(asked));
            }
        }
    };
    let ended: std::io::Result<()> = tokio::select! {
        ended = sending => ended,
        ended = receiving => ended,
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "the control stream has ended");
    }
    // The drain's sender lives as long as the carrier, so that its receiver never sees an end.
    carrier.closed().await;
}

/// Lets an old carrier go once its lines have ended; the relay ends it with its certificate at the latest.
async fn let_go(carrier: Carrier) {
    // The control stream stays to the end.
    while carrier.streams() > 1 {
        tokio::select! {
            _ = carrier.closed() => return,
            () = tokio::time::sleep(Duration::from_secs(1)) => {}
        }
    }
    // A stream that the relay has just opened is answered before.
    tokio::time::sleep(Duration::from_secs(1)).await;
    carrier.close(CloseCode::Normal, "replaced by a newer carrier");
}

fn until(at: SystemTime) -> Duration {
    at.duration_since(SystemTime::now()).unwrap_or_default()
}

fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.8 + 0.4 * rand::rng().random::<f64>())
}
