//! From a stream that a relay opens to the session of an authenticated user.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use throwline_certs::{ExpectedPeer, PeerIdentity, SpiffeId};
use throwline_ops::{Drain, Share, Shutdown};
use throwline_policy::SystemNames;
use throwline_policy::rules::User;
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::line::{self, Accepted, Handle, Line, ResumeRequest};
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, StreamKind, StreamReply};
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_tunnel::{mux, proto};
use tokio_rustls::server::TlsStream;

use super::bulk::BulkCarrier;
use super::line_registry::{LineRegistry, NotResumed};
use crate::audit::Subject;
use crate::identity::AgentIdentity;
use crate::live::{LiveRegistry, LiveSession};
use crate::message::from_agent;
use crate::metrics::Metrics;
use crate::quotas::{QuotaExceeded, Quotas};
use crate::request::Lifetime;
use crate::session::{LineCredentials, Protocol, SessionServer, Setup};

/// Accepts the lines of users.
pub(crate) struct LineAcceptor {
    pub(crate) cluster: String,
    /// Distinguishes two processes of one identity.
    pub(crate) instance: String,
    pub(crate) identity: Arc<AgentIdentity>,
    pub(crate) live: Arc<LiveRegistry>,
    pub(crate) lines: Arc<LineRegistry>,
    pub(crate) sessions: SessionServer,
    pub(crate) users: UserOptions,
    pub(crate) bulk: Arc<BulkCarrier>,
    pub(crate) quotas: Quotas,
    pub(crate) metrics: Metrics,
    pub(crate) drain: Drain,
    /// No more sessions; live ones end with their requests.
    pub(crate) shutdown: Shutdown,
}

/// How the users of certificates appear to the API server.
pub(crate) struct UserOptions {
    /// The fingerprint of the certificate is sent along.
    pub(crate) credential_extra: bool,
    pub(crate) system_names: SystemNames,
}

/// Why a line did not become a session.
#[derive(Debug, thiserror::Error)]
enum LineEnd {
    #[error("the relay's stream was lost: {0}")]
    Stream(#[source] std::io::Error),
    #[error("the line was not set up: {0}")]
    Line(#[from] line::LineError),
    /// The user's certificate, or an attack on the path.
    #[error("the sealed session was not set up: {0}")]
    Session(#[source] std::io::Error),
    #[error("the user's certificate was not accepted: {0}")]
    Certificate(#[from] throwline_certs::CheckError),
    #[error("a new line, where one was to be resumed")]
    OutOfPlace,
    /// Not by chance.
    #[error("there is a line of the same id")]
    Duplicate,
    #[error("a line was not resumed: {0}")]
    Resume(#[from] NotResumed),
    /// The relay named another user, within the limit, than the certificate.
    #[error("a limit was reached: {0}")]
    Limit(#[from] QuotaExceeded),
}

/// When to try again after a limit.
const LIMIT_RETRY_AFTER: Duration = Duration::from_secs(5);

type Sealed = TlsStream<Line<mux::Stream>>;

/// A session after its handshake.
struct Established {
    session: Sealed,
    peer: PeerIdentity,
    /// To the user and back.
    round_trip: Duration,
}

impl LineAcceptor {
    /// Accepts one stream of a carrier of that class, and serves it to its end.
    /// `leaving`: its carrier is retired, or the agent stops; then the session ends with its requests.
    pub(crate) async fn accept(
        self: Arc<Self>,
        stream: IncomingStream,
        class: TrafficClass,
        leaving: Shutdown,
    ) {
        let open = match self.check(&stream, &leaving) {
            Ok(open) => open,
            Err(refusal) => {
                tracing::info!(message = refusal.message, "a relay's stream was refused");
                self.count("refused");
                return stream.refuse(refusal).await;
            }
        };
        // Only the client of a line names this very process, and the line's session has its share.
        let is_resumption = open.agent_instance == self.instance;
        // By the relay's claim at first, so that a handshake costs no other user's share; the
        // certificate decides after it.
        let share = self.quotas.line(&claimed_user(&open));
        if let Err(limit) = &share
            && !is_resumption
        {
            self.count("refused");
            let refusal = refusal(RefusalCode::Limit, limit).retry_after(LIMIT_RETRY_AFTER);
            return stream.refuse(refusal).await;
        }
        let served = match self.handshake(stream).await {
            Ok(Accepted::Resume(request)) => {
                // The resumed line has its share from its session; a second one would count it
                // twice.
                drop(share);
                let is_misplaced = open.bulk && !class.is_bulk();
                self.resume(request, is_misplaced, leaving).await
            }
            Ok(Accepted::New(line)) => match share {
                Ok(share) => self.serve(line, share, &open, leaving).await,
                Err(_) => Err(LineEnd::OutOfPlace),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            self.count("failed");
            tracing::info!(%error, source = source_of(&open), "a line did not become a session");
        }
    }

    /// Refuses by the stream's header, before anything is set up.
    fn check(&self, stream: &IncomingStream, leaving: &Shutdown) -> Result<Open, Refusal> {
        let Some(StreamKind::Open(open)) = &stream.header.kind else {
            let text = "an agent accepts lines only";
            return Err(refusal(RefusalCode::Unsupported, text));
        };
        if !(proto::VERSION_MIN..=proto::VERSION).contains(&open.version) {
            let (min, max) = (proto::VERSION_MIN, proto::VERSION);
            let text = format!(
                "it has the line versions {min} to {max}, not {}; update the older side",
                open.version
            );
            return Err(refusal(RefusalCode::Version, text));
        }
        if open.cluster != self.cluster {
            let text = format!(
                "it serves the cluster {}, not the requested one",
                self.cluster
            );
            return Err(refusal(RefusalCode::UnknownCluster, text));
        }
        // The successor of this carrier is up: DRAINING makes the local proxy take that one.
        if leaving.is_requested() {
            let text = "it leaves this relay; use another one of its carriers";
            return Err(refusal(RefusalCode::Draining, text));
        }
        Ok(open.clone())
    }

    async fn handshake(&self, stream: IncomingStream) -> Result<Accepted<mux::Stream>, LineEnd> {
        let detached = self.lines.detached();
        let reply = StreamReply {
            agent_instance: self.instance.clone(),
            detached_ms: u32::try_from(detached.as_millis()).unwrap_or(u32::MAX),
            ..StreamReply::accepted()
        };
        let stream = stream.accept(reply).await.map_err(LineEnd::Stream)?;
        Ok(line::accept(stream, detached, self.lines.budgets()).await?)
    }

    /// Puts a stream under a line that lost its own; its session has waited for it. `is_misplaced`: the line
    /// moves bulk, and the stream is of a carrier for what a person waits for.
    async fn resume(
        &self,
        request: ResumeRequest<mux::Stream>,
        is_misplaced: bool,
        leaving: Shutdown,
    ) -> Result<(), LineEnd> {
        let (handle, epoch) = self.lines.resume(request).await?;
        self.count("resumed");
        let shutdown = self.shutdown.clone();
        let to_bulk = async {
            if is_misplaced && self.lines.may_move_to_bulk(handle.id()) {
                self.bulk.request_move(&handle, epoch).await;
            }
        };
        let away =
            LineRegistry::request_move_when_leaving(handle.clone(), epoch, leaving, shutdown);
        tokio::join!(to_bulk, away);
        Ok(())
    }

    /// A new line, from its session's handshake to its end.
    async fn serve(
        &self,
        line: Line<mux::Stream>,
        share: Share,
        open: &Open,
        leaving: Shutdown,
    ) -> Result<(), LineEnd> {
        let established = self.establish(line).await?;
        let user = established.peer.id.name();
        let _share = match share.name() == user {
            true => share,
            false => {
                drop(share);
                self.quotas.line(user)?
            }
        };
        self.count("session");
        let line = established.session.get_ref().0;
        line.charge(self.quotas.memory(user));
        let (live, shutdown) = self.enter(line, &established.peer, leaving)?;
        let setup = self.setup(&established, live, open, shutdown);
        tracing::debug!(
            user = setup.subject.user.name,
            source = setup.subject.source,
            protocol = ?setup.protocol,
            "a session has begun"
        );
        self.sessions
            .clone()
            .serve(established.session, setup)
            .await;
        Ok(())
    }

    async fn establish(&self, line: Line<mux::Stream>) -> Result<Established, LineEnd> {
        let began = Instant::now();
        let config = self.identity.session_server();
        let session = throwline_tunnel::session::accept(line, config)
            .await
            .map_err(LineEnd::Session)?;
        // Once for the first message, which follows the line's own, and once for the last.
        let round_trip = began.elapsed() / 2;
        // The handshake has used the same validator; here it returns the identity, and checks once more
        // that the certificate is valid now.
        let chain = session.get_ref().1.peer_certificates().unwrap_or_default();
        let expected = ExpectedPeer::SESSION_USER;
        let peer = (self.identity.validator()).check(chain, expected, SystemTime::now())?;
        Ok(Established {
            session,
            peer,
            round_trip,
        })
    }

    /// Enters the session, and the line if it can be resumed. Returns the shutdown that the session
    /// follows.
    fn enter(
        &self,
        line: &Line<mux::Stream>,
        peer: &PeerIdentity,
        leaving: Shutdown,
    ) -> Result<(LiveSession, Shutdown), LineEnd> {
        let live = self.live.enter(peer.clone(), Some(line.ender()))?;
        let Some(handle) = line.handle() else {
            return Ok((live, leaving));
        };
        let user = peer.id.to_string();
        if !self.lines.insert(handle.clone(), user, live.clone()) {
            return Err(LineEnd::Duplicate);
        }
        let shutdown = self.shutdown.clone();
        let moving = LineRegistry::request_move_when_leaving(handle, 0, leaving, shutdown.clone());
        tokio::spawn(moving);
        // The line outlives its carrier, and so does the session.
        Ok((live, shutdown))
    }

    fn setup(
        &self,
        established: &Established,
        live: LiveSession,
        open: &Open,
        shutdown: Shutdown,
    ) -> Setup {
        let Established {
            session,
            peer,
            round_trip,
        } = established;
        let (line, tls) = session.get_ref();
        let handle = line.handle();
        let (lines, newer) = (self.lines.clone(), peer.clone());
        let renew = Arc::new(move |id: &[u8], mac: &[u8]| lines.renew(id, mac, &newer));
        Setup {
            protocol: match tls.alpn_protocol() {
                Some(b"h2") => Protocol::Http2,
                _ => Protocol::Http1,
            },
            subject: Arc::new(Subject {
                cluster: self.cluster.clone(),
                user: self.users.user(peer),
                source: source_of(open),
            }),
            life: Lifetime {
                live,
                guard: Arc::new(self.drain.guard()),
                detached: handle
                    .as_ref()
                    .map_or(Duration::ZERO, Handle::detached_life),
                phases: handle.map(|handle| handle.phases()),
            },
            shutdown,
            round_trip: *round_trip,
            credentials: Some(LineCredentials::new(peer.id.name(), renew)),
        }
    }

    fn count(&self, end: &str) {
        self.metrics.lines.with_label_values(&[end]).inc();
    }
}

impl UserOptions {
    /// The user of the certificate, whatever the relay claims.
    fn user(&self, peer: &PeerIdentity) -> User {
        // As Kubernetes itself names a client certificate in `authentication.kubernetes.io/credential-id`.
        let fingerprint = || {
            peer.fingerprint
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<String>()
        };
        User {
            name: peer.id.name().to_owned(),
            groups: peer.groups.clone(),
            credential: self
                .credential_extra
                .then(|| format!("X509SHA256={}", fingerprint())),
            system_names: self.system_names.clone(),
        }
    }
}

fn refusal(code: RefusalCode, text: impl std::fmt::Display) -> Refusal {
    Refusal::new(code, from_agent(text))
}

/// The user as the relay names it, which counts for availability, not for identity.
fn claimed_user(open: &Open) -> String {
    let id: Result<SpiffeId, _> = open.user.parse();
    id.map_or_else(|_| String::new(), |id| id.name().to_owned())
}

/// The user's address as the relay reports it, if it is an address at all; for the audit only.
fn source_of(open: &Open) -> String {
    let address = open
        .client_addr
        .parse::<SocketAddr>()
        .map(|address| address.ip());
    address
        .or_else(|_| open.client_addr.parse::<IpAddr>())
        .map(|ip| ip.to_string())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_address_becomes_a_source() {
        let of = |text: &str| {
            source_of(&Open {
                client_addr: text.into(),
                ..Open::default()
            })
        };
        assert_eq!(of("192.0.2.1:443"), "192.0.2.1");
        assert_eq!(of("[2001:db8::1]:443"), "2001:db8::1");
        assert_eq!(of("2001:db8::1"), "2001:db8::1");
        assert_eq!(of("\u{1b}[31mroot\n"), "");
    }
}
