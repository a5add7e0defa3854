//! The faults that a line must survive: drawn at random, printed, aimed and applied.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use rand::Rng;
use rand::rngs::StdRng;

use crate::expected_failures::ExpectedFailures;
use crate::faults::{self, Asked, BACK, Fault, kill_relay};
use crate::fleet::{Fleet, Size};
use crate::link::State;

#[derive(Debug, Clone, PartialEq)]
pub enum FaultPlan {
    Fault(Fault),
    /// kill -9 of the balancer.
    Balancer {
        down: Duration,
    },
    /// kill -9 of the balancer and of a relay at once.
    BalancerAndRelay {
        relay: usize,
        down: Duration,
    },
}

impl FaultPlan {
    /// Each kind as often as any other, so that each has its pauses to show.
    pub fn draw(rng: &mut StdRng, size: Size) -> Self {
        let ms = |rng: &mut StdRng, from: u64, to: u64| {
            Duration::from_millis(rng.random_range(from..to))
        };
        let relay = rng.random_range(0..size.relays);
        let state = match rng.random_bool(0.5) {
            true => State::Silent,
            false => State::Closed,
        };
        Self::Fault(match rng.random_range(0..9) {
            0 => Fault::KillRelay {
                relay,
                down: ms(rng, 500, 5000),
            },
            1 => Fault::DrainRelay {
                relay,
                asked: Asked::Signal,
            },
            2 | 3 => Fault::CutProxy {
                proxy: rng.random_range(0..size.proxies),
                state,
                lasts: ms(rng, 200, 15_000),
            },
            4 | 5 => Fault::CutAgent {
                agent: rng.random_range(0..size.agents),
                state,
                lasts: ms(rng, 200, 15_000),
            },
            6 => Fault::RollingRestart,
            7 => {
                return Self::Balancer {
                    down: ms(rng, 200, 3000),
                };
            }
            _ => {
                return Self::BalancerAndRelay {
                    relay,
                    down: ms(rng, 200, 3000),
                };
            }
        })
    }

    /// Under which its pauses are counted.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Balancer { .. } => "balancer killed",
            Self::BalancerAndRelay { .. } => "balancer and relay killed at once",
            Self::Fault(fault) => match fault {
                Fault::KillRelay { .. } => "relay killed",
                Fault::DrainRelay { .. } => "relay drained",
                Fault::RollingRestart => "rolling restart",
                Fault::CutProxy { state, .. } => match state {
                    State::Silent => "user's link silent, 0.2 to 15 s",
                    _ => "user's link closed, 0.2 to 15 s",
                },
                Fault::CutAgent { state, .. } => match state {
                    State::Silent => "agent's link silent, 0.2 to 15 s",
                    _ => "agent's link closed, 0.2 to 15 s",
                },
                _ => "other",
            },
        }
    }

    /// A relay that carries nothing is no fault of lines: takes one that does, if there is one.
    pub async fn aim(mut self, fleet: &Fleet) -> Result<Self> {
        if let Self::Fault(Fault::KillRelay { relay, .. } | Fault::DrainRelay { relay, .. })
        | Self::BalancerAndRelay { relay, .. } = &mut self
        {
            let (drawn, relays) = (*relay, fleet.relays.len());
            for number in (0..relays).map(|turn| (drawn + turn) % relays) {
                if !faults::ways_over(fleet, number).await?.is_empty() {
                    *relay = number;
                    break;
                }
            }
        }
        Ok(self)
    }

    /// Does it and undoes it, and waits until the affected parts are back.
    pub async fn make(&self, fleet: &Fleet) -> Result<()> {
        let expected = ExpectedFailures::default();
        match self {
            Self::Fault(fault) => fault.make(fleet, &expected, &[]).await,
            Self::Balancer { down } => {
                fleet.restart_balancer(*down).await?;
                fleet.spread_over(2, BACK).await.map(drop)
            }
            Self::BalancerAndRelay { relay, down } => {
                let both = kill_relay(fleet, *relay, *down, "kill", &expected, &[]);
                tokio::try_join!(fleet.restart_balancer(*down), both).map(drop)
            }
        }
    }
}

impl fmt::Display for FaultPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fault(fault) => fault.fmt(f),
            Self::Balancer { down } => write!(f, "kill -9 of the balancer, down for {down:?}"),
            Self::BalancerAndRelay { relay, down } => write!(
                f,
                "kill -9 of the balancer and {} at once, down for {down:?}",
                crate::fleet::relay_name(*relay)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_draws_the_same_plan_and_every_kind_is_drawn() {
        let size = Size::ONE_USER;
        let draw = |seed| -> Vec<FaultPlan> {
            let mut rng = StdRng::seed_from_u64(seed);
            (0..200).map(|_| FaultPlan::draw(&mut rng, size)).collect()
        };
        let drawn = draw(3);
        assert_eq!(drawn, draw(3));
        assert_ne!(drawn, draw(4));
        let kinds: BTreeSet<&str> = drawn.iter().map(FaultPlan::kind).collect();
        assert_eq!(kinds.len(), 9);
        assert!(!kinds.contains("other"));
    }
}
