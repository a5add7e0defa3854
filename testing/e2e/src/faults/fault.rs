//! Any fault, as a value: drawn at random, printed, applied, with the failures that it explains.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::{
    AGAIN, Asked, FOUND, cut_agent, cut_proxy, database_away, drain_relay, kill_relay,
    restart_agent, restart_proxy, rolling_restart, slow_readers,
};
use crate::expected_failures::{ExpectedFailures, Scope};
use crate::fleet::{Fleet, Size, cluster_name, relay_name, user_name};
use crate::link::State;

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

    /// Applies the fault and undoes it. The caller checks the promises about it, except that the
    /// affected part is back in time.
    /// The agents `away` are hit by something else, and are not waited for.
    pub async fn make(
        &self,
        fleet: &Fleet,
        expected: &ExpectedFailures,
        away: &[usize],
    ) -> Result<()> {
        let name = self.to_string();
        match *self {
            Self::KillRelay { relay, down } => {
                kill_relay(fleet, relay, down, &name, expected, away).await
            }
            Self::DrainRelay { relay, asked } => drain_relay(fleet, relay, asked).await.map(drop),
            Self::RollingRestart => rolling_restart(fleet, away).await,
            Self::KillAgent { agent, down } => {
                let number = expected.begin(&name, Scope::Cluster(agent));
                let back = restart_agent(fleet, agent, down).await;
                expected.end(number, AGAIN);
                back
            }
            Self::KillProxy { proxy, down } => {
                let number = expected.begin(&name, Scope::User(proxy));
                let back = restart_proxy(fleet, proxy, down).await;
                expected.end(number, AGAIN);
                back
            }
            Self::CutAgent {
                agent,
                state,
                lasts,
            } => {
                let number = expected.begin(&name, Scope::Cluster(agent));
                let back = cut_agent(fleet, agent, state, lasts).await;
                expected.end(number, AGAIN);
                back
            }
            Self::CutProxy {
                proxy,
                state,
                lasts,
            } => {
                let number = expected.begin(&name, Scope::User(proxy));
                let mended = cut_proxy(fleet, proxy, state, lasts).await;
                expected.end(number, FOUND);
                mended
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
