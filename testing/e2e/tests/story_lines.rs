//! Lines that outlive what carries them, and what people see when one cannot.

use std::net::SocketAddr;
use std::process::{ExitCode, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use throwline_e2e::backend::Backend;
use throwline_e2e::environment::private_dir;
use throwline_e2e::expected_failures::ExpectedFailures;
use throwline_e2e::faults::{Asked, BACK, Fault, kill_relay};
use throwline_e2e::fleet::{Fleet, Front, Size};
use throwline_e2e::link::State;
use throwline_e2e::metrics::Metrics;
use throwline_e2e::namespace::Namespace;
use throwline_e2e::operations::{Ground, Operation, Running};
use throwline_e2e::pod::{self, Pod};
use throwline_e2e::upstream::Upstream;
use throwline_e2e::{
    Agent, Builder, Environment, Fixture, Kubectl, Process, Relay, Suite, User, contains,
    eventually, free_address, tools,
};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

const SIZE: Size = Size::ONE_USER;

fn main() -> ExitCode {
    let limit = limit();
    Suite::new()
        .alone("everything_outlives_its_relay", limit, a_killed_relay)
        .alone("everything_outlives_its_balancer", limit, a_killed_balancer)
        .alone(
            "everything_outlives_a_rolling_restart",
            limit,
            a_rolling_restart,
        )
        .alone("everything_outlives_a_silent_link", limit, a_silent_link)
        .alone(
            "a_command_that_ends_while_the_link_is_silent_has_said_all",
            limit,
            last_words_in_silence,
        )
        .alone("a_large_answer_outlives_its_relay", limit, a_large_answer)
        .alone("a_typist_leaves_a_silent_way_within_5_s", limit, a_typist)
        .alone("a_planned_move_is_a_short_pause", limit, a_planned_move)
        .alone(
            "a_new_address_after_30_s_without_a_link",
            limit,
            a_new_address,
        )
        .alone(
            "a_line_whose_time_is_over_says_so",
            limit,
            a_line_whose_time_is_over,
        )
        .alone(
            "a_line_whose_agent_was_replaced_ends_soon",
            limit,
            a_replaced_agent,
        )
        .run(|| async { Ok(()) })
}

fn is_large() -> bool {
    std::env::var_os("THROWLINE_E2E_LARGE").is_some()
}

/// MiB copied, MiB forwarded, idle connections, MiB listed: small in every run of the tests, and
/// large with `THROWLINE_E2E_LARGE`.
fn sizes() -> (usize, usize, usize, usize) {
    match is_large() {
        true => (500, 1024, 50, 500),
        false => (30, 30, 20, 10),
    }
}

struct Scene {
    fleet: Fleet,
    ground: Arc<Ground>,
}

impl Scene {
    async fn start() -> Result<Self> {
        let front = Front::from_environment()?;
        let arguments = ["--drain-spread", "1s", "--drain-timeout", "30s"];
        let fleet = Fleet::with_links(SIZE, front, &arguments).await?;
        let ground = async {
            fleet.spread_over(2, BACK).await?;
            Ground::in_fleet(&fleet).await
        };
        let ground = ground.await?;
        Ok(Self { fleet, ground })
    }

    /// Everything at once, while that happens.
    async fn all_through(&self, happens: impl AsyncFnOnce(&Fleet) -> Result<()>) -> Result<()> {
        let (copied, forwarded, idle, listed) = sizes();
        let all = [
            Operation::Exec,
            Operation::Terminal,
            Operation::CopyIn(copied),
            Operation::CopyOut(copied),
            Operation::PortForward {
                mib: forwarded,
                idle,
            },
            Operation::Logs,
            Operation::Watch,
            Operation::List(listed),
        ];
        let mut running = Vec::new();
        for operation in all {
            let started = Running::start(operation, &self.ground).await;
            running.push((
                operation,
                started.with_context(|| format!("{operation:?}"))?,
            ));
        }
        happens(&self.fleet).await?;
        let mut failed = Vec::new();
        for (operation, running) in running {
            match running.end().await {
                Ok(pauses) => println!("    {operation:?}: longest pause {:?}", pauses.longest()),
                Err(fault) => failed.push(format!("{operation:?}: {fault:?}")),
            }
        }
        let counted = self.counted().await?;
        println!("    {counted}");
        ensure!(
            failed.is_empty(),
            "{}\n{}",
            failed.join("\n"),
            self.fleet.logs()
        );
        Ok(())
    }

    async fn metrics(&self) -> Result<Metrics> {
        let proxy = self.fleet.proxies.first().context("a proxy")?.lock().await;
        Metrics::of(proxy.admin).await
    }

    async fn resumptions(&self) -> Result<f64> {
        let now = self.metrics().await?;
        Ok(now.sum("throwline_local_proxy_line_resumptions_total", &[]))
    }

    async fn counted(&self) -> Result<String> {
        let now = self.metrics().await?;
        let sum = |name: &str| now.sum(&format!("throwline_local_proxy_{name}"), &[]);
        let resumed = sum("line_resumptions_total");
        ensure!(resumed > 0.0, "no line was resumed");
        Ok(format!(
            "{resumed} resumptions, {:.3} s of pauses, {:.0} KiB sent again",
            sum("line_pause_seconds_sum"),
            sum("line_replayed_bytes_total") / 1024.0
        ))
    }
}

/// Sets the scene, plays, and takes everything back, whatever came of it. What plays for too long is
/// given up before the suite would, which shows no logs of it.
async fn staged(play: impl AsyncFnOnce(&Scene) -> Result<()>) -> Result<()> {
    let scene = Scene::start().await?;
    let played = tokio::time::timeout(limit() - Duration::from_secs(30), play(&scene)).await;
    let played =
        played.unwrap_or_else(|_| Err(anyhow::anyhow!("it does not end\n{}", scene.fleet.logs())));
    let cleaned = scene.fleet.upstream.clean().await;
    played.and(cleaned)
}

fn limit() -> Duration {
    Duration::from_secs(if is_large() { 1800 } else { 300 })
}

async fn a_killed_relay(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        let kill = async |fleet: &Fleet| {
            for number in 0..SIZE.relays {
                let down = Duration::from_secs(1);
                kill_relay(
                    fleet,
                    number,
                    down,
                    "kill",
                    &ExpectedFailures::default(),
                    &[],
                )
                .await?;
            }
            Ok(())
        };
        scene.all_through(kill).await?;
        Ok(())
    })
    .await
}

/// The balancer alone, then with a relay.
async fn a_killed_balancer(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        let kill = async |fleet: &Fleet| {
            let down = Duration::from_millis(500);
            fleet.restart_balancer(down).await?;
            fleet.spread_over(2, BACK).await?;
            let expected = ExpectedFailures::default();
            let both = kill_relay(fleet, 0, down, "kill", &expected, &[]);
            tokio::try_join!(fleet.restart_balancer(down), both).map(drop)
        };
        scene.all_through(kill).await?;
        Ok(())
    })
    .await
}

async fn a_rolling_restart(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        let restart = async |fleet: &Fleet| {
            Fault::RollingRestart
                .make(fleet, &ExpectedFailures::default(), &[])
                .await
        };
        scene.all_through(restart).await?;
        Ok(())
    })
    .await
}

async fn be_silent_for_10_s(fleet: &Fleet) -> Result<()> {
    let link = fleet.proxy_links.first().context("a link")?;
    link.set(State::Silent);
    tokio::time::sleep(Duration::from_secs(10)).await;
    // What was on its way is gone with the connections.
    link.set(State::Closed);
    link.set(State::Whole);
    Ok(())
}

async fn a_silent_link(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        scene.all_through(be_silent_for_10_s).await?;
        Ok(())
    })
    .await
}

/// The API server closes the connection of a command that has ended, even while its output is still
/// on the way, and answers kubectl's next ping with a reset.
async fn last_words_in_silence(_: Arc<()>) -> Result<()> {
    const LINES: usize = 400_000;
    staged(async |scene: &Scene| {
        let ground = &scene.ground;
        let pod = Pod::start(&ground.upstream, &ground.namespace, pod::IDLE).await?;
        let script = format!("echo ready; sleep 1; seq 1 {LINES}; exit 7");
        let mut child = ground
            .kubectl
            .command(&["exec", &pod.name, "--", "sh", "-c", &script])
            .spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let ready = lines.next_line().await?;
        ensure!(ready.as_deref() == Some("ready"), "{ready:?}");
        let reading = async {
            for number in 1..=LINES {
                let line = lines.next_line().await?;
                let logs = || scene.fleet.logs();
                let line = line.with_context(|| format!("line {number} is missing\n{}", logs()))?;
                ensure!(
                    line == number.to_string(),
                    "line {number} is {line}\n{}",
                    logs()
                );
            }
            let more = lines.next_line().await?;
            ensure!(more.is_none(), "{more:?}");
            Ok(child.wait().await?)
        };
        let (status, ()) = tokio::try_join!(reading, be_silent_for_10_s(&scene.fleet))?;
        ensure!(status.code() == Some(7), "exec ended with {status}");
        Ok(())
    })
    .await
}

/// 2 GiB with `THROWLINE_E2E_LARGE`; the relay dies again and again meanwhile.
async fn a_large_answer(_: Arc<()>) -> Result<()> {
    let total: u64 = if is_large() { 2 << 30 } else { 64 << 20 } / 16;
    let dir = private_dir()?;
    let backend = Backend::start(dir.path()).await?;
    let mut env = Builder::default()
        .agent_kubeconfig(&backend.kubeconfig)
        .start()
        .await?;
    let kubectl = env.newest()?;
    let path = format!("/test/numbered/{total}");
    let mut child = kubectl.command(&["get", "--raw", &path]).spawn()?;
    let mut stdout = BufReader::with_capacity(1 << 20, child.stdout.take().context("no output")?);
    let (read, mut seen) = tokio::sync::watch::channel(0u64);
    let reading = tokio::spawn(async move {
        let mut line = [0; 16];
        for number in 0..total {
            stdout.read_exact(&mut line).await?;
            let expected = format!("{number:015x}\n");
            ensure!(line == *expected.as_bytes(), "line {number} is another");
            if number % 4096 == 0 {
                read.send_replace(number);
            }
        }
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).await?;
        // kubectl ends its output with another line.
        ensure!(
            rest.is_empty() || rest == b"\n",
            "{} bytes too many",
            rest.len()
        );
        anyhow::Ok(())
    });
    for part in 1..=3 {
        seen.wait_for(|read| *read >= total * part / 5).await?;
        env.relay.process.kill().await?;
        env.relay.restart().await?;
    }
    let patience = Duration::from_secs(if is_large() { 900 } else { 240 });
    tokio::time::timeout(patience, reading)
        .await
        .context("it stands still")???;
    let status = child.wait().await?;
    ensure!(status.success(), "kubectl ended with {status}");
    let now = Metrics::of(env.proxy.admin).await?;
    let sum = |name: &str| now.sum(&format!("throwline_local_proxy_{name}"), &[]);
    println!(
        "    {} MiB, {} resumptions, {:.3} s of pauses",
        (total * 16) >> 20,
        sum("line_resumptions_total"),
        sum("line_pause_seconds_sum")
    );
    ensure!(sum("line_resumptions_total") >= 3.0);
    env.close().await
}

/// The carrier's connection swallows everything, and new ones work: as with a balancer's node that
/// went, or a route that died.
async fn a_typist(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        let running = Running::start(Operation::Exec, &scene.ground).await?;
        let before = scene.resumptions().await?;
        let link = scene.fleet.proxy_links.first().context("a link")?;
        link.swallow_what_is_open();
        let since = Instant::now();
        eventually(Duration::from_secs(30), "another way is found", || async {
            ensure!(scene.resumptions().await? > before);
            Ok(())
        })
        .await?;
        let took = since.elapsed();
        println!("    left after {took:?}");
        let pauses = running
            .end()
            .await
            .map_err(|fault| anyhow::anyhow!("{fault:?}\n{}", scene.fleet.logs()))?;
        let pause = pauses.longest();
        println!("    longest pause {pause:?}");
        ensure!(pause < Duration::from_secs(8), "{pause:?}");
        Ok(())
    })
    .await
}

async fn a_planned_move(_: Arc<()>) -> Result<()> {
    staged(async |scene: &Scene| {
        let running = Running::start(Operation::Exec, &scene.ground).await?;
        for relay in 0..SIZE.relays {
            let drain = Fault::DrainRelay {
                relay,
                asked: Asked::Signal,
            };
            drain
                .make(&scene.fleet, &ExpectedFailures::default(), &[])
                .await?;
            scene.fleet.spread_over(2, BACK).await?;
        }
        let pauses = running
            .end()
            .await
            .map_err(|fault| anyhow::anyhow!("{fault:?}\n{}", scene.fleet.logs()))?;
        let pause = pauses.longest();
        println!("    {}, longest pause {pause:?}", scene.counted().await?);
        let now = scene.metrics().await?;
        let sum = now.sum("throwline_local_proxy_line_pause_seconds_sum", &[]);
        let count = now.sum("throwline_local_proxy_line_pause_seconds_count", &[]);
        ensure!(sum / count < 0.2, "{sum} s in {count} moves");
        Ok(())
    })
    .await
}

/// A user's machine: its link is down for a while, and returns with another address.
async fn a_new_address(_: Arc<()>) -> Result<()> {
    const CLUSTER: &str = "far";
    let dir = private_dir()?;
    let there = Namespace::new().await?;
    let upstream = Arc::new(Upstream::start(dir.path()).await?);
    let listen = SocketAddr::new(there.address.into(), free_address()?.port());
    let relay = Relay::at(dir.path(), listen, &format!("https://{listen}"), &[]).await?;
    let token = relay.token(&["--cluster", CLUSTER]).await?;
    let agent = Agent::start(dir.path(), CLUSTER, &token, upstream.kubeconfig(), &[]).await?;
    agent.connected().await?;
    let who = ["--user", "dana", "--group", upstream.group()];
    let user = User::login(dir.path(), "dana", &relay.token(&who).await?, &[]).await?;
    let kubeconfig = dir.path().join("kubeconfig");
    let file = kubeconfig.display().to_string();
    let proxy = user.command(&["proxy", CLUSTER, "--kubeconfig", &file])?;
    let proxy = Process::start("proxy", dir.path(), there.inside(proxy.as_std()))?;
    eventually(Duration::from_secs(30), "the proxy is up", || async {
        proxy.check_running().await?;
        ensure!(kubeconfig.exists());
        Ok(())
    })
    .await?;
    let namespace = upstream.namespace("lines-").await?;
    let pod = Pod::start(&upstream, &namespace, pod::IDLE).await?;
    let kubectl = Kubectl::new(&tools::newest_kubectl()?, &kubeconfig, dir.path())
        .context(&format!("throwline-{CLUSTER}"))
        .namespace(&namespace);
    let script = "while read -r line; do echo \"got $line\"; done; exit 7";
    let command = kubectl.command(&["exec", "-i", &pod.name, "--", "sh", "-c", script]);
    let mut command = there.inside(command.as_std());
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.kill_on_drop(true).spawn()?;
    let mut stdin = child.stdin.take().context("no input")?;
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let mut answered = async |number: u32| {
        stdin.write_all(format!("{number}\n").as_bytes()).await?;
        let line = tokio::time::timeout(Duration::from_secs(90), lines.next_line()).await??;
        ensure!(line == Some(format!("got {number}")), "{line:?}");
        anyhow::Ok(())
    };
    for number in 0..10 {
        answered(number).await?;
    }
    there.link("down").await?;
    let typed_into_nothing = answered(10);
    let another_address = async {
        tokio::time::sleep(Duration::from_secs(30)).await;
        there.readdress(2, 3).await?;
        there.link("up").await?;
        anyhow::Ok(Instant::now())
    };
    let (answer, up) = tokio::join!(typed_into_nothing, another_address);
    answer.with_context(|| proxy.log())?;
    println!("    answered {:?} after the link was back", up?.elapsed());
    for number in 11..20 {
        answered(number).await?;
    }
    drop(stdin);
    let status = child.wait().await?;
    ensure!(status.code() == Some(7), "exec ended with {status}");
    upstream.clean().await
}

/// A kubectl whose line will not come back.
struct Doomed {
    what: &'static str,
    child: tokio::process::Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Doomed {
    /// Begins; returns once its first line was read.
    async fn start(what: &'static str, kubectl: &Kubectl, arguments: &[&str]) -> Result<Self> {
        let mut child = kubectl.command(arguments).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
        let first = tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await;
        first
            .context(what)??
            .with_context(|| format!("{what}: no line"))?;
        Ok(Self { what, child, lines })
    }

    /// Waits for its end; how it ended and its last output, of which `more` is no news.
    async fn ended(mut self) -> Result<(ExitStatus, String)> {
        let (mut said, mut stderr) = (String::new(), String::new());
        let mut pipe = self.child.stderr.take().context("no errors")?;
        let reading = async {
            let printed = async {
                while let Ok(Some(line)) = self.lines.next_line().await {
                    if line != "more" {
                        said.push_str(&line);
                    }
                }
            };
            tokio::join!(printed, pipe.read_to_string(&mut stderr)).1
        };
        let read = tokio::time::timeout(Duration::from_secs(60), reading).await;
        read.with_context(|| format!("{} does not end", self.what))??;
        said.push_str(&stderr);
        let status = self.child.wait().await?;
        println!("    {}: {status}: {}", self.what, said.trim());
        Ok((status, said))
    }
}

/// One of each kind that lasts, over HTTP/2 and, where that is another case, HTTP/1.1.
async fn doomed(env: &Environment, pod: &Pod) -> Result<Vec<Doomed>> {
    let kubectl = env.newest()?;
    let http1 = kubectl.clone().env("DISABLE_HTTP2", "true");
    let endless = "while :; do echo more; sleep 0.1; done";
    let exec = ["exec", &pod.name, "--", "sh", "-c", endless];
    let watch = ["get", "configmaps", "--watch"];
    let logs = ["logs", "--follow", &pod.name];
    let forward = ["port-forward", &pod.name, ":9"];
    Ok(vec![
        Doomed::start("exec", &kubectl, &exec).await?,
        Doomed::start("get --watch", &kubectl, &watch).await?,
        Doomed::start("get --watch, HTTP/1.1", &http1, &watch).await?,
        Doomed::start("logs --follow", &kubectl, &logs).await?,
        Doomed::start("logs --follow, HTTP/1.1", &http1, &logs).await?,
        Doomed::start("port-forward", &kubectl, &forward).await?,
    ])
}

/// All of them end as failures, and those that can, with the reason. A watch has it in another place: as
/// the last thing that it shows, for kubectl ends a watch well whatever ended it.
async fn all_say(doomed: Vec<Doomed>, what: &str) -> Result<()> {
    let ended = doomed.into_iter().map(async |doomed| {
        let name = doomed.what;
        (name, doomed.ended().await)
    });
    for (name, ended) in futures::future::join_all(ended).await {
        let (status, said) = ended?;
        let is_watch = name.starts_with("get");
        ensure!(is_watch || !status.success(), "{name} ended well");
        if is_watch || name == "exec" {
            contains(&said, what).context(name)?;
        }
    }
    Ok(())
}

async fn a_line_whose_time_is_over(_: Arc<()>) -> Result<()> {
    let mut env = Builder::default()
        .proxy_arguments(&["--detached-life", "3s"])
        .start()
        .await?;
    let script = "while :; do echo more; sleep 0.1; done";
    let pod = Pod::start(&env.upstream, &env.namespace, script).await?;
    let doomed = doomed(&env, &pod).await?;
    let since = Instant::now();
    env.relay.process.kill().await?;
    all_say(doomed, "was lost for longer than 3 s (--detached-life)").await?;
    ensure!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    contains(&env.proxy.process.log(), "could not be resumed within 3 s")?;
    env.relay.restart().await?;
    pod.remove().await?;
    env.close().await
}

async fn a_replaced_agent(_: Arc<()>) -> Result<()> {
    let mut env = Environment::start().await?;
    let script = "while :; do echo more; sleep 0.1; done";
    let pod = Pod::start(&env.upstream, &env.namespace, script).await?;
    let doomed = doomed(&env, &pod).await?;
    env.agent.process.kill().await?;
    env.agent.restart().await?;
    let since = Instant::now();
    all_say(doomed, "was restarted or replaced").await?;
    ensure!(
        since.elapsed() < Duration::from_secs(30),
        "{:?}",
        since.elapsed()
    );
    contains(&env.proxy.process.log(), "was restarted or replaced")?;
    pod.remove().await?;
    env.close().await
}
