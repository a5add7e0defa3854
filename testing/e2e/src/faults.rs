//! What is done to a fleet: kills, restarts, cut links, readers that do not read, a database that
//! is away. Each function applies a fault and undoes it; [`Fault`] is any of them, as a value.

mod fault;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub use self::fault::Fault;
use crate::client::Target;
use crate::eventually;
use crate::expected_failures::{Carried, ExpectedFailures, Scope};
use crate::fleet::{Fleet, cluster_name, clusters_of, relay_name, user_name};
use crate::link::State;
use crate::load::Way;

/// The promise: a client of a relay that died succeeds again within this.
pub const AGAIN: Duration = Duration::from_secs(3);
/// The promise: agents are back at two relays within this.
pub const BACK: Duration = Duration::from_secs(30);
/// How soon a proxy finds that its link is whole again: it dials once a second while a request
/// waits, and a dial that began in a silent link ends within 10 s.
pub const FOUND: Duration = Duration::from_secs(10);
/// The longest that a drain may take, beyond what the relays were started with.
const DRAINED: Duration = Duration::from_secs(60);
/// How long an agent may take to be at two relays again after its link was mended: its back-off.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a relay is asked to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    Signal,
    Post,
}

/// What slow readers ask for: more than any window on the way.
pub const LARGE: &str = "large";
const LARGE_BYTES: usize = 900 * 1024;

/// Who goes over that relay now: the users with a carrier there, and those whose own relay leads
/// their lines to agents there.
pub async fn ways_over(fleet: &Fleet, relay: usize) -> Result<BTreeSet<Way>> {
    let mut carried = Vec::new();
    for relay in &fleet.relays {
        carried.push(Carried::read(&relay.lock().await.process.log()));
    }
    let there = carried.get(relay).context("no such relay")?;
    let ways = (0..fleet.proxies.len()).flat_map(|user| {
        let clusters = clusters_of(user, fleet.agents.len());
        clusters
            .into_iter()
            .map(move |cluster| Way { user, cluster })
    });
    let goes = |way: &Way| {
        let (user, cluster) = (user_name(way.user), cluster_name(way.cluster));
        let leads_there = |(number, own): (usize, &Carried)| {
            own.users().contains(user.as_str())
                && there
                    .clusters_for(&relay_name(number))
                    .contains(cluster.as_str())
        };
        there.users().contains(user.as_str()) || carried.iter().enumerate().any(leads_there)
    };
    Ok(ways.filter(goes).collect())
}

/// kill -9, and the same relay again after a while; agents are back at two in time where there
/// are two.
pub async fn kill_relay(
    fleet: &Fleet,
    number: usize,
    down: Duration,
    name: &str,
    expected: &ExpectedFailures,
    away: &[usize],
) -> Result<()> {
    let ways = ways_over(fleet, number).await?;
    let relay = fleet.relays.get(number).context("no such relay")?;
    let mut relay = relay.lock().await;
    println!("    {} ways go over it", ways.len());
    let number = expected.begin(name, Scope::Ways(ways));
    relay.process.kill().await?;
    expected.end(number, AGAIN);
    let again = async {
        tokio::time::sleep(down).await;
        relay.restart().await
    };
    let agents = all_but(fleet, away);
    let (again, back) = tokio::join!(again, fleet.these_spread_over(&agents, 2, BACK));
    again?;
    println!("    agents were at two relays each after {:?}", back?);
    Ok(())
}

/// The agents, but those.
pub fn all_but(fleet: &Fleet, away: &[usize]) -> Vec<usize> {
    let all = 0..fleet.agents.len();
    all.filter(|agent| !away.contains(agent)).collect()
}

/// A drain to the end of the process, and the same relay again. Returns how long it took to empty.
pub async fn drain_relay(fleet: &Fleet, number: usize, asked: Asked) -> Result<Duration> {
    let mut relay = fleet
        .relays
        .get(number)
        .context("no such relay")?
        .lock()
        .await;
    let began = Instant::now();
    let ended = match asked {
        Asked::Signal => relay.process.stop(DRAINED).await?,
        Asked::Post => {
            relay.drain().await?;
            relay.process.ended(DRAINED).await?
        }
    };
    ensure!(ended.success(), "{ended}");
    let took = began.elapsed();
    relay.restart().await?;
    Ok(took)
}

/// One relay after another, each when all agents but those `away` are at two relays again.
pub async fn rolling_restart(fleet: &Fleet, away: &[usize]) -> Result<()> {
    let agents = all_but(fleet, away);
    for number in 0..fleet.relays.len() {
        let took = drain_relay(fleet, number, Asked::Signal).await?;
        println!("    {} was empty after {took:?}", relay_name(number));
        fleet.these_spread_over(&agents, 2, BACK).await?;
    }
    Ok(())
}

/// kill -9, and the same agent again after a while; waits until it is at two relays.
pub async fn restart_agent(fleet: &Fleet, number: usize, down: Duration) -> Result<()> {
    let mut agent = fleet
        .agents
        .get(number)
        .context("no such agent")?
        .lock()
        .await;
    agent.process.kill().await?;
    tokio::time::sleep(down).await;
    agent.restart().await?;
    drop(agent);
    fleet
        .these_spread_over(&[number], 2, PATIENCE)
        .await
        .map(drop)
}

/// kill -9, and the same local proxy again after a while.
pub async fn restart_proxy(fleet: &Fleet, number: usize, down: Duration) -> Result<()> {
    let mut proxy = fleet
        .proxies
        .get(number)
        .context("no such proxy")?
        .lock()
        .await;
    proxy.process.kill().await?;
    tokio::time::sleep(down).await;
    proxy.restart().await
}

/// Cuts an agent's link for a while, and waits until it is at two relays again.
pub async fn cut_agent(fleet: &Fleet, number: usize, state: State, lasts: Duration) -> Result<()> {
    let link = fleet.agent_links.get(number).context("no such link")?;
    link.set(state);
    tokio::time::sleep(lasts).await;
    link.set(State::Whole);
    fleet
        .these_spread_over(&[number], 2, PATIENCE)
        .await
        .map(drop)
}

/// Cuts the link of a local proxy for a while.
pub async fn cut_proxy(fleet: &Fleet, number: usize, state: State, lasts: Duration) -> Result<()> {
    let link = fleet.proxy_links.get(number).context("no such link")?;
    link.set(state);
    tokio::time::sleep(lasts).await;
    link.set(State::Whole);
    Ok(())
}

/// Makes what [`slow_readers`] read.
pub async fn prepare_slow_readers(fleet: &Fleet) -> Result<()> {
    let manifest = format!(
        "{{\"apiVersion\": \"v1\", \"kind\": \"ConfigMap\", \"metadata\": {{\"name\": \"{LARGE}\"}}, \"data\": {{\"x\": \"{}\"}}}}",
        "x".repeat(LARGE_BYTES)
    );
    let namespace = fleet.upstream.group();
    fleet.upstream.namespace_named(namespace).await?;
    let admin = fleet.upstream.admin()?.namespace(namespace);
    // Not applied: that would keep a second copy of it in an annotation.
    admin
        .ok_with(&["create", "-f", "-"], manifest.as_bytes())
        .await
        .map(drop)
}

/// Clients that ask for much, read a little now and then, and leave before the end.
pub async fn slow_readers(
    fleet: &Fleet,
    number: usize,
    readers: usize,
    lasts: Duration,
) -> Result<()> {
    let clusters = clusters_of(number, fleet.agents.len());
    let cluster = cluster_name(*clusters.first().context("no cluster")?);
    let target = {
        let proxy = fleet
            .proxies
            .get(number)
            .context("no such proxy")?
            .lock()
            .await;
        Target::read(&proxy.kubeconfig, &format!("throwline-{cluster}"))?
    };
    let request = format!(
        "GET {}/api/v1/namespaces/{}/configmaps/{LARGE} HTTP/1.1\r\nHost: {}\r\n\r\n",
        target.prefix,
        fleet.upstream.group(),
        target.address
    );
    let end = tokio::time::Instant::now() + lasts;
    let read = async || {
        let mut stream = target.connect(&[b"http/1.1"]).await?;
        stream.write_all(request.as_bytes()).await?;
        stream.flush().await?;
        let mut little = [0; 512];
        while tokio::time::Instant::now() < end {
            if stream.read(&mut little).await? == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        anyhow::Ok(())
    };
    // Another fault may end any of them, which is no failure: they are not what is counted.
    let read = (0..readers).map(|_| async { anyhow::Ok(read().await.is_ok()) });
    let whole = try_join_all(read).await?;
    let kept = whole.iter().filter(|whole| **whole).count();
    println!(
        "    {kept} of {readers} slow readers of {} were never cut",
        user_name(number)
    );
    Ok(())
}

/// A crash of PostgreSQL, and its return; waits until all relays are at it again.
pub async fn database_away(fleet: &Fleet, lasts: Duration) -> Result<()> {
    let mut database = fleet.database.lock().await;
    let address = database.address();
    database.stop().await?;
    tokio::time::sleep(lasts).await;
    database.start_at(address).await?;
    for relay in &fleet.relays {
        let relay = relay.lock().await;
        eventually(BACK, "a relay is back at the database", || async {
            let now = relay.metrics().await?;
            ensure!(now.sum("throwline_relay_database_up", &[]) == 1.0);
            ensure!(now.sum("throwline_relay_database_owed_writes", &[]) == 0.0);
            Ok(())
        })
        .await?;
    }
    Ok(())
}
