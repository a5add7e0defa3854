//! What is done to a fleet: kills, restarts, cut links, readers that do not read, a database that
//! is away. Each does its harm, undoes it, and says what it excuses (see [`crate::excuse`]).

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::future::try_join_all;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::client::Target;
use crate::eventually;
use crate::excuse::{Carried, Excuses, Whose};
use crate::fleet::{Fleet, Size, cluster_name, clusters_of, relay_name, user_name};
use crate::link::State;
use crate::load::Way;
use crate::metrics;

/// The promise: whoever came through a relay that died succeeds again within this.
pub const AGAIN: Duration = Duration::from_secs(3);
/// The promise: agents are back at two relays within this.
pub const BACK: Duration = Duration::from_secs(30);
/// How soon a proxy finds that its link is whole again: it dials once a second while somebody
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

/// One fault, with whom it hits and how long it lasts.
#[derive(Debug, Clone, PartialEq)]
pub enum Fault {
    KillRelay {
        relay: usize,
        down: Duration,
    },
    DrainRelay {
        relay: usize,
        asked: Asked,
    },
    RollingRestart,
    KillAgent {
        agent: usize,
        down: Duration,
    },
    KillProxy {
        proxy: usize,
        down: Duration,
    },
    CutAgent {
        agent: usize,
        state: State,
        lasts: Duration,
    },
    CutProxy {
        proxy: usize,
        state: State,
        lasts: Duration,
    },
    SlowReaders {
        proxy: usize,
        readers: usize,
        lasts: Duration,
    },
    DatabaseAway {
        lasts: Duration,
    },
}

/// What slow readers ask for: more than any window on the way.
pub const LARGE: &str = "large";
const LARGE_BYTES: usize = 900 * 1024;

impl Fault {
    /// Draws one at random. Relays go most often: they are what is promised about.
    pub fn draw(rng: &mut StdRng, size: Size) -> Self {
        let seconds =
            |rng: &mut StdRng, from: u64, to: u64| Duration::from_secs(rng.random_range(from..=to));
        let relay = rng.random_range(0..size.relays);
        let agent = rng.random_range(0..size.agents);
        let proxy = rng.random_range(0..size.proxies);
        let state = *[State::Silent, State::Closed]
            .choose(rng)
            .unwrap_or(&State::Silent);
        match rng.random_range(0..20) {
            0..=3 => Self::KillRelay {
                relay,
                down: seconds(rng, 1, 10),
            },
            4..=6 => {
                let asked = *[Asked::Signal, Asked::Post]
                    .choose(rng)
                    .unwrap_or(&Asked::Post);
                Self::DrainRelay { relay, asked }
            }
            7 => Self::RollingRestart,
            8..=9 => Self::KillAgent {
                agent,
                down: seconds(rng, 0, 5),
            },
            10..=11 => Self::KillProxy {
                proxy,
                down: seconds(rng, 0, 5),
            },
            12..=13 => Self::CutAgent {
                agent,
                state,
                lasts: seconds(rng, 1, 75),
            },
            14..=15 => Self::CutProxy {
                proxy,
                state,
                lasts: seconds(rng, 1, 75),
            },
            16..=18 => Self::SlowReaders {
                proxy,
                readers: rng.random_range(5..=40),
                lasts: seconds(rng, 5, 30),
            },
            _ => Self::DatabaseAway {
                lasts: seconds(rng, 2, 20),
            },
        }
    }

    /// Whether it takes a relay, or what relays need to begin: one such at a time, for an agent is
    /// at two relays and a request at two of three.
    pub fn is_of_relays(&self) -> bool {
        matches!(
            self,
            Self::KillRelay { .. }
                | Self::DrainRelay { .. }
                | Self::RollingRestart
                | Self::DatabaseAway { .. }
        )
    }

    /// Which client is hit: two faults of one client at once would be one fault.
    pub fn client(&self) -> Option<(&'static str, usize)> {
        match self {
            Self::KillAgent { agent, .. } | Self::CutAgent { agent, .. } => Some(("agent", *agent)),
            Self::KillProxy { proxy, .. } | Self::CutProxy { proxy, .. } => Some(("proxy", *proxy)),
            _ => None,
        }
    }

    /// Does it and undoes it. What a promise says of it is checked by who calls, but that what was
    /// harmed is back in time.
    /// The agents `away` are hit by something else, and are not waited for.
    pub async fn make(&self, fleet: &Fleet, excuses: &Excuses, away: &[usize]) -> Result<()> {
        let name = self.to_string();
        match *self {
            Self::KillRelay { relay, down } => {
                kill_relay(fleet, relay, down, &name, excuses, away).await
            }
            Self::DrainRelay { relay, asked } => drain_relay(fleet, relay, asked).await.map(drop),
            Self::RollingRestart => rolling_restart(fleet, away).await,
            Self::KillAgent { agent, down } => {
                let excuse = excuses.begin(&name, Whose::Cluster(agent));
                let back = restart_agent(fleet, agent, down).await;
                excuses.end(excuse, AGAIN);
                back
            }
            Self::KillProxy { proxy, down } => {
                let excuse = excuses.begin(&name, Whose::User(proxy));
                let back = restart_proxy(fleet, proxy, down).await;
                excuses.end(excuse, AGAIN);
                back
            }
            Self::CutAgent {
                agent,
                state,
                lasts,
            } => {
                let excuse = excuses.begin(&name, Whose::Cluster(agent));
                let back = cut_agent(fleet, agent, state, lasts).await;
                excuses.end(excuse, AGAIN);
                back
            }
            Self::CutProxy {
                proxy,
                state,
                lasts,
            } => {
                let link = fleet.proxy_links.get(proxy).context("no such link")?;
                let excuse = excuses.begin(&name, Whose::User(proxy));
                link.set(state);
                tokio::time::sleep(lasts).await;
                link.set(State::Whole);
                excuses.end(excuse, FOUND);
                Ok(())
            }
            Self::SlowReaders {
                proxy,
                readers,
                lasts,
            } => slow_readers(fleet, proxy, readers, lasts).await,
            Self::DatabaseAway { lasts } => database_away(fleet, lasts).await,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KillRelay { relay, down } => {
                write!(f, "kill -9 of {}, down for {down:?}", relay_name(*relay))
            }
            Self::DrainRelay { relay, asked } => {
                let by = match asked {
                    Asked::Signal => "SIGTERM",
                    Asked::Post => "POST /drain",
                };
                write!(f, "drain of {} by {by}", relay_name(*relay))
            }
            Self::RollingRestart => f.write_str("rolling restart of all relays"),
            Self::KillAgent { agent, down } => {
                write!(
                    f,
                    "kill -9 of the agent of {}, down for {down:?}",
                    cluster_name(*agent)
                )
            }
            Self::KillProxy { proxy, down } => {
                write!(
                    f,
                    "kill -9 of the proxy of {}, down for {down:?}",
                    user_name(*proxy)
                )
            }
            Self::CutAgent {
                agent,
                state,
                lasts,
            } => {
                write!(
                    f,
                    "link of {} {state:?} for {lasts:?}",
                    cluster_name(*agent)
                )
            }
            Self::CutProxy {
                proxy,
                state,
                lasts,
            } => {
                write!(f, "link of {} {state:?} for {lasts:?}", user_name(*proxy))
            }
            Self::SlowReaders {
                proxy,
                readers,
                lasts,
            } => {
                write!(
                    f,
                    "{readers} slow readers of {} for {lasts:?}",
                    user_name(*proxy)
                )
            }
            Self::DatabaseAway { lasts } => write!(f, "PostgreSQL away for {lasts:?}"),
        }
    }
}

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
    excuses: &Excuses,
    away: &[usize],
) -> Result<()> {
    let ways = ways_over(fleet, number).await?;
    let relay = fleet.relays.get(number).context("no such relay")?;
    let mut relay = relay.lock().await;
    println!("    {} ways go over it", ways.len());
    let excuse = excuses.begin(name, Whose::Ways(ways));
    relay.process.kill().await?;
    excuses.end(excuse, AGAIN);
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

/// A drain to the end of the process, and the same relay again. Says how long it took to empty.
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
            let (status, _) = metrics::post(relay.admin, "/drain").await?;
            ensure!(status == 202, "{status}");
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

async fn restart_agent(fleet: &Fleet, number: usize, down: Duration) -> Result<()> {
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

async fn restart_proxy(fleet: &Fleet, number: usize, down: Duration) -> Result<()> {
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

/// Waits for the agent afterwards.
async fn cut_agent(fleet: &Fleet, number: usize, state: State, lasts: Duration) -> Result<()> {
    let link = fleet.agent_links.get(number).context("no such link")?;
    link.set(state);
    tokio::time::sleep(lasts).await;
    link.set(State::Whole);
    fleet
        .these_spread_over(&[number], 2, PATIENCE)
        .await
        .map(drop)
}

/// Makes what [`slow_readers`] read.
pub async fn prepare_slow_readers(fleet: &Fleet) -> Result<()> {
    let manifest = format!(
        "{{\"apiVersion\": \"v1\", \"kind\": \"ConfigMap\", \"metadata\": {{\"name\": \"{LARGE}\"}}, \"data\": {{\"x\": \"{}\"}}}}",
        "x".repeat(LARGE_BYTES)
    );
    let admin = fleet.upstream.admin()?.namespace("default");
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
        "GET {}/api/v1/namespaces/default/configmaps/{LARGE} HTTP/1.1\r\nHost: {}\r\n\r\n",
        target.prefix, target.address
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

async fn database_away(fleet: &Fleet, lasts: Duration) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_seed_draws_the_same_faults_and_every_kind_is_drawn() {
        let size = Size {
            relays: 3,
            agents: 30,
            proxies: 20,
        };
        let draw = |seed| -> Vec<Fault> {
            let mut rng = StdRng::seed_from_u64(seed);
            (0..400).map(|_| Fault::draw(&mut rng, size)).collect()
        };
        let faults = draw(7);
        assert_eq!(faults, draw(7));
        assert_ne!(faults, draw(8));
        let kinds: std::collections::HashSet<_> =
            faults.iter().map(std::mem::discriminant).collect();
        assert_eq!(kinds.len(), 9);
    }
}
