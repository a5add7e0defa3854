//! A carrier's life on the relay: from its proof to its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Response, StatusCode};
use throwline_certs::{Kind, PeerIdentity, SpiffeId};
use throwline_tunnel::carrier::{AcceptError, Connection, IncomingStream};
use throwline_tunnel::http1::Rewound;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    ControlKind, ControlMessage, Drain, Proof, Refusal, RefusalCode, RelaySet, StreamKind,
    StreamReply,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tracing::{Instrument, debug, error, info, info_span, warn};

use crate::control::Control;
use crate::listener::Door;
use crate::public::Admitted;
use crate::registry::{Membership, Status, Tunnel};
use crate::relay::Shared;
use crate::response::{self, Body};
use crate::tally::{Share, Tally};
use crate::{list, open, renew};

/// How long a closing carrier may take to say so.
const GOODBYE: Duration = Duration::from_secs(2);
/// How long what a carrier has brought may take to be passed on, after its end.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long the authority may take to note a status.
const RECORD: Duration = Duration::from_secs(5);
/// How often a long wait for the end of a certificate looks at the clock again, which may have
/// been set in between.
const CLOCK_CHECK: Duration = Duration::from_secs(600);

/// A peer that proved who it is.
pub(crate) struct Established {
    pub(crate) peer: Arc<Peer>,
    proof: Proof,
    connection: Connection,
    seat: Seat,
}

impl Established {
    /// Who it proved to be.
    pub(crate) fn id(&self) -> &SpiffeId {
        &self.peer.identity.id
    }
}

/// What the relay knows of the far end of a carrier. All of it but the address is from its
/// certificate.
pub(crate) struct Peer {
    pub(crate) identity: PeerIdentity,
    pub(crate) client: SocketAddr,
}

/// The places for carriers.
pub(crate) struct Seats {
    all: Arc<Semaphore>,
    per_identity: Tally,
}

/// One of them.
pub(crate) struct Seat {
    _one_of_all: OwnedSemaphorePermit,
    _one_of_its_own: Share,
}

#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(crate) enum Full {
    #[error("the relay holds as many carriers as it may")]
    Relay,
    #[error("this identity holds as many carriers as it may")]
    Identity,
}

impl Seats {
    pub(crate) fn new(all: usize, per_identity: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all.min(Semaphore::MAX_PERMITS))),
            per_identity: Tally::new(per_identity),
        }
    }

    pub(crate) fn take(&self, peer: &PeerIdentity) -> Result<Seat, Full> {
        let all = Arc::clone(&self.all);
        Ok(Seat {
            _one_of_all: all.try_acquire_owned().map_err(|_| Full::Relay)?,
            _one_of_its_own: self
                .per_identity
                .take(&peer.id.to_string())
                .ok_or(Full::Identity)?,
        })
    }
}

impl Full {
    pub(crate) fn response(self) -> Response<Body> {
        let (status, message) = match self {
            Self::Relay => (
                StatusCode::SERVICE_UNAVAILABLE,
                "this relay is full; try again later",
            ),
            Self::Identity => (
                StatusCode::TOO_MANY_REQUESTS,
                "this identity is connected too many times; is it in use elsewhere?",
            ),
        };
        let wait = Duration::from_secs(15);
        response::retry_after(response::problem(status, "limit", message), wait)
    }
}

pub(crate) async fn establish<T>(
    shared: &Arc<Shared>,
    door: &Door,
    admitted: Admitted,
    io: Rewound<T>,
) -> Option<Established>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Admitted {
        admission,
        seat,
        client,
    } = admitted;
    match door.gate(shared).establish(&admission, io).await {
        Ok((connection, proof)) => {
            shared.metrics.handshake("accepted");
            Some(Established {
                peer: Arc::new(Peer {
                    identity: admission.peer,
                    client,
                }),
                proof,
                connection,
                seat,
            })
        }
        Err(AcceptError::Declined) => {
            shared.metrics.handshake("declined");
            debug!(%client, peer = %admission.peer.id, "a dialer wants another relay");
            None
        }
        Err(error) => {
            shared.metrics.handshake("proof-failed");
            warn!(%client, peer = %admission.peer.id, %error, "a carrier did not prove itself");
            None
        }
    }
}

/// Serves a carrier until it ends, for whatever reason, and leaves nothing of it behind.
pub(crate) async fn run(shared: Arc<Shared>, established: Established) {
    let Established {
        peer,
        proof,
        connection,
        seat,
    } = established;
    let span = info_span!(
        "carrier",
        id = connection.carrier.id(),
        peer = %peer.identity.id,
        client = %peer.client,
    );
    let work = async {
        info!(software = %proof.software, instance = %proof.instance, "a carrier is up");
        let kind = peer.identity.id.kind();
        let counted = shared.metrics.carrier(role(kind));
        let to_move = (kind != Kind::Relay).then(|| shared.carriers.guard());
        let carrier = connection.carrier.clone();
        let tunnel = (kind == Kind::Cluster).then(|| {
            Arc::new(Tunnel::new(
                peer.identity.id.name().to_owned(),
                proof.instance.clone(),
                carrier.clone(),
            ))
        });
        let membership = match &tunnel {
            Some(tunnel) => Some(shared.registry.join(Arc::clone(tunnel)).await),
            None => None,
        };
        Session::new(Arc::clone(&shared), peer, connection, tunnel.clone())
            .serve(&proof.software)
            .await;
        leave(&shared, tunnel, membership).await;
        if let Ok(reason) = tokio::time::timeout(GOODBYE, carrier.closed()).await {
            info!(%reason, "a carrier is down");
        }
        drop((counted, seat, to_move));
    };
    work.instrument(span).await;
}

async fn leave(shared: &Shared, tunnel: Option<Arc<Tunnel>>, membership: Option<Membership>) {
    // The route goes first: a database may take its time.
    drop(membership);
    let Some(tunnel) = tunnel else { return };
    if let Err(error) = shared.authority.record_disconnected(&tunnel.cluster).await {
        warn!(%error, "cannot record that an agent left");
    }
}

fn role(kind: Kind) -> &'static str {
    match kind {
        Kind::Cluster => "agent",
        Kind::User => "local-proxy",
        Kind::Relay => "relay",
    }
}

struct Session {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    connection: Connection,
    tunnel: Option<Arc<Tunnel>>,
    control: Option<Control>,
    told_relays: u32,
    /// One task for each stream that is not done. They end with the session.
    streams: JoinSet<()>,
}

impl Session {
    fn new(
        shared: Arc<Shared>,
        peer: Arc<Peer>,
        connection: Connection,
        tunnel: Option<Arc<Tunnel>>,
    ) -> Self {
        Self {
            shared,
            peer,
            told_relays: connection.relay.relays,
            connection,
            tunnel,
            control: None,
            streams: JoinSet::new(),
        }
    }

    async fn serve(mut self, software: &str) {
        self.record_arrival(software);
        let shared = Arc::clone(&self.shared);
        let expiry = until(self.peer.identity.not_after, || shared.authority.now());
        tokio::pin!(expiry);
        let mut told_to_move = false;
        let mut relays = shared.relays.clone();
        // A registry that never changes has dropped its end.
        let mut may_change = self.tunnel.is_some();
        let (code, reason) = loop {
            tokio::select! {
                stream = self.connection.incoming.next() => match stream {
                    Some(stream) => self.take(stream).await,
                    None => break (CloseCode::Normal, "the carrier ended"),
                },
                Some(ended) = self.streams.join_next(), if !self.streams.is_empty() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "a stream's task panicked");
                    }
                }
                heard = Control::heard(&mut self.control) => match heard {
                    Ok(Some(message)) => self.hear(message).await,
                    Ok(None) => self.control = None,
                    // Whatever cut it tells the carrier too, and with a better reason.
                    Err(error) if error.kind() != std::io::ErrorKind::InvalidData => {
                        debug!(%error, "the control stream was cut");
                        self.control = None;
                    }
                    Err(error) => {
                        warn!(%error, "the control stream is broken");
                        break (CloseCode::Protocol, "the control stream is broken");
                    }
                },
                changed = relays.changed(), if may_change => {
                    may_change = changed.is_ok();
                    self.tell_relays().await;
                }
                () = &mut expiry => break (CloseCode::Expired, "the certificate has expired"),
                () = shared.draining.cancelled(), if !told_to_move => {
                    told_to_move = true;
                    self.ask_to_move().await;
                }
                () = shared.closing.cancelled() => {
                    break (CloseCode::GoingAway, "the relay is stopping");
                }
            }
        };
        if self.connection.carrier.is_closed() {
            self.see_off();
        }
        // Readers first: a stream that is read while its connection closes would hang.
        self.streams.shutdown().await;
        self.connection.carrier.close(code, reason);
    }

    /// What the carrier has brought before it ended still goes its way: an agent that is not told
    /// of a line's end keeps it for its proxy.
    fn see_off(&mut self) {
        let mut streams = std::mem::take(&mut self.streams);
        let closing = self.shared.closing.clone();
        self.shared.tasks.spawn(async move {
            let all = async { while streams.join_next().await.is_some() {} };
            let _ = closing
                .run_until_cancelled(tokio::time::timeout(LAST_WORDS, all))
                .await;
        });
    }

    fn record_arrival(&mut self, software: &str) {
        let Some(tunnel) = &self.tunnel else { return };
        let shared = Arc::clone(&self.shared);
        let cluster = tunnel.cluster.clone();
        let version = version_of(software);
        self.streams.spawn(async move {
            // Never closed, so never an error.
            let _one_of_few = shared.recording.acquire().await;
            if let Err(error) = shared.authority.record_connected(&cluster, &version).await {
                warn!(%error, "cannot record that an agent came");
            }
        });
    }

    async fn take(&mut self, stream: IncomingStream) {
        let shared = Arc::clone(&self.shared);
        let peer = Arc::clone(&self.peer);
        match stream.header.kind.clone() {
            Some(StreamKind::Open(wanted)) => {
                self.streams
                    .spawn(open::handle(shared, peer, stream, wanted).in_current_span());
            }
            Some(StreamKind::ListClusters(_)) => {
                self.streams
                    .spawn(list::handle(shared, peer, stream).in_current_span());
            }
            Some(StreamKind::Renew(wanted)) => {
                self.streams
                    .spawn(renew::handle(shared, peer, stream, wanted).in_current_span());
            }
            Some(StreamKind::Control(_)) if self.control.is_none() => {
                match stream.accept(StreamReply::accepted()).await {
                    Ok(stream) => self.control = Some(Control::new(stream)),
                    Err(error) => debug!(%error, "the control stream ended at once"),
                }
                self.tell_relays().await;
                if self.shared.draining.is_cancelled() {
                    self.ask_to_move().await;
                }
            }
            Some(StreamKind::Control(_)) => {
                let second =
                    Refusal::new(RefusalCode::BadRequest, "a carrier has one control stream");
                self.streams
                    .spawn(async move { shared.refuse(stream, second).await });
            }
            // The tunnel refuses these by itself; whichever of the two sees one first.
            None => {
                let unknown = Refusal::new(
                    RefusalCode::Unsupported,
                    "this relay does not know that kind of stream",
                );
                self.streams
                    .spawn(async move { shared.refuse(stream, unknown).await });
            }
        }
    }

    async fn hear(&self, message: ControlMessage) {
        match (message.kind, &self.tunnel) {
            (Some(ControlKind::AgentStatus(status)), Some(tunnel)) => {
                let status = Status {
                    kubernetes_version: short(status.kubernetes_version),
                    agent_version: short(status.agent_version),
                    api_server_reachable: status.api_server_reachable,
                    message: short(status.message),
                };
                debug!(
                    kubernetes = %status.kubernetes_version,
                    reachable = status.api_server_reachable,
                    "an agent told its status"
                );
                let before = tunnel.set_status(status.clone());
                if before.is_none_or(|before| !before.same_versions(&status)) {
                    self.record_status(&tunnel.cluster, &status).await;
                }
            }
            // A proxy has no status, a dialer does not drain us, and the rest is from the future.
            (kind, _) => debug!(?kind, "ignored a control message"),
        }
    }

    /// For the time when the agent is away. Awaited in its turn, so that an agent that tells
    /// news without end waits for the database, and nobody else does.
    async fn record_status(&self, cluster: &str, status: &Status) {
        let recorded = self.shared.authority.record_status(
            cluster,
            &status.kubernetes_version,
            &status.agent_version,
        );
        match tokio::time::timeout(RECORD, recorded).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "cannot record an agent's status"),
            Err(_) => warn!("recording an agent's status took too long"),
        }
    }

    /// An agent keeps its carriers to different relays, if it knows that there are some.
    async fn tell_relays(&mut self) {
        let relays = *self.shared.relays.borrow();
        let (Some(_), Some(control)) = (&self.tunnel, &mut self.control) else {
            return;
        };
        if relays == 0 || relays == self.told_relays {
            return;
        }
        self.told_relays = relays;
        let set = ControlKind::RelaySet(RelaySet { relays });
        if let Err(error) = control.tell(&set.into()).await {
            debug!(%error, "an agent could not be told how many relays there are");
        }
    }

    async fn ask_to_move(&mut self) {
        let Some(control) = &mut self.control else {
            return;
        };
        let spread = self.shared.config.timing.drain_spread;
        let drain = Drain {
            delay_ms: 0,
            spread_ms: u64::try_from(spread.as_millis()).unwrap_or(u64::MAX),
            reason: "the relay is stopping".into(),
        };
        if let Err(error) = control.tell(&ControlKind::Drain(drain).into()).await {
            debug!(%error, "a peer could not be told to move");
        }
    }
}

/// `NAME/VERSION`, as peers introduce themselves.
fn version_of(software: &str) -> String {
    let version = software.rsplit_once('/').map_or("", |(_, version)| version);
    short(version.to_owned())
}

/// What an agent says of itself is shown to every user, so it may not be long.
fn short(mut text: String) -> String {
    const MOST: usize = 256;
    if let Some(end) = (0..=MOST).rev().find(|at| text.is_char_boundary(*at))
        && text.len() > MOST
    {
        text.truncate(end);
    }
    text
}

/// Ends at a moment of the authority's clock.
async fn until(end: SystemTime, now: impl Fn() -> SystemTime) {
    while let Ok(left) = end.duration_since(now()) {
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(CLOCK_CHECK)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agents_words_are_cut_at_a_character() {
        assert_eq!(short("v1.36.0".into()), "v1.36.0");
        assert_eq!(short("é".repeat(200)).len(), 256);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_is_noticed() {
        let start = SystemTime::now();
        let looks = std::cell::Cell::new(0);
        let clock = || {
            looks.set(looks.get() + 1);
            // A year to go; at the second look it has passed.
            start + Duration::from_secs(400 * 86_400 * (looks.get() - 1))
        };
        let waited = tokio::time::Instant::now();
        until(start + Duration::from_secs(365 * 86_400), clock).await;
        assert_eq!(looks.get(), 2);
        assert_eq!(waited.elapsed(), CLOCK_CHECK);
    }
}
