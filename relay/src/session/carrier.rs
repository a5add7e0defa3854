//! One carrier while it is served: its streams, its messages, and its end.

mod agent;
mod announcements;

use std::sync::Arc;
use std::time::Duration;

use throwline_certs::Kind;
use throwline_tunnel::carrier::{Connection, IncomingStream};
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    ControlKind, ControlMessage, Refusal, RefusalCode, StreamKind, StreamReply,
};
use throwline_tunnel::proto::origin;
use throwline_tunnel::proto::traffic::TrafficClass;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{Instrument, debug, error, info, info_span, warn};

use super::control::ControlStream;
use super::expiry::expiry;
use super::{Established, Sessions};
use crate::live::{EndReason, LiveEntry};
use crate::peer::Peer;
use crate::refusals::refuse;
use crate::registry::{Membership, Tunnel};

/// How long a closing carrier may take for its close handshake.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the bytes that a carrier has delivered may take to be passed on, after its end.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

impl Sessions {
    /// Serves a carrier until it ends, for whatever reason, and leaves nothing of it behind.
    pub(crate) async fn run(self: Arc<Self>, established: Established) {
        let span = info_span!(
            "carrier",
            id = established.connection.carrier.id(),
            peer = %established.peer.identity.id,
            client = %established.peer.client,
        );
        self.serve(established).instrument(span).await;
    }

    async fn serve(self: Arc<Self>, established: Established) {
        let Established {
            peer,
            proof,
            connection,
            permit,
            is_for_renewal,
        } = established;
        info!(software = %proof.software, instance = %proof.instance, bulk = proof.bulk, "a carrier is up");
        let kind = peer.identity.id.kind();
        let role = if is_for_renewal {
            "renewal"
        } else {
            role(kind)
        };
        let counted = self.metrics.carrier(role);
        // Carriers of relays cannot be asked to move: they have no control stream
        // (`routing/peers.rs`).
        let must_move = (kind != Kind::Relay).then(|| self.lifecycle.carriers.guard());
        let carrier = connection.carrier.clone();
        let tunnel = (kind == Kind::Cluster && !is_for_renewal).then(|| {
            // Replicas that share an identity run with one certificate on purpose.
            let certificate = if proof.shares_identity {
                String::new()
            } else {
                peer.identity.serial.clone()
            };
            Arc::new(Tunnel::new(
                peer.identity.id.name().to_owned(),
                proof.instance.clone(),
                certificate,
                carrier.clone(),
                TrafficClass::of(proof.bulk),
                self.config.lines_of_a_carrier(),
            ))
        });
        let membership = match &tunnel {
            Some(tunnel) => Some(self.registry.join(Arc::clone(tunnel)).await),
            None => None,
        };
        let session = Session {
            peer: Arc::clone(&peer),
            announced_relays: connection.relay.relays,
            connection,
            tunnel: tunnel.clone(),
            control: None,
            is_for_renewal,
            renewals: Arc::new(Semaphore::new(1)),
            streams: JoinSet::new(),
            sessions: Arc::clone(&self),
        };
        session.serve(&proof.software).await;
        // The peer will dial again, and so will others of its network.
        self.authenticated(&peer);
        self.leave(tunnel, membership).await;
        if let Ok(reason) = tokio::time::timeout(CLOSE_TIMEOUT, carrier.closed()).await {
            info!(%reason, "a carrier is down");
        }
        drop((counted, permit, must_move));
    }

    async fn leave(&self, tunnel: Option<Arc<Tunnel>>, membership: Option<Membership>) {
        // The route goes first: a database may take its time.
        drop(membership);
        let Some(tunnel) = tunnel.filter(|tunnel| !tunnel.class.is_bulk()) else {
            return;
        };
        if let Err(error) = self.directory.record_disconnected(&tunnel.cluster).await {
            warn!(%error, "cannot record that an agent left");
        }
    }
}

/// The label in metrics.
fn role(kind: Kind) -> &'static str {
    match kind {
        Kind::Cluster => "agent",
        Kind::User => "local-proxy",
        Kind::Relay => "relay",
    }
}

/// One carrier while it is served.
struct Session {
    sessions: Arc<Sessions>,
    peer: Arc<Peer>,
    connection: Connection,
    /// `Some` for an agent's carrier.
    tunnel: Option<Arc<Tunnel>>,
    control: Option<ControlStream>,
    announced_relays: u32,
    is_for_renewal: bool,
    /// One renewal at a time.
    renewals: Arc<Semaphore>,
    /// One task for each stream that is not done. They end with the session.
    streams: JoinSet<()>,
}

impl Session {
    async fn serve(mut self, software: &str) {
        self.record_arrival(software);
        let sessions = Arc::clone(&self.sessions);
        let (code, reason) = match sessions.live.enter_carrier(&self.peer.identity) {
            Ok(entry) => self.until_ended(&sessions, entry).await,
            Err(reason) => {
                let (code, text) = self.ended(reason);
                return self.close(code, text);
            }
        };
        if self.connection.carrier.is_closed() {
            self.flush();
        }
        // Readers first: a stream that is read while its connection closes would hang.
        self.streams.shutdown().await;
        self.close(code, reason);
    }

    /// Serves streams and messages; returns with what the carrier is closed with.
    async fn until_ended(
        &mut self,
        sessions: &Sessions,
        entry: LiveEntry,
    ) -> (CloseCode, &'static str) {
        let ending = entry.ending();
        // The one way out for every reason of the relay's own.
        let ended = ending.ended();
        tokio::pin!(ended);
        let expiry = expiry(
            self.is_for_renewal,
            self.peer.identity.not_after,
            &*sessions.directory,
        );
        tokio::pin!(expiry);
        let mut has_expired = false;
        // Certificates and clocks have other units than the timer.
        let check = sessions.config.timing.double_after + Duration::from_millis(50);
        let duplicate_check = tokio::time::sleep(check);
        tokio::pin!(duplicate_check);
        let mut is_checked = self.tunnel.is_none();
        let mut revocations = sessions.revocations.subscribe();
        let mut is_asked_to_move = false;
        let mut relays = sessions.relays.clone();
        // A registry that never changes has dropped its end.
        let mut may_change = self.tunnel.is_some();
        loop {
            tokio::select! {
                stream = self.connection.incoming.next() => match stream {
                    Some(stream) => self.take(stream).await,
                    None => return (CloseCode::Normal, "the carrier ended"),
                },
                Some(ended) = self.streams.join_next(), if !self.streams.is_empty() => {
                    if let Err(error) = ended && error.is_panic() {
                        error!(%error, "a stream's task panicked");
                    }
                }
                message = ControlStream::receive(&mut self.control) => match message {
                    Ok(Some(message)) => self.receive(message).await,
                    Ok(None) => self.control = None,
                    // The carrier ends for the same cause, and has a better reason for it.
                    Err(error) if error.kind() != std::io::ErrorKind::InvalidData => {
                        debug!(%error, "the control stream was cut");
                        self.control = None;
                    }
                    Err(error) => {
                        warn!(%error, "the control stream is broken");
                        return (CloseCode::Protocol, "the control stream is broken");
                    }
                },
                changed = relays.changed(), if may_change => {
                    may_change = changed.is_ok();
                    self.announce_relays().await;
                }
                reason = &mut expiry, if !has_expired => {
                    has_expired = true;
                    entry.end(reason);
                }
                () = &mut duplicate_check, if !is_checked => {
                    is_checked = true;
                    self.check_for_duplicate().await;
                }
                reason = &mut ended => return self.ended(reason),
                // The sender lives as long as `sessions`.
                Ok(()) = revocations.changed() => self.announce_revocations().await,
                () = sessions.lifecycle.draining.cancelled(), if !is_asked_to_move => {
                    is_asked_to_move = true;
                    self.ask_to_move().await;
                }
            }
        }
    }

    fn close(&self, code: CloseCode, reason: &str) {
        let reason = origin::mark(origin::RELAY, reason);
        self.connection.carrier.close(code, &reason);
    }

    /// Counts the end, and returns what the carrier is closed with.
    fn ended(&self, reason: EndReason) -> (CloseCode, &'static str) {
        self.sessions.metrics.carrier_ended(reason);
        reason.close_code()
    }

    async fn take(&mut self, stream: IncomingStream) {
        match stream.header.kind.clone() {
            Some(StreamKind::Renewal(_)) => {
                let permit = Arc::clone(&self.renewals).try_acquire_owned().ok();
                self.spawn(async move |sessions, peer| {
                    let renewals = &sessions.renewals;
                    renewals.serve(&peer.identity.id, stream, permit).await;
                });
            }
            Some(_) if self.is_for_renewal => self.refuse(
                stream,
                Refusal::new(
                    RefusalCode::NotAllowed,
                    "this carrier is for a renewal and nothing else",
                ),
            ),
            Some(StreamKind::Open(wanted)) => self.spawn(async move |sessions, peer| {
                sessions.router.serve(&peer, stream, &wanted).await;
            }),
            Some(StreamKind::ListClusters(_)) => self.spawn(async move |sessions, peer| {
                sessions.clusters.serve(&peer, stream).await;
            }),
            Some(StreamKind::FetchRevocations(_)) => self.spawn(async move |sessions, _| {
                sessions.revocations.serve(stream).await;
            }),
            Some(StreamKind::Control(_)) if self.control.is_none() => {
                match stream.accept(StreamReply::accepted()).await {
                    Ok(stream) => self.control = Some(ControlStream::new(stream)),
                    Err(error) => debug!(%error, "the control stream ended at once"),
                }
                // Everything that the peer missed while it had no control stream.
                self.announce_relays().await;
                self.announce_revocations().await;
                if self.sessions.lifecycle.draining.is_cancelled() {
                    self.ask_to_move().await;
                }
            }
            Some(StreamKind::Control(_)) => self.refuse(
                stream,
                Refusal::new(RefusalCode::BadRequest, "a carrier has one control stream"),
            ),
            // The tunnel refuses these as well, whichever of the two sees one first.
            None => self.refuse(
                stream,
                Refusal::new(
                    RefusalCode::Unsupported,
                    "this relay does not know that kind of stream",
                ),
            ),
        }
    }

    /// Serves one stream in a task that ends with the session.
    fn spawn<F, Fut>(&mut self, serve: F)
    where
        F: FnOnce(Arc<Sessions>, Arc<Peer>) -> Fut,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let served = serve(Arc::clone(&self.sessions), Arc::clone(&self.peer));
        self.streams.spawn(served.in_current_span());
    }

    fn refuse(&mut self, stream: IncomingStream, refusal: Refusal) {
        self.spawn(async move |sessions, _| refuse(&sessions.metrics, stream, refusal).await);
    }

    async fn receive(&self, message: ControlMessage) {
        match (message.kind, &self.tunnel) {
            (Some(ControlKind::AgentStatus(status)), Some(tunnel)) => {
                self.update_status(tunnel, status).await;
            }
            // A proxy has no status, a dialer does not drain the relay, and all other kinds are newer
            // than this relay.
            (kind, _) => debug!(?kind, "ignored a control message"),
        }
    }

    /// Lets the streams pass on what the carrier has delivered before it ended: an agent that does not
    /// learn of a line's end keeps it for its proxy.
    fn flush(&mut self) {
        let mut streams = std::mem::take(&mut self.streams);
        let closing = self.sessions.lifecycle.closing.clone();
        self.sessions.lifecycle.tasks.spawn(async move {
            let all = async { while streams.join_next().await.is_some() {} };
            let _ = closing
                .run_until_cancelled(tokio::time::timeout(FLUSH_TIMEOUT, all))
                .await;
        });
    }
}
