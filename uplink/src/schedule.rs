//! When a supervisor acts next. Pure: the time and the source of randomness are passed in.

use std::time::{Duration, Instant};

use rand::Rng;
use throwline_tunnel::proto::backoff::Backoff;
use throwline_tunnel::proto::pacer::Pacer;

use crate::config::Config;
use crate::handler::ReplaceReason;

/// How many replacements in a row can be requested at once, and the interval after those. A relay
/// that drains every new carrier would otherwise cause dials without end.
const MOVES: (u32, Duration) = (4, Duration::from_secs(5));
/// When a supervisor that found no relay for itself alone looks for one again. At first soon, because
/// a balancer may not have noticed yet that a relay is back, and one that chooses at random repeats
/// itself; then ever more rarely, because a balancer can be sticky.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(4), Duration::from_secs(10 * 60));
/// How much longer each of these waits is than the one before.
const LOOK_AGAIN_GROWTH: f64 = 1.5;

/// The waits of one supervisor.
#[derive(Debug)]
pub(crate) struct Schedule {
    config: Config,
    backoff: Backoff,
    moves: Pacer,
    look_again: Duration,
}

/// A wait before the next dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pause {
    pub(crate) wait: Duration,
    /// The wait once work waits for a carrier; `None` if a relay has asked for the whole one.
    pub(crate) urgent: Option<Duration>,
}

impl Schedule {
    pub(crate) fn new(config: Config) -> Self {
        Self {
            backoff: Backoff::new(config.backoff),
            moves: Pacer::new(MOVES.0, MOVES.1),
            look_again: LOOK_AGAIN.0,
            config,
        }
    }

    /// A relay has asked to be left alone for this long.
    pub(crate) fn honour(&mut self, retry_after: Duration) {
        self.backoff.honour(retry_after);
    }

    /// A carrier of that age has ended or was replaced.
    pub(crate) fn lived(&mut self, age: Duration) {
        self.backoff.lived(age);
    }

    /// A dial without a carrier has failed.
    pub(crate) fn after_failure(&mut self, rng: &mut impl Rng) -> Pause {
        let is_asked = self.backoff.is_asked();
        Pause {
            wait: self.backoff.next(rng),
            urgent: (!is_asked).then(|| jittered(self.config.urgent, rng)),
        }
    }

    /// A carrier of that age was lost.
    pub(crate) fn after_loss(&mut self, age: Duration, rng: &mut impl Rng) -> Pause {
        match self.config.first_retry {
            // All that were on the same relay dial at this moment, hence a random part.
            Some(first) if age >= first.settled && !self.backoff.is_asked() => Pause {
                wait: part_of(first.within, rng),
                urgent: None,
            },
            _ => self.after_failure(rng),
        }
    }

    /// An attempt to replace a carrier has failed: the wait before the next one.
    pub(crate) fn after_vain_move(
        &mut self,
        reason: ReplaceReason,
        rng: &mut impl Rng,
    ) -> Duration {
        if reason == ReplaceReason::Duplicate {
            let wait = self.look_again;
            self.look_again = wait.mul_f64(LOOK_AGAIN_GROWTH).min(LOOK_AGAIN.1);
            return jittered(wait, rng);
        }
        match self.config.replace_retry {
            Some(every) if self.backoff.is_asked() => self.backoff.next(rng).max(every),
            Some(every) => every,
            None => self.backoff.next(rng),
        }
    }

    /// A replacement is requested: how long it has to wait for its turn.
    pub(crate) fn move_delay(&mut self, now: Instant) -> Duration {
        self.moves.delay(now)
    }

    /// A new carrier: its age at which it is replaced.
    pub(crate) fn begin(&mut self, max_age: Duration, rng: &mut impl Rng) -> Duration {
        self.look_again = LOOK_AGAIN.0;
        self.rotate(max_age, rng)
    }

    /// How long until a carrier is replaced for its age.
    pub(crate) fn rotate(&self, max_age: Duration, rng: &mut impl Rng) -> Duration {
        jittered(self.config.rotate, rng).min(max_age)
    }

    /// A relay asks to move: how long the carrier stays.
    pub(crate) fn drain(&self, delay: Duration, spread: Duration, rng: &mut impl Rng) -> Duration {
        let max = self.config.max_drain;
        delay.min(max) + part_of(spread.min(max), rng)
    }
}

/// Between none and all of it.
pub(crate) fn part_of(spread: Duration, rng: &mut impl Rng) -> Duration {
    spread.mul_f64(rng.random::<f64>())
}

/// ± 20 %.
pub(crate) fn jittered(interval: Duration, rng: &mut impl Rng) -> Duration {
    interval.mul_f64(0.8 + 0.4 * rng.random::<f64>())
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::config::FirstRetry;

    fn schedule(change: impl FnOnce(&mut Config)) -> (Schedule, StdRng) {
        let mut config = Config::default();
        change(&mut config);
        (Schedule::new(config), StdRng::seed_from_u64(7))
    }

    #[test]
    fn what_a_relay_asks_for_is_waited_out_even_by_urgent_work() {
        let (mut schedule, mut rng) = schedule(|_| {});
        assert!(schedule.after_failure(&mut rng).urgent.is_some());
        schedule.honour(Duration::from_secs(90));
        let pause = schedule.after_failure(&mut rng);
        assert!(pause.wait >= Duration::from_secs(90) && pause.urgent.is_none());
        assert!(schedule.after_failure(&mut rng).urgent.is_some());
    }

    #[test]
    fn a_carrier_that_had_worked_is_dialled_again_at_once_and_one_that_flaps_is_not() {
        let first = FirstRetry {
            within: Duration::from_millis(200),
            settled: Duration::from_secs(2),
        };
        let (mut schedule, mut rng) = schedule(|config| config.first_retry = Some(first));
        let settled = schedule.after_loss(Duration::from_secs(3), &mut rng);
        assert!(settled.wait <= first.within, "{settled:?}");
        let flapping = schedule.after_loss(Duration::from_secs(1), &mut rng);
        assert!(flapping.wait >= Duration::from_millis(500), "{flapping:?}");
        // Nor one whose relay has asked for time.
        schedule.honour(Duration::from_secs(30));
        let asked = schedule.after_loss(Duration::from_secs(3), &mut rng);
        assert!(asked.wait >= Duration::from_secs(30), "{asked:?}");
    }

    #[test]
    fn vain_moves_are_spaced_by_their_reason() {
        let every = Duration::from_secs(1);
        let (mut schedule, mut rng) = schedule(|config| config.replace_retry = Some(every));
        let drain = |schedule: &mut Schedule, rng: &mut StdRng| {
            schedule.after_vain_move(ReplaceReason::Drain, rng)
        };
        assert_eq!(drain(&mut schedule, &mut rng), every);
        assert_eq!(drain(&mut schedule, &mut rng), every);
        schedule.honour(Duration::from_secs(15));
        assert!(drain(&mut schedule, &mut rng) >= Duration::from_secs(15));
        assert_eq!(drain(&mut schedule, &mut rng), every);

        let mut expected: f64 = 4.0;
        for _ in 0..20 {
            let wait = schedule.after_vain_move(ReplaceReason::Duplicate, &mut rng);
            let share = wait.as_secs_f64() / expected;
            assert!((0.8..=1.2).contains(&share), "{wait:?} for {expected} s");
            expected = (expected * 1.5).min(600.0);
        }
        assert_eq!(expected, 600.0);
    }

    #[test]
    fn moves_that_are_asked_for_without_end_take_turns() {
        let (mut schedule, _) = schedule(|_| {});
        let now = Instant::now();
        let delays: Vec<_> = (0..6).map(|_| schedule.move_delay(now).as_secs()).collect();
        assert_eq!(delays, [0, 0, 0, 0, 5, 10]);
    }

    #[test]
    fn a_carrier_is_replaced_before_its_certificate_ends() {
        let (mut schedule, mut rng) = schedule(|_| {});
        let two_hours = Duration::from_secs(2 * 60 * 60);
        for _ in 0..20 {
            let age = schedule.begin(Duration::MAX, &mut rng);
            assert!(age >= two_hours.mul_f64(0.8) && age <= two_hours.mul_f64(1.2));
            let bounded = schedule.begin(Duration::from_secs(60), &mut rng);
            assert_eq!(bounded, Duration::from_secs(60));
        }
    }

    #[test]
    fn a_relay_cannot_keep_a_carrier_that_it_drains() {
        let (schedule, mut rng) = schedule(|config| config.max_drain = Duration::from_secs(300));
        let wait = schedule.drain(Duration::MAX, Duration::MAX, &mut rng);
        assert!(wait <= Duration::from_secs(600), "{wait:?}");
        let none = schedule.drain(Duration::ZERO, Duration::ZERO, &mut rng);
        assert_eq!(none, Duration::ZERO);
    }
}
