//! A compromised relay: it authenticates carriers as the real one does, and then attacks the lines.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use http::{Request, Response};
use hyper::body::Incoming as HttpBody;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use throwline_authority::Authority;
use throwline_certs::{Identity, Kind, Validator, tls};
use throwline_relay::{Authenticator, Body, VerifiedAssertion};
use throwline_tunnel::PrefixedIo;
use throwline_tunnel::carrier::{AcceptConfig, Carrier, Connection, IncomingStream, Timing};
use throwline_tunnel::line::{self, LineBudgets};
use throwline_tunnel::proto::messages::{
    ClusterInfo, ClusterList, Open, Refusal, RefusalCode, StreamHeader, StreamKind, StreamReply,
};
use throwline_tunnel::proto::wire::CLUSTER_LIST_CAP;
use throwline_tunnel::{message, mux, session, ws};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use url::Url;

/// What it does to lines.
#[derive(Clone)]
pub enum Attack {
    /// Nothing: the positive control.
    None,
    /// Flips one bit of the byte at this offset, agent to user.
    FlipToUser(u64),
    /// The same, user to agent.
    FlipToAgent(u64),
    /// Routes lines of one cluster to the other's agent and back.
    SwapClusters(&'static str, &'static str),
    /// From this offset on, lines of the second cluster carry the first one's recorded answers.
    SwapAnswers {
        from: &'static str,
        to: &'static str,
        after: u64,
    },
    /// Poses as the agent, with this identity.
    OwnAgent {
        identity: Identity,
        validator: Validator,
    },
    /// Lists so many clusters, of which it has none.
    Lists(usize),
}

/// What a forged answer would show, were it ever believed.
pub const FORGED: &str = "forged-by-the-relay";

pub struct MaliciousRelay {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    authenticator: Authenticator,
    attack: Mutex<Attack>,
    agents: Mutex<HashMap<String, Carrier>>,
    /// Agent to user, by cluster, of its longest line so far.
    recorded: Mutex<HashMap<String, Vec<u8>>>,
    lines: std::sync::atomic::AtomicUsize,
}

impl MaliciousRelay {
    /// Takes the place of a plaintext relay that ran here with this authority.
    pub async fn start(
        listen: SocketAddr,
        public_url: &str,
        authority: &Authority,
        attack: Attack,
    ) -> Result<Self> {
        let accept = AcceptConfig {
            relays: 0,
            instance: "malicious".to_owned(),
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
            max_streams: 256,
        };
        let url = Url::parse(public_url)?;
        let tolerance = Duration::from_secs(60);
        let authenticator =
            Authenticator::new(authority.validator().clone(), &url, tolerance, 1000, accept);
        let listener = TcpListener::bind(listen).await?;
        let shared = Arc::new(Shared {
            authenticator,
            attack: Mutex::new(attack),
            agents: Mutex::default(),
            recorded: Mutex::default(),
            lines: std::sync::atomic::AtomicUsize::new(0),
        });
        let serving = shared.clone();
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let shared = serving.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(shared, tcp).await {
                        tracing::debug!(%error, "the malicious relay lost a connection");
                    }
                });
            }
        });
        Ok(Self { shared, task })
    }

    /// What it does to lines that are opened from now on.
    pub fn set_attack(&self, attack: Attack) {
        *lock(&self.shared.attack) = attack;
    }

    /// The clusters whose agents trust it.
    pub fn clusters(&self) -> Vec<String> {
        let agents = lock(&self.shared.agents);
        agents
            .iter()
            .filter(|(_, carrier)| !carrier.is_closed())
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// Lines opened so far.
    pub fn lines(&self) -> usize {
        self.shared.lines.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Bytes that were recorded of a cluster's answers.
    pub fn recorded(&self, cluster: &str) -> usize {
        lock(&self.shared.recorded).get(cluster).map_or(0, Vec::len)
    }
}

impl Drop for MaliciousRelay {
    fn drop(&mut self) {
        self.task.abort();
        for carrier in lock(&self.shared.agents).values() {
            carrier.close(
                throwline_tunnel::proto::close::CloseCode::GoingAway,
                "the test is over",
            );
        }
    }
}

async fn serve(shared: Arc<Shared>, tcp: TcpStream) -> Result<()> {
    tcp.set_nodelay(true)?;
    let admitted: Arc<Mutex<Option<VerifiedAssertion>>> = Arc::default();
    let service = service_fn(|request: Request<HttpBody>| {
        let checked = shared
            .authenticator
            .check(request.headers(), SystemTime::now());
        let response: Response<Body> = match checked {
            Ok(admission) => {
                let response = admission.response();
                *lock(&admitted) = Some(admission);
                response
            }
            Err(denied) => denied.response(),
        };
        async { Ok::<_, Infallible>(response) }
    });
    let parts = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .serve_connection(TokioIo::new(tcp), service)
        .without_shutdown()
        .await?;
    let io = PrefixedIo::new(parts.read_buf, parts.io.into_inner());
    let Some(admission) = lock(&admitted).take() else {
        return Ok(());
    };
    let (connection, _) = shared.authenticator.establish(&admission, io).await?;
    let Connection {
        carrier,
        mut incoming,
        ..
    } = connection;
    let peer = admission.peer.id;
    if peer.kind() == Kind::Cluster {
        lock(&shared.agents).insert(peer.name().to_owned(), carrier.clone());
    }
    while let Some(stream) = incoming.next().await {
        let (shared, user) = (shared.clone(), peer.name().to_owned());
        tokio::spawn(async move {
            if let Err(error) = stream_of(shared, stream, user).await {
                tracing::debug!(
                    error = format!("{error:#}"),
                    "a line of the malicious relay ended"
                );
            }
        });
    }
    Ok(())
}

async fn stream_of(shared: Arc<Shared>, stream: IncomingStream, user: String) -> Result<()> {
    match stream.header.kind.clone() {
        Some(StreamKind::Open(open)) => line_of(shared, stream, open, user).await,
        Some(StreamKind::Control(_)) => {
            let mut control = stream.accept(StreamReply::accepted()).await?;
            tokio::io::copy(&mut control, &mut tokio::io::sink()).await?;
            Ok(())
        }
        Some(StreamKind::ListClusters(_)) => {
            let Attack::Lists(count) = *lock(&shared.attack) else {
                return refuse(stream).await;
            };
            let named = |at| ClusterInfo {
                name: format!("cluster-{at:05}"),
                ..ClusterInfo::default()
            };
            let list = ClusterList {
                clusters: (0..count).map(named).collect(),
                total: 0,
            };
            let mut stream = stream.accept(StreamReply::accepted()).await?;
            message::write_long(&mut stream, &list, CLUSTER_LIST_CAP).await?;
            stream.shutdown().await?;
            Ok(())
        }
        _ => refuse(stream).await,
    }
}

async fn refuse(stream: IncomingStream) -> Result<()> {
    stream
        .refuse(Refusal::new(RefusalCode::Unsupported, "not by this relay"))
        .await;
    Ok(())
}

async fn line_of(
    shared: Arc<Shared>,
    stream: IncomingStream,
    open: Open,
    user: String,
) -> Result<()> {
    let attack = lock(&shared.attack).clone();
    shared
        .lines
        .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    if let Attack::OwnAgent {
        identity,
        validator,
    } = &attack
    {
        let io = stream.accept(StreamReply::accepted()).await?;
        return pose(io, identity, validator).await;
    }
    let cluster = match &attack {
        Attack::SwapClusters(one, other) if open.cluster == *one => (*other).to_owned(),
        Attack::SwapClusters(one, other) if open.cluster == *other => (*one).to_owned(),
        _ => open.cluster.clone(),
    };
    let agent = lock(&shared.agents).get(&cluster).cloned();
    let Some(agent) = agent else {
        stream
            .refuse(Refusal::new(RefusalCode::Offline, "no such agent here"))
            .await;
        bail!("no agent of {cluster}");
    };
    let asked = Open {
        cluster: cluster.clone(),
        user,
        ..open
    };
    let (agent, reply) = agent.open(StreamHeader::from(asked)).await?;
    let client = stream.accept(reply).await?;
    let (client_read, client_write) = tokio::io::split(client);
    let (agent_read, agent_write) = tokio::io::split(agent);
    let mut kept = Vec::new();
    let down = copy(agent_read, client_write, |offset, bytes| {
        kept.extend_from_slice(bytes);
        match &attack {
            Attack::FlipToUser(at) => flip(offset, bytes, *at),
            Attack::SwapAnswers { from, to, after } if *to == cluster => {
                let recorded = lock(&shared.recorded);
                replace(
                    offset,
                    bytes,
                    *after,
                    recorded.get(*from).map_or(&[], Vec::as_slice),
                );
            }
            _ => {}
        }
        let mut recorded = lock(&shared.recorded);
        let longest = recorded.entry(cluster.clone()).or_default();
        if longest.len() < kept.len() {
            longest.clone_from(&kept);
        }
    });
    let up = copy(client_read, agent_write, |offset, bytes| {
        if let Attack::FlipToAgent(at) = &attack {
            flip(offset, bytes, *at);
        }
    });
    // The end of either ends the line, as a cut would.
    tokio::select! {
        ended = down => ended,
        ended = up => ended,
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut tamper: impl FnMut(u64, &mut [u8]),
) -> Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    let mut offset = 0;
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        tamper(offset, &mut buffer[..count]);
        to.write_all(&buffer[..count]).await?;
        to.flush().await?;
        offset += count as u64;
    }
}

fn flip(offset: u64, bytes: &mut [u8], at: u64) {
    let Some(index) = at
        .checked_sub(offset)
        .and_then(|index| usize::try_from(index).ok())
    else {
        return;
    };
    if let Some(byte) = bytes.get_mut(index) {
        *byte ^= 1;
    }
}

/// Puts `other`'s bytes of the same offsets in the place of those from `after` on.
fn replace(offset: u64, bytes: &mut [u8], after: u64, other: &[u8]) {
    for (at, byte) in (offset..).zip(bytes.iter_mut()) {
        let foreign = usize::try_from(at).ok().and_then(|at| other.get(at));
        if let (true, Some(foreign)) = (at >= after, foreign) {
            *byte = *foreign;
        }
    }
}

/// Plays the agent on a line: were the session believed, the user would see [`FORGED`].
async fn pose(io: mux::Stream, identity: &Identity, validator: &Validator) -> Result<()> {
    let line = line::accept(io, Duration::ZERO, LineBudgets::default())
        .await
        .context("the line")?;
    let line = line.into_new()?;
    let config = tls::session_server(identity, validator)?;
    let tls = session::accept(line, config).await.context("the session")?;
    let service = service_fn(|_: Request<HttpBody>| async {
        let forged = serde_json::json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": FORGED},
        });
        Ok::<_, Infallible>(Response::new(http_body_util::Full::new(
            bytes::Bytes::from(forged.to_string()),
        )))
    });
    let builder =
        hyper_util::server::conn::auto::Builder::new(hyper_util::rt::TokioExecutor::new());
    builder
        .serve_connection(TokioIo::new(tls), service)
        .await
        .map_err(|error| anyhow::anyhow!("{error}"))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_changes_one_bit_of_the_byte_at_its_offset() {
        let mut bytes = [0; 4];
        flip(10, &mut bytes, 12);
        assert_eq!(bytes, [0, 0, 1, 0]);
        flip(10, &mut bytes, 9);
        flip(10, &mut bytes, 14);
        assert_eq!(bytes, [0, 0, 1, 0]);
    }

    #[test]
    fn replaced_bytes_keep_their_offsets() {
        let mut bytes = *b"abcd";
        replace(2, &mut bytes, 4, b"012345");
        assert_eq!(&bytes, b"ab45");
    }
}
