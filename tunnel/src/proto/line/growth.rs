//! When a line's window is too small for its path.
//!
//! A window bounds a line to itself a round trip: the first one, 1 MiB, to 10 MiB/s at 100 ms. A
//! reader that takes what comes, on a path without a queue, acknowledges bytes one round trip after
//! they were written; where half of the window is on the way and that still holds, the path carries
//! more, and the window grows fourfold, before it is used up and so that it is never what a carrier
//! that starts slowly waits for. Where bytes queue, at a reader that is slow or on a path that is
//! full, the acknowledgement is late and the window stays: it ends at a few times what the path
//! needs, and a reader that stops never makes it grow. A line that rests gives it back, and takes it
//! again when it has use for half of the first. Slow start and TCP Vegas' measure (Brakmo and Peterson,
//! 1995), by the sender, which needs no word of the peer's for it.

use std::time::{Duration, Instant};

/// Late, as against the least round trip seen: twice as long.
const LATE: u32 = 2;
/// What scheduling and an acknowledgement's 128 KiB may add.
const GRACE: Duration = Duration::from_millis(2);

/// One direction, at its sender.
#[derive(Debug, Default)]
pub struct Growth {
    least: Option<Duration>,
    /// The end of what was written when it was last looked at, and when.
    sample: Option<(u64, Instant)>,
    /// Half of the window or more was on the way since then.
    was_used: bool,
    /// By how much the window had grown at most, on this path.
    proven: u64,
}

impl Growth {
    /// Whether something that is written now is to be timed.
    pub fn wants_sample(&self) -> bool {
        self.sample.is_none()
    }

    /// All up to `sent` is on its way.
    pub fn on_sent(&mut self, now: Instant, sent: u64) {
        if self.sample.is_none() {
            self.sample = Some((sent, now));
        }
    }

    /// Half of the window or more is on the way.
    pub fn on_used(&mut self) {
        self.was_used = true;
    }

    /// Whether an acknowledgement of so much is news.
    pub fn awaits(&self, acknowledged: u64) -> bool {
        self.sample.is_some_and(|(sent, _)| acknowledged >= sent)
    }

    /// All up to `acknowledged` was read. True: the window should grow.
    pub fn on_acknowledged(&mut self, now: Instant, acknowledged: u64) -> bool {
        let Some((sent, at)) = self.sample else {
            return false;
        };
        if acknowledged < sent {
            return false;
        }
        let took = now.saturating_duration_since(at);
        let least = *self.least.get_or_insert(took);
        self.least = Some(least.min(took));
        self.sample = None;
        let was_used = std::mem::take(&mut self.was_used);
        was_used && took <= least.saturating_mul(LATE).saturating_add(GRACE)
    }

    /// The window is larger by so much, in all.
    pub fn on_grown(&mut self, by: u64) {
        self.proven = self.proven.max(by);
    }

    /// By how much it was proven to be too small: what it may grow by at once after a rest.
    pub fn proven(&self) -> u64 {
        self.proven
    }

    /// The line is on another path.
    pub fn moved(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the window is after a while on a path, from 1 MiB on.
    fn after(round_trip: f64, bytes_a_second: f64, most: f64) -> f64 {
        let (mut growth, start) = (Growth::default(), Instant::now());
        let (mut window, mut now, mut sent) = (1e6, 0.0, 0.0);
        for _ in 0..200 {
            growth.on_sent(start + Duration::from_secs_f64(now), sent as u64);
            growth.on_used();
            // A window in flight is a round trip, and what queues beyond it.
            now += f64::max(round_trip, window / bytes_a_second);
            let at = start + Duration::from_secs_f64(now);
            if growth.on_acknowledged(at, sent as u64) {
                window = f64::min(4.0 * window, most);
            }
            sent += window;
        }
        window
    }

    #[test]
    fn a_long_path_is_filled_and_not_much_more() {
        let full = 0.1 * 50e6;
        let window = after(0.1, 50e6, 1e9);
        assert!(window >= full && window <= 8.0 * full, "{window}");
        assert_eq!(after(0.1, 1e12, 16e6), 16e6, "up to the peer's");
    }

    #[test]
    fn a_short_path_or_a_slow_reader_changes_nothing() {
        // The least is seen before the queue is full.
        let (mut growth, start) = (Growth::default(), Instant::now());
        growth.on_sent(start, 40);
        assert!(!growth.on_acknowledged(start + Duration::from_micros(300), 40));
        for n in 1..100u32 {
            let at = start + n * Duration::from_millis(10);
            growth.on_sent(at, u64::from(n) << 20);
            growth.on_used();
            let read = at + Duration::from_millis(4);
            assert!(!growth.on_acknowledged(read, u64::from(n) << 20), "{n}");
        }
    }

    #[test]
    fn a_window_that_is_not_used_up_does_not_grow() {
        let (mut growth, start) = (Growth::default(), Instant::now());
        for n in 1..100u32 {
            let at = start + n * Duration::from_millis(200);
            growth.on_sent(at, u64::from(n) * 1000);
            assert!(!growth.awaits(u64::from(n) * 1000 - 1));
            assert!(growth.awaits(u64::from(n) * 1000));
            let read = at + Duration::from_millis(100);
            assert!(!growth.on_acknowledged(read, u64::from(n) * 1000));
        }
    }
}
