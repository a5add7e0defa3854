//! Opens sealed sessions over the carrier, and has their lines kept.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::future::BoxFuture;
use throwline_certs::{Kind, PeerIdentity, SpiffeId, Validator, tls};
use throwline_tunnel::carrier::OpenError;
use throwline_tunnel::line::{self, Handle};
use throwline_tunnel::proto::messages::{LineHello, LineKind, Open, RefusalCode};
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_tunnel::{mux, proto, session};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use super::line_supervisor::LineSupervisor;
use super::{Held, HeldLine, Link, PlainLine};
use crate::failure::Failure;
use crate::session::dial::{Dial, Dialed, Epoch};
use crate::session::errors::{line_error, open_error, session_error};
use crate::store::Credentials;

/// From the open's reply to the line's own. The same reasoning as a handshake's.
const LINE_HELLO: Duration = Duration::from_secs(10);
/// Between attempts to open a session while something on the way to it changes.
const AGAIN: Duration = Duration::from_millis(100);

impl Link {
    /// Opens a session. A loss during this has no effect on a request, so it is tried again, as long as a
    /// request waits for a relay.
    async fn open(&self, cluster: &str, kind: LineKind) -> Result<Dialed, Failure> {
        let deadline = Instant::now() + self.0.timing.wait_for_relay;
        loop {
            let failure = match self.open_once(cluster, kind).await {
                Ok(dialed) => return Ok(dialed),
                Err(failure) => failure,
            };
            let may_go_well = match &failure {
                Failure::Lost { .. } => true,
                Failure::Refused { refusal, .. } => refusal.code() == RefusalCode::Draining,
                _ => false,
            };
            if !may_go_well || Instant::now() >= deadline {
                return Err(failure);
            }
            tracing::debug!(cluster, %failure, "a session is opened again");
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn open_once(&self, cluster: &str, kind: LineKind) -> Result<Dialed, Failure> {
        let line_id: [u8; 16] = rand::random();
        // Before the carrier is taken: a change of identity in between makes this session one of
        // the old epoch.
        let now = self.epoch();
        let class = TrafficClass::Interactive;
        let (carrier, epoch) = self.carrier(class).await?;
        let open = Open {
            version: proto::VERSION,
            cluster: cluster.to_owned(),
            line_id: line_id.to_vec(),
            kind: kind.into(),
            detached_ms: u32::try_from(self.0.timing.detached_life.as_millis()).unwrap_or(u32::MAX),
            ..Open::default()
        };
        let (stream, reply) = carrier.open(open.into()).await.map_err(|error| {
            // The next carrier is dialled at once: the time that the relay allows for moving is for
            // carriers without open requests.
            let moving = match &error {
                OpenError::CarrierLost(_) => true,
                OpenError::Refused(refusal) => refusal.code() == RefusalCode::Draining,
                _ => false,
            };
            if moving {
                self.replace(class, epoch);
            }
            open_error(cluster, error)
        })?;
        self.0.metrics.lines.inc();
        // The same id as in `Open`, so that both ends and the relay refer to one line.
        let hello = LineHello::new(line_id, self.0.timing.detached_life);
        let began = Instant::now();
        let line = timeout(
            LINE_HELLO,
            line::connect(stream, hello, self.0.line_budgets.clone()),
        )
        .await
        .map_err(|_| Failure::Timeout {
            cluster: cluster.to_owned(),
            seconds: LINE_HELLO.as_secs(),
        })?
        .map_err(|error| line_error(cluster, error))?;
        let greeted = began.elapsed();
        let Held {
            credentials,
            revocations,
        } = self.0.held();
        let validator = revocations.validator();
        // The certificate is read now, not when the carrier was dialled: it may have been renewed
        // since.
        let config = session_config(&credentials, validator, cluster, kind)?;
        let began = Instant::now();
        let io = session::connect(line, config, tls::session_name())
            .await
            .map_err(|error| session_error(cluster, error))?;
        // Each took one; a busy machine makes one longer rather than both.
        let round_trip = greeted.min(began.elapsed());
        let (under, tls) = io.get_ref();
        // TLS has verified the chain for this cluster; the identity is kept for later revocations.
        let chain = tls.peer_certificates().unwrap_or_default();
        let agent = tls::peer_of(chain).map_err(Failure::internal)?;
        let line = under.handle();
        if line.is_none() {
            self.note(under.ender(), agent.clone());
        }
        if let Some(handle) = &line {
            let suspect = Arc::new(Notify::new());
            let fingerprint = credentials.identity.as_peer().fingerprint;
            self.supervise(
                fingerprint,
                agent.clone(),
                LineSupervisor {
                    link: self.clone(),
                    handle: handle.clone(),
                    cluster: cluster.to_owned(),
                    kind,
                    agent_instance: reply.agent_instance,
                    carrier,
                    epoch,
                    class,
                    suspect,
                    reclassify_at: Instant::now(),
                },
            );
        }
        // After the line was registered, so that no revocation list arrives in between.
        if validator.is_revoked(&agent) {
            self.end_revoked(&revocations);
            let cluster = cluster.to_owned();
            return Err(Failure::ClusterRevoked { cluster });
        }
        Ok(Dialed {
            io: Box::new(io),
            epoch: Epoch {
                generation: now.generation,
                carrier: epoch,
            },
            line,
            round_trip,
        })
    }

    /// Has a line kept until it is over.
    fn supervise(&self, fingerprint: [u8; 32], agent: PeerIdentity, supervisor: LineSupervisor) {
        let mut lines = self.lock_lines();
        while lines.supervisors.try_join_next().is_some() {}
        let number = lines.next;
        lines.next += 1;
        let held = HeldLine {
            handle: supervisor.handle.clone(),
            suspect: supervisor.suspect.clone(),
            cluster: supervisor.cluster.clone(),
            agent,
            fingerprint,
        };
        lines.held.insert(number, held);
        let link = self.clone();
        lines.supervisors.spawn(async move {
            supervisor.run().await;
            link.lock_lines().held.remove(&number);
        });
        drop(lines);
        self.0.kept.notify_one();
    }

    /// Notes a line that ends with its stream, until it has.
    fn note(&self, handle: Handle<mux::Stream>, agent: PeerIdentity) {
        let mut lines = self.lock_lines();
        while lines.supervisors.try_join_next().is_some() {}
        let number = lines.next;
        lines.next += 1;
        let mut phases = handle.phases();
        lines.plain.insert(number, PlainLine { handle, agent });
        let link = self.clone();
        lines.supervisors.spawn(async move {
            let _ = phases.wait_for(|phase| phase.over).await;
            link.lock_lines().plain.remove(&number);
        });
    }
}

impl Dial for Link {
    fn dial<'a>(
        &'a self,
        cluster: &'a str,
        kind: LineKind,
    ) -> BoxFuture<'a, Result<Dialed, Failure>> {
        Box::pin(self.open(cluster, kind))
    }

    fn epoch(&self) -> Epoch {
        Epoch {
            generation: self.0.generation.load(Ordering::Acquire),
            carrier: self.0.interactive.carriers.epoch(),
        }
    }
}

fn session_config(
    credentials: &Credentials,
    validator: &Validator,
    cluster: &str,
    kind: LineKind,
) -> Result<Arc<rustls::ClientConfig>, Failure> {
    let domain = validator.domain().clone();
    let expect = SpiffeId::new(domain, Kind::Cluster, cluster).map_err(Failure::internal)?;
    let alpn = match kind {
        LineKind::Upgrade => tls::Alpn::Http11,
        LineKind::Api | LineKind::Unspecified => tls::Alpn::H2,
    };
    tls::session_client(&credentials.identity, validator, expect, alpn).map_err(Failure::internal)
}
