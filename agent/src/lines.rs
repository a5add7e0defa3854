//! From a stream that a relay opens to a session that a user may speak on.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use throwline_certs::{PeerIdentity, Want};
use throwline_ops::Shutdown;
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::line::{self, Accepted, Asked, Handle, Line};
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, StreamKind, StreamReply};
use throwline_tunnel::{mux, proto};
use tokio_rustls::server::TlsStream;

use crate::agent::Agent;
use crate::audit::Subject;
use crate::kept::{Kept, NotResumed};
use crate::rules::User;
use crate::session::{self, Lifetime, Protocol};

/// Why a line did not become a session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LineEnd {
    #[error("the relay's stream was lost: {0}")]
    Stream(#[source] std::io::Error),
    #[error("the line was not set up: {0}")]
    Line(#[from] line::LineError),
    /// The user's certificate, or somebody between who is not the user.
    #[error("the sealed session was not set up: {0}")]
    Session(#[source] std::io::Error),
    #[error("the user's certificate was not accepted: {0}")]
    Certificate(#[from] throwline_certs::CheckError),
    #[error("a new line, where one was to be resumed")]
    OutOfPlace,
    /// Chance does not do this.
    #[error("there is a line of the same id")]
    Double,
    #[error("a line was not resumed: {0}")]
    Resume(#[from] NotResumed),
}

/// Takes one stream of a carrier, to its end.
/// `leaving`: its carrier is let go, or the agent stops; then the session ends with its requests.
pub(crate) async fn take(agent: Arc<Agent>, stream: IncomingStream, leaving: Shutdown) {
    let open = match judge(&agent, &stream, &leaving) {
        Ok(open) => open,
        Err(refusal) => {
            tracing::info!(message = refusal.message, "a relay's stream was refused");
            agent.count_line("refused");
            return stream.refuse(refusal).await;
        }
    };
    // Who asks for this very process comes back for a line, whose session has its place.
    let comes_back = open.agent_instance == agent.instance;
    let room = agent.room.clone().try_acquire_owned();
    if room.is_err() && !comes_back {
        agent.count_line("refused");
        let refusal = Refusal::new(
            RefusalCode::Limit,
            "the agent carries as many sessions as it may; try again",
        );
        return stream.refuse(refusal).await;
    }
    let taken = match accept(&agent, stream).await {
        Ok(Accepted::Resume(asked)) => {
            drop(room);
            resume(&agent, asked, leaving).await
        }
        Ok(Accepted::New(_)) if room.is_err() => Err(LineEnd::OutOfPlace),
        Ok(Accepted::New(line)) => match set_up(&agent, line).await {
            Ok((session, peer, round_trip)) => {
                agent.count_line("session");
                match keep(&agent, &session, &peer, leaving) {
                    Ok(leaving) => {
                        run(&agent, session, peer, round_trip, &open, leaving).await;
                        Ok(())
                    }
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        },
        Err(error) => Err(error),
    };
    if let Err(error) = taken {
        agent.count_line("failed");
        tracing::info!(%error, source = source_of(&open), "a line did not become a session");
    }
}

async fn accept(agent: &Agent, stream: IncomingStream) -> Result<Accepted<mux::Stream>, LineEnd> {
    let reply = StreamReply {
        agent_instance: agent.instance.clone(),
        ..StreamReply::accepted()
    };
    let stream = stream.accept(reply).await.map_err(LineEnd::Stream)?;
    Ok(line::accept(stream, agent.kept.detached()).await?)
}

/// Puts a stream under a line that lost its own; its session has gone on waiting.
async fn resume(
    agent: &Agent,
    asked: Asked<mux::Stream>,
    leaving: Shutdown,
) -> Result<(), LineEnd> {
    let (handle, epoch) = agent.kept.resume(asked).await?;
    agent.count_line("resumed");
    Kept::ask_when_leaving(handle, epoch, leaving, agent.shutdown.clone()).await;
    Ok(())
}

/// What of a stream's header can be refused before anything is set up.
fn judge(agent: &Agent, stream: &IncomingStream, leaving: &Shutdown) -> Result<Open, Refusal> {
    let Some(StreamKind::Open(open)) = &stream.header.kind else {
        return Err(Refusal::new(
            RefusalCode::Unsupported,
            "an agent takes lines only",
        ));
    };
    if !(proto::VERSION_MIN..=proto::VERSION).contains(&open.version) {
        let (min, max) = (proto::VERSION_MIN, proto::VERSION);
        let text = format!(
            "this agent speaks line versions {min} to {max}, not {}",
            open.version
        );
        return Err(Refusal::new(RefusalCode::Version, text));
    }
    if open.cluster != agent.cluster {
        let text = format!(
            "this is the agent of {}, not of the cluster asked for",
            agent.cluster
        );
        return Err(Refusal::new(RefusalCode::UnknownCluster, text));
    }
    if leaving.is_requested() {
        let text = "the agent is leaving this way; take another";
        return Err(Refusal::new(RefusalCode::Draining, text));
    }
    Ok(open.clone())
}

type Sealed = TlsStream<Line<mux::Stream>>;

/// Also how long it took to the user and back.
async fn set_up(
    agent: &Agent,
    line: Line<mux::Stream>,
) -> Result<(Sealed, PeerIdentity, Duration), LineEnd> {
    let (config, validator) = agent.session_server();
    let began = Instant::now();
    let session = throwline_tunnel::session::accept(line, config)
        .await
        .map_err(LineEnd::Session)?;
    // Once for the first word, which follows the line's own, and once for the last.
    let round_trip = began.elapsed() / 2;
    // The handshake has asked the same validator; here it tells who it was, and once more whether
    // the certificate is good now.
    let chain = session.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = validator.check(chain, Want::SESSION_USER, SystemTime::now())?;
    Ok((session, peer, round_trip))
}

/// Sees to it that a line which can be resumed is; the shutdown that its session is to follow.
fn keep(
    agent: &Arc<Agent>,
    session: &Sealed,
    peer: &PeerIdentity,
    leaving: Shutdown,
) -> Result<Shutdown, LineEnd> {
    let (line, tls) = session.get_ref();
    let Some(handle) = line.handle() else {
        return Ok(leaving);
    };
    let chain = tls.peer_certificates().unwrap_or_default().to_vec();
    let validator = agent.validator().clone();
    let recheck = move || {
        let checked = validator.check(&chain, Want::SESSION_USER, SystemTime::now());
        checked.map(|_| ())
    };
    let user = peer.id.to_string();
    if !agent.kept.keep(handle.clone(), user, Arc::new(recheck)) {
        return Err(LineEnd::Double);
    }
    let shutdown = agent.shutdown.clone();
    tokio::spawn(Kept::ask_when_leaving(handle, 0, leaving, shutdown.clone()));
    // The line outlives its carrier, and so does the session.
    Ok(shutdown)
}

async fn run(
    agent: &Arc<Agent>,
    session: Sealed,
    peer: PeerIdentity,
    round_trip: Duration,
    open: &Open,
    leaving: Shutdown,
) {
    let protocol = match session.get_ref().1.alpn_protocol() {
        Some(b"h2") => Protocol::Http2,
        _ => Protocol::Http1,
    };
    let subject = Arc::new(Subject {
        cluster: agent.cluster.clone(),
        user: user_of(&peer, agent.credential_extra),
        source: source_of(open),
    });
    let line = session.get_ref().0.handle();
    let life = Lifetime {
        detached: line.as_ref().map_or(Duration::ZERO, Handle::detached_life),
        round_trip,
        phases: line.map(|line| line.phases()),
        not_after: peer.not_after,
        shutdown: leaving,
        stop: agent.stop.clone(),
        guard: Arc::new(agent.drain.guard()),
    };
    tracing::debug!(
        user = subject.user.name,
        source = subject.source,
        ?protocol,
        "a session has begun"
    );
    session::serve(session, protocol, agent.gateway.clone(), subject, life).await;
}

/// The user is who the certificate says, whatever the relay says.
fn user_of(peer: &PeerIdentity, with_credential: bool) -> User {
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
        credential: with_credential.then(|| format!("X509SHA256={}", fingerprint())),
    }
}

/// The relay's word on where the user is, if it is an address at all; for the audit only.
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
