//! Thousands of agents lose their relay at once and come to another, which serves a user
//! meanwhile. Run it by `cargo xtask storm [--agents N]`.
//!
//! The agents are the product's own carriers in this one process, each with its identity; the relays, the user's proxy and the agent that is asked are real processes, and so is the
//! forwarder in front of the relays, which needs two descriptors for each agent. The last line is the
//! result; the exit code is 1 where a promise is not kept.

use std::net::SocketAddr;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use throwline_database::Database;
use throwline_e2e::client::Target;
use throwline_e2e::environment::private_dir;
use throwline_e2e::forwarder::Forwarder;
use throwline_e2e::postgres::{self, OWNER, Postgres};
use throwline_e2e::simulated::{Enrolled, Simulated};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{Agent, Proxy, Relay, User, eventually, free_address};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};
use tokio::sync::watch;

/// The promise: all agents are back within this, or within so many times what their handshakes alone
/// take on this machine, where that is longer.
const BACK: Duration = Duration::from_secs(30);
const OF_THE_PURE_TIME: f64 = 1.3;
/// Agents that are connected together to measure that, fewer than a relay takes on at once.
const BATCH: usize = 150;
/// The promise: the 99th percentile of a request meanwhile, as a multiple of its value at rest.
const SLOWER: f64 = 3.0;
/// How long the value at rest is measured.
const REST: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(180);

/// The argument that makes this program the forwarder.
const FORWARD: &str = "--forward-from";

#[tokio::main]
async fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let ended = match (arguments.next().as_deref(), arguments.next()) {
        (Some(FORWARD), Some(from)) => forward(&from).await,
        _ => storm().await,
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("storm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn storm() -> Result<()> {
    let agents = agents_asked_for()?;
    enough_open_files(agents)?;
    let dir = private_dir()?;
    let upstream = Upstream::start(dir.path()).await?;
    let database = Postgres::start().await?;
    let url = database.url(OWNER);
    postgres::migrate(&Database::from_url(&url)?).await?;
    let (at, first, second) = (free_address()?, free_address()?, free_address()?);
    let public = format!("https://localhost:{}", at.port());
    let arguments = ["--database", &url, "--instance"];
    let dying = [&arguments[..], &["dying"]].concat();
    let dying = Relay::at(&dir.path().join("dying"), first, &public, &dying).await?;
    dying.share_the_ca(&dir.path().join("healthy"))?;
    let healthy = [&arguments[..], &["healthy"]].concat();
    let healthy = Relay::at(&dir.path().join("healthy"), second, &public, &healthy).await?;
    let mut front = Front::start(at, second).await?;

    // A user works by way of the relay that stays.
    let token = healthy.token(&["--cluster", "asked"]).await?;
    let one = ["--carriers", "1"];
    let asked = Agent::start(dir.path(), "asked", &token, upstream.kubeconfig(), &one).await?;
    asked.connected().await?;
    let token = healthy
        .token(&["--user", "dana", "--group", upstream.group()])
        .await?;
    let user = User::login(dir.path(), "dana", &token, &[]).await?;
    let proxy = Proxy::start(&user, &["asked"], &[]).await?;
    let target = Target::read(&proxy.kubeconfig, "throwline-asked")?;

    // A proxy connects when it is first asked.
    let (status, _) = target.get("/api/v1/namespaces/default", &[]).await?;
    ensure!(status == 200, "{status}");

    front.lead_to(first).await?;
    front.come_from_many().await?;
    println!("enrolling {agents} agents");
    let mut enrolled = Enrolled::at(&dying, Some(&url), agents).await?;
    println!("connecting them");
    let mut simulated = Simulated::new()?;
    let pure = pure_time(&mut simulated, &mut enrolled, &public).await? * agents as u32;
    let promised = BACK.max(pure.mul_f64(OF_THE_PURE_TIME));
    println!("their handshakes alone take {pure:.1?}; they must be back within {promised:.1?}");
    simulated.dial(enrolled, &public)?;
    simulated.all_connected(PATIENCE).await?;

    eventually(PATIENCE, "all is written", || async {
        for relay in [&dying, &healthy] {
            let owed = relay
                .metrics()
                .await?
                .sum("throwline_relay_database_owed_writes", &[]);
            ensure!(owed == 0.0, "{owed} writes are owed");
        }
        Ok(())
    })
    .await?;
    let rest = p99(&target, &ended_after(REST)).await?;
    let before = healthy.process.resident_kib()?;
    front.lead_to(second).await?;
    let accepted = || async {
        let now = healthy.metrics().await?;
        anyhow::Ok(now.sum("throwline_relay_handshakes_total", &["accepted"]))
    };
    let handshakes = accepted().await?;
    dying.process.kill().await?;
    let killed = Instant::now();
    let (done, stop) = watch::channel(false);
    let measuring = tokio::spawn(async move { p99(&target, &stop).await });
    eventually(PATIENCE, "none is left at the dead relay", || async {
        let now = simulated.connected();
        ensure!(now < agents as f64, "{now} are connected");
        Ok(())
    })
    .await?;
    let back = eventually(PATIENCE, "all agents are back", || async {
        let known = healthy.metrics().await?;
        let there = known.sum("throwline_relay_carriers", &["role=\"agent\""]);
        ensure!(there >= agents as f64 + 1.0, "{there} of {agents} are back");
        Ok(killed.elapsed())
    })
    .await?;
    done.send_replace(true);
    let busy = measuring.await??;
    let rate = (accepted().await? - handshakes) / back.as_secs_f64();
    let after = healthy.process.resident_kib()?;
    let each = (after.saturating_sub(before)) as f64 / agents as f64;
    let slower = busy.as_secs_f64() / rest.as_secs_f64();
    println!(
        "handshakes_per_s={rate:.0} p99_rest_ms={:.2} p99_storm_ms={:.2} kib_per_agent={each:.1}",
        rest.as_secs_f64() * 1e3,
        busy.as_secs_f64() * 1e3,
    );
    println!("failed dials: {}", simulated.stop().await);
    println!(
        "agents={agents} back_s={:.1} healthy_p99_ratio={slower:.2} relay_rss_mib={}",
        back.as_secs_f64(),
        after / 1024,
    );
    ensure!(back <= promised, "not all were back within {promised:?}");
    ensure!(slower <= SLOWER, "requests became {slower:.1} times slower");
    Ok(())
}

/// What one handshake takes when only few are under way: the best of some batches, which stay.
async fn pure_time(
    simulated: &mut Simulated,
    enrolled: &mut Enrolled,
    public: &str,
) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..4 {
        let batch = enrolled.split_off(BATCH.min(enrolled.len() / 4).max(1));
        let count = u32::try_from(batch.len())?;
        let began = Instant::now();
        simulated.dial(batch, public)?;
        simulated.all_connected(PATIENCE).await?;
        best = best.min(began.elapsed() / count.max(1));
        // The relay takes on as many at once again.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(best)
}

/// A forwarder in a separate process.
struct Front {
    _process: Child,
    tell: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Front {
    async fn start(from: SocketAddr, to: SocketAddr) -> Result<Self> {
        let mut process = tokio::process::Command::new(std::env::current_exe()?)
            .args([FORWARD, &from.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let tell = process.stdin.take().context("its input")?;
        let answers = process.stdout.take().context("its output")?;
        let answers = BufReader::new(answers).lines();
        let mut front = Self {
            _process: process,
            tell,
            answers,
        };
        front.lead_to(to).await?;
        Ok(front)
    }

    /// Leads new connections to `to`.
    async fn lead_to(&mut self, to: SocketAddr) -> Result<()> {
        self.ask(&to.to_string()).await
    }

    /// From now on each connection has another source address.
    async fn come_from_many(&mut self) -> Result<()> {
        self.ask(MANY).await
    }

    async fn ask(&mut self, what: &str) -> Result<()> {
        self.tell.write_all(format!("{what}\n").as_bytes()).await?;
        let done = self.answers.next_line().await?;
        ensure!(done.is_some(), "the forwarder has ended");
        Ok(())
    }
}

const MANY: &str = "many";

/// The forwarder's process: it ends with its input.
async fn forward(from: &str) -> Result<()> {
    throwline_ops::limits::raise_open_files();
    let forwarder = Forwarder::start(from.parse()?, &[]).await?;
    let mut asked = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = asked.next_line().await? {
        match line.as_str() {
            MANY => forwarder.come_from_many(),
            to => forwarder.lead_to(to.parse()?),
        }
        println!("done");
    }
    Ok(())
}

/// The forwarder needs two descriptors for each agent, and for a while more for those that move.
fn enough_open_files(agents: usize) -> Result<()> {
    let needed = 3 * agents as u64 + 1024;
    let allowed = throwline_ops::limits::raise_open_files();
    ensure!(
        allowed.is_none_or(|allowed| allowed >= needed),
        "{agents} agents need {needed} open files, and {} are allowed (ulimit -n)",
        allowed.unwrap_or_default()
    );
    Ok(())
}

fn agents_asked_for() -> Result<usize> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        [] => Ok(5000),
        [flag, value] if flag == "--agents" => value.parse().context("--agents needs a number"),
        _ => bail!("usage: storm [--agents N]"),
    }
}

/// Turns true after `wait`.
fn ended_after(wait: Duration) -> watch::Receiver<bool> {
    let (tell, told) = watch::channel(false);
    tokio::spawn(async move {
        tokio::time::sleep(wait).await;
        tell.send_replace(true);
    });
    told
}

/// The 99th percentile of a small request on a kept connection, repeated until the signal.
async fn p99(target: &Target, end: &watch::Receiver<bool>) -> Result<Duration> {
    let mut stream = target.connect(&[b"http/1.1"]).await?;
    let request = format!(
        "GET {}/api/v1/namespaces/default HTTP/1.1\r\nHost: {}\r\n\r\n",
        target.prefix, target.address
    );
    let mut took = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    while !*end.borrow() {
        let began = Instant::now();
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        // A small answer is one piece or two; its length marks its end.
        let mut have = 0;
        while !is_whole(&buffer[..have]) {
            let count = stream.read(&mut buffer[have..]).await?;
            ensure!(count > 0, "the proxy closed the connection");
            have += count;
        }
        ensure!(
            buffer.starts_with(b"HTTP/1.1 200"),
            "{}",
            String::from_utf8_lossy(&buffer[..have])
        );
        took.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    took.sort_unstable();
    let at = |percent: usize| took.get(took.len() * percent / 100).copied();
    let shown = [50, 90, 99].map(|percent| at(percent).unwrap_or_default());
    println!("{} requests, p50, p90, p99: {shown:?}", took.len());
    at(99).context("nothing was measured")
}

fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse::<usize>().ok())?
    });
    match length {
        Some(length) => body.len() >= length,
        None => body.ends_with("0\r\n\r\n"),
    }
}
