//! Something that ends the TLS of carriers on their way to a relay, as a load balancer or a proxy that
//! inspects traffic does, and is hostile: it lets a victim prove itself, and then speaks on the
//! carrier in its place, to either end.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use throwline_tunnel::carrier::{
    AcceptConfig, Carrier, Connection, DialConfig, Incoming, IncomingStream, OpenError, Prover,
    accept, dial_over,
};
use throwline_tunnel::message;
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{
    Challenge, HandshakeReply, Proof, Role, StreamKind, Verdict, Welcome,
};
use throwline_tunnel::proto::wire::HANDSHAKE_CAP;
use throwline_tunnel::proto::{VERSION, VERSION_MIN};
use throwline_tunnel::ws::{self, WsDriver, WsIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt as _};

/// What an HTTP head may have.
const HEAD: usize = 64 * 1024;
const PIPE: usize = 256 * 1024;

/// A carrier that was taken over.
#[derive(Clone)]
pub struct Taken {
    pub role: Role,
    /// To the relay, as the victim.
    pub as_victim: Carrier,
    /// To the victim, as the relay.
    pub as_relay: Carrier,
}

/// Asked for each stream that a victim opens, before it is passed on to the relay. What it gives back
/// is not passed on.
pub type Meddle =
    Arc<dyn Fn(Taken, IncomingStream) -> BoxFuture<'static, Option<IncomingStream>> + Send + Sync>;

/// It listens on `address` and forwards to a relay that speaks plain HTTP.
pub struct Terminator {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    relay: SocketAddr,
    meddle: Mutex<Option<Meddle>>,
    taken: Mutex<Vec<Taken>>,
    /// Bodies of requests that became no carrier, with their heads.
    requests: Mutex<Vec<Vec<u8>>>,
}

impl Terminator {
    pub async fn start(relay: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let shared = Arc::new(Shared {
            relay,
            meddle: Mutex::default(),
            taken: Mutex::default(),
            requests: Mutex::default(),
        });
        let address = listener.local_addr()?;
        let serving = shared.clone();
        let task = tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let shared = serving.clone();
                tokio::spawn(async move {
                    if let Err(error) = serve(shared, tcp).await {
                        tracing::debug!(error = format!("{error:#}"), "a connection ended");
                    }
                });
            }
        });
        Ok(Self {
            address,
            shared,
            task,
        })
    }

    /// Meddles with the streams that victims open from now on.
    pub fn meddle(&self, meddle: Option<Meddle>) {
        *lock(&self.shared.meddle) = meddle;
    }

    /// The newest live carrier of this role, if one was taken over.
    pub fn taken(&self, role: Role) -> Option<Taken> {
        let taken = lock(&self.shared.taken);
        let mut newest = taken.iter().rev();
        let is_live = |taken: &&Taken| taken.role == role && !taken.as_victim.is_closed();
        newest.find(is_live).cloned()
    }

    /// What else was asked of the relay through it: heads and bodies.
    pub fn requests(&self) -> Vec<Vec<u8>> {
        lock(&self.shared.requests).clone()
    }
}

impl Drop for Terminator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(shared: Arc<Shared>, mut victim: TcpStream) -> Result<()> {
    victim.set_nodelay(true)?;
    let mut relay = TcpStream::connect(shared.relay).await?;
    relay.set_nodelay(true)?;
    let (head, body) = head_of(&mut victim).await?;
    relay.write_all(&head).await?;
    relay.write_all(&body).await?;
    if !head.starts_with(b"GET ") || find(&head, b"/v1/carrier").is_none() {
        return pass_on(&shared, victim, relay, [head, body].concat()).await;
    }
    let (answer, early) = head_of(&mut relay).await?;
    victim.write_all(&answer).await?;
    if !answer.starts_with(b"HTTP/1.1 101") {
        victim.write_all(&early).await?;
        tokio::io::copy(&mut relay, &mut victim).await?;
        return Ok(());
    }
    take_over(shared, victim, body, relay, early).await
}

/// Anything but a carrier: recorded, and passed on as it is.
async fn pass_on(
    shared: &Shared,
    victim: TcpStream,
    relay: TcpStream,
    mut seen: Vec<u8>,
) -> Result<()> {
    let (mut from_victim, mut to_victim) = victim.into_split();
    let (mut from_relay, mut to_relay) = relay.into_split();
    let up = async {
        let mut buffer = [0; 4096];
        loop {
            let count = from_victim.read(&mut buffer).await?;
            if count == 0 {
                return to_relay.shutdown().await;
            }
            seen.extend_from_slice(&buffer[..count]);
            to_relay.write_all(&buffer[..count]).await?;
        }
    };
    let down = tokio::io::copy(&mut from_relay, &mut to_victim);
    let ended = tokio::select! {
        ended = up => ended,
        ended = down => ended.map(drop),
    };
    lock(&shared.requests).push(seen);
    Ok(ended?)
}

/// Passes the proof on as it is, and then has two carriers.
async fn take_over(
    shared: Arc<Shared>,
    victim: TcpStream,
    from_victim: Vec<u8>,
    relay: TcpStream,
    from_relay: Vec<u8>,
) -> Result<()> {
    let config = ws::Config::default();
    let (near, near_driver) = ws::wrap(victim, from_victim.into(), ws::Side::Server, &config).await;
    let (far, far_driver) = ws::wrap(relay, from_relay.into(), ws::Side::Client, &config).await;
    let (mut near, mut far) = (Cork::new(near, near_driver), Cork::new(far, far_driver));

    let challenge: Challenge = far.pass(&mut near).await?;
    ensure!(challenge.nonce.len() == 32, "the relay's challenge");
    let proof: Proof = near.pass(&mut far).await?;
    let reply: HandshakeReply = far.pass(&mut near).await?;
    let Some(Verdict::Welcome(welcome)) = reply.verdict else {
        return Ok(());
    };

    // Between each end and ours, bytes; above them, carriers like any other.
    let (as_victim, incoming_far) = as_victim(far, &challenge, &welcome).await?;
    let (as_relay, incoming_near) = as_relay(near, &proof).await?;
    let taken = Taken {
        role: proof.role(),
        as_victim,
        as_relay,
    };
    lock(&shared.taken).push(taken.clone());
    let up = {
        let (shared, taken) = (shared.clone(), taken.clone());
        forward(incoming_near, taken.as_victim.clone(), move |stream| {
            let meddle = lock(&shared.meddle).clone();
            let taken = taken.clone();
            async move {
                match meddle {
                    Some(meddle) => meddle(taken, stream).await,
                    None => Some(stream),
                }
            }
        })
    };
    let down = forward(incoming_far, taken.as_relay.clone(), async |stream| {
        Some(stream)
    });
    tokio::select! {
        () = up => {}
        () = down => {}
    }
    // What is closed at one end is closed at the other.
    let normal = throwline_tunnel::proto::close::CloseCode::GoingAway;
    taken.as_victim.close(normal, "the other end has gone");
    taken.as_relay.close(normal, "the other end has gone");
    Ok(())
}

/// A carrier towards the relay, on a connection whose handshake the victim has done.
async fn as_victim(
    far: Cork<TcpStream>,
    challenge: &Challenge,
    welcome: &Welcome,
) -> Result<(Carrier, Incoming)> {
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let nobody = Prover {
        assertion: Box::new(|_| Ok(String::new())),
        sign: Box::new(|_| Ok(vec![0])),
        sha256: throwline_certs::sha256,
        id: String::new(),
    };
    let url = "http://127.0.0.1".parse()?;
    let config = DialConfig::new(url, None, Arc::new(nobody), Role::Unspecified, "terminator");
    let greeting = async {
        let mut pretended = pretend(theirs, ws::Side::Server).await;
        pretended.write(challenge).await?;
        let _: Proof = pretended.read().await?;
        let verdict = Some(Verdict::Welcome(welcome.clone()));
        pretended.write(&HandshakeReply { verdict }).await?;
        Ok::<_, anyhow::Error>(pretended)
    };
    let (dialled, pretended) = tokio::join!(dial_over(ours, &config), greeting);
    tokio::spawn(join(far, pretended?));
    let Connection {
        carrier, incoming, ..
    } = dialled?;
    Ok((carrier, incoming))
}

/// A carrier towards the victim, on a connection whose handshake the relay has done.
async fn as_relay(near: Cork<TcpStream>, proof: &Proof) -> Result<(Carrier, Incoming)> {
    let (ours, theirs) = tokio::io::duplex(PIPE);
    let greeting = async {
        let mut pretended = pretend(theirs, ws::Side::Client).await;
        let asked: Challenge = pretended.read().await?;
        ensure!((asked.version_min, asked.version_max) == (VERSION_MIN, VERSION));
        pretended.write(proof).await?;
        let _: HandshakeReply = pretended.read().await?;
        Ok(pretended)
    };
    let config = AcceptConfig::new("terminator");
    let (accepted, pretended) = tokio::join!(accept(ours, config, |_, _| Ok(())), greeting);
    tokio::spawn(join(near, pretended?));
    let (connection, _) = accepted?;
    Ok((connection.carrier, connection.incoming))
}

async fn pretend(io: DuplexStream, side: ws::Side) -> Cork<DuplexStream> {
    let (io, driver) = ws::wrap(io, Bytes::new(), side, &ws::Config::default()).await;
    Cork::new(io, driver)
}

/// The bytes of a WebSocket, flushed after each write.
struct Cork<T> {
    io: Compat<WsIo<T>>,
    driver: WsDriver<T>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Cork<T> {
    fn new(io: WsIo<T>, driver: WsDriver<T>) -> Self {
        let io = io.compat();
        Self { io, driver }
    }

    async fn read<M: prost::Message + Default>(&mut self) -> Result<M> {
        Ok(message::read(&mut self.io, HANDSHAKE_CAP).await?)
    }

    async fn write<M: prost::Message>(&mut self, message: &M) -> Result<()> {
        message::write(&mut self.io, message, HANDSHAKE_CAP).await?;
        Ok(self.driver.flush().await?)
    }

    /// Reads a message and writes it to the other end.
    async fn pass<M, U>(&mut self, to: &mut Cork<U>) -> Result<M>
    where
        M: prost::Message + Default,
        U: AsyncRead + AsyncWrite + Unpin,
    {
        let message = self.read().await?;
        to.write(&message).await?;
        Ok(message)
    }
}

/// Copies both ways until one end has gone.
async fn join<T, U>(one: Cork<T>, other: Cork<U>)
where
    T: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    let (read_one, write_one) = tokio::io::split(one.io);
    let (read_other, write_other) = tokio::io::split(other.io);
    tokio::select! {
        _ = copy(read_one, write_other, &other.driver) => {}
        _ = copy(read_other, write_one, &one.driver) => {}
    }
}

async fn copy<T>(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    driver: &WsDriver<T>,
) -> std::io::Result<()>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut buffer = BytesMut::with_capacity(64 * 1024);
    loop {
        buffer.clear();
        if from.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        to.write_all(&buffer).await?;
        driver.flush().await?;
    }
}

/// Each incoming stream is opened at the other end, unless `meddle` keeps it.
async fn forward<F>(
    mut incoming: Incoming,
    to: Carrier,
    meddle: impl Fn(IncomingStream) -> F + Send + Sync + 'static,
) where
    F: Future<Output = Option<IncomingStream>> + Send + 'static,
{
    while let Some(stream) = incoming.next().await {
        let kept = meddle(stream);
        let to = to.clone();
        tokio::spawn(async move {
            if let Some(stream) = kept.await
                && let Err(error) = spliced(stream, &to).await
            {
                tracing::debug!(error = format!("{error:#}"), "a stream ended");
            }
        });
    }
}

/// Opens the same stream at the other end, and copies.
pub async fn spliced(stream: IncomingStream, to: &Carrier) -> Result<()> {
    let header = stream.header.clone();
    match to.open(header).await {
        Ok((mut far, reply)) => {
            let mut near = stream.accept(reply).await?;
            tokio::io::copy_bidirectional(&mut near, &mut far).await?;
        }
        Err(OpenError::Refused(refusal)) => stream.refuse(refusal).await,
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// Opens a stream of this kind in somebody's place.
pub async fn open(carrier: &Carrier, kind: StreamKind) -> Result<mux::Stream, OpenError> {
    carrier.open(kind.into()).await.map(|(stream, _)| stream)
}

/// An HTTP head, and what came behind it already.
async fn head_of(io: &mut TcpStream) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut seen = Vec::new();
    let read = async {
        loop {
            if let Some(end) = find(&seen, b"\r\n\r\n") {
                let rest = seen.split_off(end + 4);
                return Ok((seen, rest));
            }
            ensure!(seen.len() < HEAD, "a head of {} bytes", seen.len());
            ensure!(io.read_buf(&mut seen).await? > 0, "the head was cut");
        }
    };
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .context("no head")?
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    text.windows(part.len()).position(|window| window == part)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
