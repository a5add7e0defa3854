//! The rates of handshakes: the most that may begin, and how many end.

use std::time::Duration;

use tokio::time::Instant;

/// How often the rate at which handshakes end is measured while some wait.
const MEASURE: Duration = Duration::from_millis(500);
/// What one measurement counts: handshakes that began together end together.
const WEIGHT: f64 = 0.125;

/// The most that are admitted in a second, after as many at once.
pub(super) struct Bucket {
    pub(super) tokens: f64,
    pub(super) most: f64,
    at: Instant,
}

impl Bucket {
    /// Full.
    pub(super) fn new(most: f64, now: Instant) -> Self {
        Self {
            tokens: most,
            most,
            at: now,
        }
    }

    pub(super) fn fill(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + idle * self.most).min(self.most);
        self.at = now;
    }

    pub(super) fn until_one(&self) -> Duration {
        Duration::from_secs_f64((1.0 - self.tokens).max(0.0) / self.most)
    }
}

/// How many handshakes end in a second, while others wait.
pub(super) struct Pace {
    pub(super) per_second: f64,
    ended: u32,
    since: Instant,
    was_busy: bool,
}

impl Pace {
    pub(super) fn new(per_second: f64, now: Instant) -> Self {
        Self {
            per_second,
            ended: 0,
            since: now,
            was_busy: false,
        }
    }

    pub(super) fn ended(&mut self) {
        self.ended += 1;
    }

    pub(super) fn measure(&mut self, is_busy: bool, most: f64, now: Instant) {
        let past = now.saturating_duration_since(self.since);
        if past < MEASURE {
            return;
        }
        // Without a queue the rate measures the demand, not the capacity; then the maximum is assumed.
        match (self.was_busy, is_busy) {
            (true, true) => {
                let measured = f64::from(self.ended) / past.as_secs_f64();
                let changed = self.per_second + (measured - self.per_second) * WEIGHT;
                self.per_second = changed.clamp(1.0, most);
            }
            (false, false) => self.per_second = most,
            _ => {}
        }
        self.was_busy = is_busy;
        self.ended = 0;
        self.since = now;
    }
}
