//! Limits how often a peer's request for a move is fulfilled.
//!
//! What a peer can ask for with a few bytes (to move to another carrier, to another stream) costs
//! a handshake. A few requests in a row are legitimate, as when relays are replaced one after another.
//! More frequent ones are delayed, so that no peer can cause dials without end.

use std::time::{Duration, Instant};

/// A rate limit (GCRA) that tells how long to wait rather than that something is refused.
#[derive(Clone, Debug)]
pub struct Pacer {
    every: Duration,
    /// What a burst may be ahead of the steady rate.
    ahead: Duration,
    /// When the steady rate would have what was granted so far.
    due: Option<Instant>,
}

impl Pacer {
    /// `burst` at once, at least 1, then one in `every`.
    #[must_use]
    pub fn new(burst: u32, every: Duration) -> Self {
        Self {
            every,
            ahead: every.saturating_mul(burst.saturating_sub(1)),
            due: None,
        }
    }

    /// How long to wait from `now` before the next request is fulfilled. The call reserves that time.
    pub fn delay(&mut self, now: Instant) -> Duration {
        let due = self.due.map_or(now, |due| due.max(now));
        self.due = Some(due + self.every);
        due.saturating_duration_since(now)
            .saturating_sub(self.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(5);

    #[test]
    fn a_burst_is_free_and_the_rest_take_turns() {
        let mut throttle = Pacer::new(3, EVERY);
        let start = Instant::now();
        let delays: Vec<_> = (0..6).map(|_| throttle.delay(start).as_secs()).collect();
        assert_eq!(delays, [0, 0, 0, 5, 10, 15]);
        // All of that has been waited out, and one more turn has come.
        let later = start + Duration::from_secs(20);
        assert_eq!(throttle.delay(later), Duration::ZERO);
        assert_eq!(throttle.delay(later), EVERY);
        let much_later = later + Duration::from_secs(3600);
        let delays: Vec<_> = (0..4)
            .map(|_| throttle.delay(much_later).as_secs())
            .collect();
        assert_eq!(delays, [0, 0, 0, 5]);
    }

    #[test]
    fn who_heeds_every_wish_at_once_is_bounded_all_the_same() {
        let mut throttle = Pacer::new(4, EVERY);
        let start = Instant::now();
        let (mut now, mut moves) = (start, 0);
        while now < start + Duration::from_secs(600) {
            now += throttle.delay(now);
            moves += 1;
        }
        assert!((120..=126).contains(&moves), "{moves}");
    }
}
