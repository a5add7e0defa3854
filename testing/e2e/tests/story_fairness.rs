//! One enrolled user, or one address, that takes all it can get: no other user may notice, and nothing
//! of it may stay.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use futures::stream::{self, StreamExt};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder as Http2, SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use throwline_certs::{Identity, Kind, Roots, SpiffeId, Validator, tls};
use throwline_e2e::backend::Backend;
use throwline_e2e::client::Target;
use throwline_e2e::environment::{Builder, CLUSTER, private_dir};
use throwline_e2e::metrics::Metrics;
use throwline_e2e::{Environment, Fixture, Proxy, Suite, User, eventually};
use throwline_tunnel::carrier::{Carrier, Connection, DialConfig, dial};
use throwline_tunnel::line::{self, LineBudgets};
use throwline_tunnel::proto::busy;
use throwline_tunnel::proto::messages::{LineHello, LineKind, Open, Role};
use throwline_tunnel::session;
use throwline_uplink::prover;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::{JoinHandle, JoinSet};

/// What one user's lines may cost an agent, KiB: its part of the budget, and what no budget is asked
/// for of 256 lines. Without shares it was 930 MiB of a thousand lines.
const MOST_KIB: u64 = 320 * 1024;
/// What may remain of it, KiB.
const REMAINS_KIB: u64 = 64 * 1024;
const PATIENCE: Duration = Duration::from_secs(60);
/// Of one story.
const LIMIT: Duration = Duration::from_secs(240);

fn main() -> ExitCode {
    Suite::new()
        .alone(
            "a_thousand_lines_of_one_user_leave_others_theirs",
            LIMIT,
            a_thousand_lines,
        )
        .alone(
            "watches_on_many_lines_leave_others_their_requests",
            LIMIT,
            watches_on_many_lines,
        )
        .alone(
            "lines_without_acknowledgements_cost_little_and_nothing_stays",
            LIMIT,
            lines_without_acknowledgements,
        )
        .alone(
            "windows_of_zero_cost_little_and_nothing_stays",
            LIMIT,
            windows_of_zero,
        )
        .alone(
            "handshakes_from_one_address_delay_others_by_a_turn",
            LIMIT,
            handshakes_from_one_address,
        )
        .run(fixture)
}

struct Crowded {
    env: Environment,
    _backend: Backend,
    dir: tempfile::TempDir,
}

impl Fixture for Crowded {
    fn diagnostics(&self) -> String {
        self.env.diagnostics()
    }
}

async fn fixture() -> Result<Crowded> {
    throwline_ops::limits::raise_open_files();
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let env = Builder::default()
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    Ok(Crowded {
        env,
        _backend: backend,
        dir,
    })
}

impl Crowded {
    /// Another user asks, and is answered.
    async fn another_user_is_served(&self) -> Result<()> {
        let target = Target::read(&self.env.proxy.kubeconfig, &format!("throwline-{CLUSTER}"))?;
        let (status, answer) = target.get("/api/v1/namespaces/default", &[]).await?;
        ensure!(status == 200, "another user got {status}: {answer}");
        Ok(())
    }

    /// A user of the story's own: what one user holds counts for as long as it is held.
    async fn attacker(&self, name: &str) -> Result<Mallory> {
        let token = self.env.relay.token(&["--user", name]).await?;
        let user = User::login(self.dir.path(), name, &token, &[]).await?;
        let identity = Identity::load(&user.state)?.context("the attacker has enrolled")?;
        let roots = Roots::load(&user.state)?.context("the attacker knows the authority")?;
        Ok(Mallory {
            identity: Arc::new(identity),
            roots,
            relay: self.env.relay.public_url.parse()?,
        })
    }

    fn agent_kib(&self) -> Result<u64> {
        self.env.agent.process.resident_kib()
    }

    /// Waits until the agent has given back what it had taken.
    async fn given_back(&self, before: u64) -> Result<()> {
        eventually(PATIENCE, "the agent's memory is given back", || async {
            // A load that goes on is what lets an allocator look at what is free.
            self.another_user_is_served().await?;
            let now = self.agent_kib()?;
            ensure!(now <= before + REMAINS_KIB, "{before} KiB became {now} KiB");
            Ok(())
        })
        .await
    }
}

/// An enrolled user with a special client, which does what no kubectl would.
struct Mallory {
    identity: Arc<Identity>,
    roots: Roots,
    relay: url::Url,
}

/// How a session's client reads.
#[derive(Clone, Copy)]
struct Reading {
    /// Of each of its HTTP/2 streams, bytes.
    window: u32,
    /// Bytes after which it reads no more and so acknowledges none, as by SIGSTOP. A limit in bytes
    /// bounds what this process holds itself, however late it is scheduled.
    bytes: u64,
}

impl Reading {
    /// Reads all, with such a window.
    fn all(window: u32) -> Self {
        Self {
            window,
            bytes: u64::MAX,
        }
    }
}

/// A session whose bytes are not read any more.
struct Stopped {
    _sender: SendRequest<Empty<Bytes>>,
    _answers: Vec<http::Response<Incoming>>,
    _io: JoinHandle<()>,
}

impl Mallory {
    async fn carrier(&self) -> Result<Connection> {
        let tls = Some(tls::carrier_client(&self.roots, tls::Trust::default())?);
        let config = DialConfig::new(
            self.relay.clone(),
            tls,
            Arc::new(prover(&self.identity)),
            Role::LocalProxy,
            "mallory",
        );
        Ok(Box::pin(dial(&config)).await?)
    }

    /// One more sealed session with the agent.
    async fn session(
        &self,
        carrier: &Carrier,
        how: Reading,
    ) -> Result<(SendRequest<Empty<Bytes>>, JoinHandle<()>)> {
        let line_id: [u8; 16] = rand::random();
        let open = Open {
            version: 1,
            cluster: CLUSTER.to_owned(),
            line_id: line_id.to_vec(),
            kind: LineKind::Api.into(),
            ..Open::default()
        };
        let (stream, _) = carrier.open(open.into()).await?;
        let line = line::connect(
            stream,
            LineHello::new(line_id, PATIENCE),
            LineBudgets::default(),
        )
        .await?;
        let domain = self.roots.trust_domain().clone();
        let expect = SpiffeId::new(domain.clone(), Kind::Cluster, CLUSTER)?;
        let validator = Validator::new(self.roots.clone(), domain);
        let config = tls::session_client(&self.identity, &validator, expect, tls::Alpn::H2)?;
        let io = session::connect(line, config, tls::session_name()).await?;
        let (read, write) = tokio::io::split(io);
        // Behind the last byte that is read, a stream that stays open and silent.
        let (silent, open) = tokio::io::duplex(1);
        let io = tokio::io::join(read.take(how.bytes).chain(silent), write);
        let (sender, connection) = Http2::new(TokioExecutor::new())
            .initial_stream_window_size(how.window)
            .initial_connection_window_size(1 << 30)
            .handshake(TokioIo::new(io))
            .await?;
        let driving = tokio::spawn(async move {
            // Its end is the attack's.
            let _ = connection.await;
            drop(open);
        });
        Ok((sender, driving))
    }

    /// As many sessions as it is given, of `wanted`, over several carriers; the refusals otherwise.
    async fn sessions(
        &self,
        carriers: &[Connection],
        wanted: usize,
        how: Reading,
    ) -> (
        Vec<(SendRequest<Empty<Bytes>>, JoinHandle<()>)>,
        Vec<String>,
    ) {
        let opening = stream::iter(0..wanted).map(|number| {
            let carrier = &carriers[number % carriers.len()].carrier;
            self.session(carrier, how)
        });
        let (mut sessions, mut refusals) = (Vec::new(), Vec::new());
        let mut opened = std::pin::pin!(opening.buffer_unordered(16));
        while let Some(session) = opened.next().await {
            match session {
                Ok(session) => sessions.push(session),
                Err(error) => refusals.push(format!("{error:#}")),
            }
        }
        (sessions, refusals)
    }

    async fn carriers(&self, count: usize) -> Result<Vec<Connection>> {
        let mut carriers = Vec::new();
        for _ in 0..count {
            carriers.push(self.carrier().await?);
        }
        Ok(carriers)
    }
}

async fn ask(
    sender: &mut SendRequest<Empty<Bytes>>,
    path: &str,
) -> Result<http::Response<Incoming>> {
    sender.ready().await?;
    let request = http::Request::get(format!("https://agent{path}")).body(Empty::new())?;
    Ok(sender.send_request(request).await?)
}

async fn a_thousand_lines(fixture: Arc<Crowded>) -> Result<()> {
    fixture.another_user_is_served().await?;
    let mallory = fixture.attacker("mallory-lines").await?;
    let carriers = mallory.carriers(4).await?;
    let (sessions, refusals) = mallory
        .sessions(&carriers, 1000, Reading::all(65_535))
        .await;
    println!("  {} lines, {} refused", sessions.len(), refusals.len());
    ensure!(
        (200..=256).contains(&sessions.len()),
        "one user has {} lines",
        sessions.len()
    );
    let why = refusals.last().context("none was refused")?;
    ensure!(why.contains("256 lines open"), "{why}");
    // A new user, without a session yet.
    let token = fixture.env.relay.token(&["--user", "newcomer"]).await?;
    let dir = private_dir()?;
    let newcomer = User::login(dir.path(), "newcomer", &token, &[]).await?;
    let proxy = Proxy::start(&newcomer, &[CLUSTER], &[]).await?;
    let target = Target::read(&proxy.kubeconfig, &format!("throwline-{CLUSTER}"))?;
    let (status, answer) = target.get("/api/v1/namespaces/default", &[]).await?;
    ensure!(status == 200, "a newcomer got {status}: {answer}");
    fixture.another_user_is_served().await?;
    drop((sessions, carriers));
    Ok(())
}

async fn watches_on_many_lines(fixture: Arc<Crowded>) -> Result<()> {
    let mallory = fixture.attacker("mallory-watches").await?;
    let carriers = mallory.carriers(1).await?;
    let (mut sessions, refusals) = mallory.sessions(&carriers, 21, Reading::all(65_535)).await;
    ensure!(refusals.is_empty(), "{refusals:?}");
    let (mut watches, mut refused) = (Vec::new(), None);
    'all: for (sender, _) in &mut sessions {
        // The API server sends without end, without a reader: the answer never ends.
        for _ in 0..250 {
            let watch = ask(sender, "/test/bytes/1099511627776").await?;
            if watch.status() == 429 {
                refused = Some(watch);
                break 'all;
            }
            watches.push(watch);
        }
    }
    println!("  {} requests under way", watches.len());
    ensure!(watches.len() <= 512, "{} are under way", watches.len());
    let refused = refused.context("none was refused")?;
    ensure!(refused.headers().contains_key("retry-after"), "{refused:?}");
    fixture.another_user_is_served().await?;
    drop((watches, sessions, carriers));
    eventually(PATIENCE, "nothing is under way", || async {
        let now = Metrics::of(fixture.env.agent.admin).await?;
        let under_way = now.sum("throwline_agent_requests_in_flight", &[]);
        ensure!(under_way <= 1.0, "{under_way} are under way");
        Ok(())
    })
    .await
}

async fn lines_without_acknowledgements(fixture: Arc<Crowded>) -> Result<()> {
    fixture.another_user_is_served().await?;
    let before = fixture.agent_kib()?;
    let mallory = fixture.attacker("mallory-acks").await?;
    let carriers = mallory.carriers(4).await?;
    let how = Reading {
        window: 1 << 30,
        bytes: 64 * 1024,
    };
    let (sessions, _) = mallory.sessions(&carriers, 1000, how).await;
    let mut stopped = Vec::new();
    for (mut sender, driving) in sessions {
        let answer = ask(&mut sender, "/test/bytes/1099511627776").await?;
        stopped.push(Stopped {
            _sender: sender,
            _answers: vec![answer],
            _io: driving,
        });
    }
    let worst = worst_of(&fixture, before).await?;
    println!(
        "  {} lines: {} MiB more",
        stopped.len(),
        worst.saturating_sub(before) / 1024
    );
    ensure!(worst <= before + MOST_KIB, "{before} became {worst} KiB");
    fixture.another_user_is_served().await?;
    drop((stopped, carriers));
    fixture.given_back(before).await
}

async fn windows_of_zero(fixture: Arc<Crowded>) -> Result<()> {
    fixture.another_user_is_served().await?;
    let before = fixture.agent_kib()?;
    let mallory = fixture.attacker("mallory-windows").await?;
    let carriers = mallory.carriers(1).await?;
    let (mut sessions, _) = mallory.sessions(&carriers, 4, Reading::all(0)).await;
    let mut held = Vec::new();
    'all: for (sender, _) in &mut sessions {
        for _ in 0..250 {
            let answer = ask(sender, "/test/bytes/1099511627776").await?;
            if answer.status() == 429 {
                break 'all;
            }
            held.push(answer);
        }
    }
    let worst = worst_of(&fixture, before).await?;
    println!(
        "  {} streams: {} MiB more",
        held.len(),
        worst.saturating_sub(before) / 1024
    );
    ensure!(held.len() <= 512, "{} streams", held.len());
    ensure!(worst <= before + MOST_KIB, "{before} became {worst} KiB");
    fixture.another_user_is_served().await?;
    drop((held, sessions, carriers));
    fixture.given_back(before).await
}

/// The most that the agent holds until it grows no more.
async fn worst_of(fixture: &Crowded, before: u64) -> Result<u64> {
    let (mut worst, mut quiet) = (before, 0);
    while quiet < 10 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = fixture.agent_kib()?;
        quiet = if now > worst + 1024 { 0 } else { quiet + 1 };
        worst = worst.max(now);
    }
    Ok(worst)
}

async fn handshakes_from_one_address(fixture: Arc<Crowded>) -> Result<()> {
    let mallory = fixture.attacker("mallory-handshakes").await?;
    let config = tls::carrier_client(&mallory.roots, tls::Trust::default())?;
    let name = rustls::pki_types::ServerName::try_from("localhost")?;
    let mut client = rustls::ClientConnection::new(config, name)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    let hello = Arc::new(hello);
    let to = fixture.env.relay.listen;
    let told = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut flood = JoinSet::new();
    for _ in 0..400 {
        let (hello, told) = (hello.clone(), told.clone());
        flood.spawn(async move {
            loop {
                let greeted = async {
                    let socket = tokio::net::TcpSocket::new_v4()?;
                    socket.bind(([127, 0, 0, 77], 0).into())?;
                    let mut socket = socket.connect(to).await?;
                    socket.write_all(&hello).await?;
                    let mut answer = [0; 7];
                    socket.read_exact(&mut answer).await?;
                    std::io::Result::Ok(answer)
                };
                let greeted = tokio::time::timeout(Duration::from_secs(1), greeted).await;
                if let Ok(Ok([21, .., code])) = greeted
                    && busy::retry_after(code).is_some()
                {
                    told.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
    }
    eventually(PATIENCE, "the flood is more than is taken on", || async {
        let told = told.load(std::sync::atomic::Ordering::Relaxed);
        ensure!(told > 200, "{told} were told to come again");
        Ok(())
    })
    .await?;
    let mut took = Vec::new();
    for _ in 0..7 {
        let began = Instant::now();
        // From another address, in one try.
        let connection = mallory.carrier().await?;
        took.push(began.elapsed());
        drop(connection);
    }
    took.sort();
    println!("  handshakes of others beside it: {took:?}");
    flood.shutdown().await;
    ensure!(took[3] < Duration::from_secs(2), "{took:?}");
    Ok(())
}
