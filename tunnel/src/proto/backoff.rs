//! How long to wait before dialling again.
//!
//! Full jitter between `min` and a ceiling that doubles up to `max`: thousands that lost the same
//! relay come back spread out. A connection that lived `stable` resets it. What a relay asks for
//! is honoured, within reason.

use std::time::Duration;

use rand::Rng;

/// Bounds of the waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Shortest wait. Default 0.5 s.
    pub min: Duration,
    /// Highest ceiling. Default 60 s; the worst-case time to come back after a long outage.
    pub max: Duration,
    /// A connection that lived this long was a good one, and its loss begins a series of its own. Default
    /// 15 s: a relay that dies half a minute after an outage is not part of that outage, and a relay that
    /// drops each carrier sooner than this still meets growing waits.
    pub stable: Duration,
    /// Longest wait that a relay can ask for. Default 10 min; the most a hostile one can cost.
    pub max_asked: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            min: Duration::from_millis(500),
            max: Duration::from_secs(60),
            stable: Duration::from_secs(15),
            max_asked: Duration::from_secs(600),
        }
    }
}

/// The wait before the next dial.
#[derive(Debug, Clone)]
pub struct Backoff {
    config: Config,
    failures: u32,
    requested: Option<Duration>,
}

impl Backoff {
    /// A backoff before its first failure.
    pub fn new(config: Config) -> Self {
        Self {
            config,
            failures: 0,
            requested: None,
        }
    }

    /// Whether a relay has set how long the next wait is to be.
    pub fn is_asked(&self) -> bool {
        self.requested.is_some()
    }

    /// The wait before the next attempt.
    pub fn next<R: Rng + ?Sized>(&mut self, rng: &mut R) -> Duration {
        let Config { min, max, .. } = self.config;
        if let Some(requested) = self.requested.take() {
            // The relay sets when to dial, so this counts as no failure. Many dialers got the same wait.
            return requested.max(min).mul_f64(1.0 + 0.2 * rng.random::<f64>());
        }
        let doubled = min.saturating_mul(1 << self.failures.min(20));
        let ceiling = doubled.saturating_mul(2).clamp(min, max.max(min));
        self.failures = self.failures.saturating_add(1);
        min + ceiling.saturating_sub(min).mul_f64(rng.random::<f64>())
    }

    /// A connection ended after `lived`. Each fifth of [`Config::stable`] takes one failure off the series:
    /// after a short outage the waits are short again soon.
    pub fn lived(&mut self, lived: Duration) {
        let fifth = self.config.stable / 5;
        if lived >= self.config.stable || fifth.is_zero() {
            self.failures = 0;
            return;
        }
        let fifths = lived.as_nanos() / fifth.as_nanos();
        let fifths = u32::try_from(fifths).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_sub(fifths);
    }

    /// The relay asked to be left alone for this long (Retry-After, a drain message).
    pub fn honour(&mut self, retry_after: Duration) {
        self.requested = Some(retry_after.min(self.config.max_asked));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    #[test]
    fn grows_to_the_ceiling_and_stays_in_bounds() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut longest = Duration::ZERO;
        for _ in 0..50 {
            let mut backoff = Backoff::new(Config::default());
            let first = backoff.next(&mut rng);
            assert!(first >= Duration::from_millis(500) && first <= Duration::from_secs(1));
            for _ in 0..40 {
                let wait = backoff.next(&mut rng);
                assert!(wait >= Duration::from_millis(500) && wait <= Duration::from_secs(60));
                longest = longest.max(wait);
            }
        }
        assert!(longest > Duration::from_secs(50));
    }

    #[test]
    fn a_stable_connection_resets_and_a_short_one_does_not() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut backoff = Backoff::new(Config::default());
        for _ in 0..20 {
            backoff.next(&mut rng);
        }
        backoff.lived(Duration::from_secs(14));
        let still: Duration = (0..20)
            .map(|_| backoff.clone().next(&mut rng))
            .max()
            .unwrap();
        assert!(still > Duration::from_secs(1));
        backoff.lived(Duration::from_secs(15));
        assert!(backoff.next(&mut rng) <= Duration::from_secs(1));
    }

    #[test]
    fn a_connection_shortens_the_waits_by_its_length() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut longest_after = |failures: u32, lived: u64| {
            let mut backoff = Backoff::new(Config::default());
            for _ in 0..failures {
                backoff.next(&mut rng);
            }
            backoff.lived(Duration::from_secs(lived));
            let waits = (0..200).map(|_| backoff.clone().next(&mut rng));
            waits.max().unwrap_or_default().as_secs_f64()
        };
        // The ceilings after so many failures: 1, 2, 4, 8, 16, 32 s.
        assert!(longest_after(5, 2) > 28.0);
        assert!(longest_after(5, 3) < 16.1);
        assert!(longest_after(5, 9) < 4.1);
        assert!(longest_after(2, 6) < 1.1);
        assert!(longest_after(3, 14) < 1.1);
    }

    #[test]
    fn what_is_asked_is_honoured_once_and_capped() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut backoff = Backoff::new(Config::default());
        backoff.honour(Duration::from_secs(90));
        assert!(backoff.is_asked());
        let wait = backoff.next(&mut rng);
        assert!(wait >= Duration::from_secs(90) && wait <= Duration::from_secs(108));
        assert!(!backoff.is_asked());
        assert!(backoff.next(&mut rng) <= Duration::from_secs(2));
        backoff.honour(Duration::MAX);
        assert!(backoff.next(&mut rng) <= Duration::from_secs(720));
    }
}
