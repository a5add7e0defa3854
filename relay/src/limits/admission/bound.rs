//! How many handshakes may be under way: additive increase, multiplicative decrease.

use std::time::Duration;

use tokio::time::Instant;

/// What handshakes may spend waiting, beyond the least that one took.
const QUEUEING: Duration = Duration::from_secs(1);
/// For how long the least that a handshake took counts.
const LEAST_FOR: Duration = Duration::from_secs(60);
/// Handshakes under way: at first, at least, at most.
const FIRST: f64 = 64.0;
const FEWEST: f64 = 8.0;
const MOST: f64 = 2048.0;
/// What remains of the bound after handshakes have waited for too long.
const DECREASE: f64 = 0.75;

/// How many may be under way.
pub(super) struct Bound {
    pub(super) limit: f64,
    /// Until it was too high once, it grows by one with each that completes.
    is_probing: bool,
    /// What handshakes take, in seconds: a moving average.
    typical: Option<f64>,
    /// The least that one took, before and since the last change of the two.
    least: [Option<f64>; 2],
    least_since: Option<Instant>,
    decreased: Option<Instant>,
}

impl Bound {
    pub(super) fn new() -> Self {
        Self {
            limit: FIRST,
            is_probing: true,
            typical: None,
            least: [None; 2],
            least_since: None,
            decreased: None,
        }
    }

    /// One took so long; `is_full`: others waited for a place.
    pub(super) fn completed(&mut self, took: Duration, is_full: bool, now: Instant) {
        let seconds = took.as_secs_f64();
        let typical = self
            .typical
            .map_or(seconds, |typical| typical + (seconds - typical) / 8.0);
        self.typical = Some(typical);
        if self
            .least_since
            .is_none_or(|since| now.duration_since(since) >= LEAST_FOR)
        {
            self.least = [self.least[1], None];
            self.least_since = Some(now);
        }
        self.least[1] = Some(self.least[1].map_or(seconds, |least| least.min(seconds)));
        let least = self.least.into_iter().flatten().fold(seconds, f64::min);
        if typical > least + QUEUEING.as_secs_f64() {
            // Once for those that began under the same bound.
            let is_new = self
                .decreased
                .is_none_or(|at| now.duration_since(at).as_secs_f64() >= typical);
            if is_new {
                self.limit = (self.limit * DECREASE).max(FEWEST);
                self.is_probing = false;
                self.decreased = Some(now);
            }
        } else if is_full {
            let step = if self.is_probing {
                1.0
            } else {
                1.0 / self.limit
            };
            self.limit = (self.limit + step).min(MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_follows_what_handshakes_wait_and_not_how_far_peers_are() {
        let mut now = Instant::now();
        let mut bound = Bound::new();
        for _ in 0..400 {
            now += Duration::from_millis(5);
            // All far away: slow, and not for want of a processor.
            bound.completed(Duration::from_millis(1900), true, now);
        }
        assert!(bound.limit > FIRST, "{}", bound.limit);
        let before = bound.limit;
        for _ in 0..2000 {
            now += Duration::from_millis(10);
            bound.completed(Duration::from_millis(4000), true, now);
        }
        assert!(bound.limit < before / 2.0, "{} of {before}", bound.limit);
        for _ in 0..40 {
            now += Duration::from_millis(10);
            bound.completed(Duration::from_millis(1900), true, now);
        }
        let low = bound.limit;
        for _ in 0..400 {
            now += Duration::from_millis(10);
            bound.completed(Duration::from_millis(1900), true, now);
        }
        assert!(bound.limit > low);
        for _ in 0..100_000 {
            now += Duration::from_millis(10);
            bound.completed(Duration::from_secs(9), true, now);
        }
        assert!(bound.limit >= FEWEST);
    }
}
