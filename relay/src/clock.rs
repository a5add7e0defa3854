//! Waits for moments of a clock that may be set.

use std::time::{Duration, SystemTime};

/// How often a long wait reads the clock again, which may have been set in between.
const CLOCK_CHECK: Duration = Duration::from_secs(600);

/// Ends at a moment of the clock that `now` reads.
pub(crate) async fn reached(moment: SystemTime, now: impl Fn() -> SystemTime) {
    while let Ok(left) = moment.duration_since(now()) {
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(CLOCK_CHECK)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_was_set_is_noticed() {
        let start = SystemTime::now();
        let looks = std::cell::Cell::new(0);
        let clock = || {
            looks.set(looks.get() + 1);
            // A year to go; at the second look it has passed.
            start + Duration::from_secs(400 * 86_400 * (looks.get() - 1))
        };
        let waited = tokio::time::Instant::now();
        reached(start + Duration::from_secs(365 * 86_400), clock).await;
        assert_eq!(looks.get(), 2);
        assert_eq!(waited.elapsed(), CLOCK_CHECK);
    }
}
