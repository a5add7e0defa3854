//! Grows a line's window where the path carries more than it allows.
//!
//! A window limits the throughput of a line to one window a round trip: the initial one, 1 MiB, to
//! 10 MiB/s at 100 ms. A reader that keeps up, on a path without a queue, acknowledges bytes one round
//! trip after they were written. While half of the window is in flight and acknowledgements are still
//! on time, the path carries more and the window grows fourfold: before it is used up, so that a
//! carrier in slow start never waits for it. Where bytes queue, at a slow reader or on a full path,
//! acknowledgements are late and the window stays. It ends at a few times the bandwidth-delay product,
//! and a reader that stops never makes it grow. An idle line gives the growth back, and takes it again
//! at once when half of the initial window is in flight. This is slow start with the delay measure of
//! TCP Vegas (Brakmo and Peterson, 1995), at the sender alone.

use std::time::{Duration, Instant};

/// An acknowledgement is late after so many times the least round trip seen.
const LATE: u32 = 2;
/// What scheduling and the delay of an acknowledgement by 128 KiB may add.
const GRACE: Duration = Duration::from_millis(2);

/// A line that was without a stream for less is on the same path as before: a move between two carriers, or a
/// relay that was replaced. Were the least round trip forgotten, the next would be one of a busy line: as
/// long as its queue, and late acknowledgements would pass for punctual ones.
const SAME_PATH: Duration = Duration::from_secs(1);

/// On a path with a round trip of no more than this the initial window of 1 MiB carries 250 MB/s, more than one
/// line gets: a larger one would only hold memory.
const NEAR: Duration = Duration::from_millis(4);

/// The state of one direction, at its sender.
#[derive(Debug, Default)]
pub struct WindowAutotune {
    /// Least round trip seen on this path.
    min_rtt: Option<Duration>,
    /// An offset whose acknowledgement is timed, and when the bytes before it were written.
    sample: Option<(u64, Instant)>,
    /// Half of the window or more was in flight since then.
    was_used: bool,
    /// The most by which the window has grown on this path.
    proven: u64,
    /// When the line lost its stream; `None` while it has one.
    lost: Option<Instant>,
}

impl WindowAutotune {
    /// Whether bytes that are written now should be timed.
    pub fn wants_sample(&self) -> bool {
        self.sample.is_none()
    }

    /// Everything up to `sent` was written.
    pub fn on_sent(&mut self, now: Instant, sent: u64) {
        if self.sample.is_none() {
            self.sample = Some((sent, now));
        }
    }

    /// Half of the window or more is in flight.
    pub fn on_used(&mut self) {
        self.was_used = true;
    }

    /// Whether an acknowledgement of so much ends the timing.
    pub fn is_sampled(&self, acknowledged: u64) -> bool {
        self.sample.is_some_and(|(sent, _)| acknowledged >= sent)
    }

    /// Everything up to `acknowledged` was read. True: the window should grow.
    pub fn on_acknowledged(&mut self, now: Instant, acknowledged: u64) -> bool {
        let Some((sent, at)) = self.sample else {
            return false;
        };
        if acknowledged < sent {
            return false;
        }
        let rtt = now.saturating_duration_since(at);
        // Compared with the least before this one, which is on time by definition.
        let min_rtt = *self.min_rtt.get_or_insert(rtt);
        self.min_rtt = Some(min_rtt.min(rtt));
        self.sample = None;
        let was_used = std::mem::take(&mut self.was_used);
        was_used && rtt > NEAR && rtt <= min_rtt.saturating_mul(LATE).saturating_add(GRACE)
    }

    /// The window has grown by so much in all.
    pub fn on_grown(&mut self, by: u64) {
        self.proven = self.proven.max(by);
    }

    /// By how much the path has needed more than the initial window: the growth to take at once after
    /// an idle time.
    pub fn proven(&self) -> u64 {
        self.proven
    }

    /// The line has lost its stream, or is about to get another one.
    pub fn on_stream_lost(&mut self, now: Instant) {
        self.lost.get_or_insert(now);
        // A resumption is no part of a round trip.
        self.sample = None;
        self.was_used = false;
    }

    /// The line has another stream. After a moment it is one between the same two networks. After longer, the
    /// path may be another one, with another round trip.
    pub fn on_new_stream(&mut self, now: Instant) {
        let since = self.lost.take().unwrap_or(now);
        if now.saturating_duration_since(since) >= SAME_PATH {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the window is after a while on a path, from 1 MiB on.
    fn after(round_trip: f64, bytes_a_second: f64, most: f64) -> f64 {
        let (mut autotune, start) = (WindowAutotune::default(), Instant::now());
        let (mut window, mut now, mut sent) = (1e6, 0.0, 0.0);
        for _ in 0..200 {
            autotune.on_sent(start + Duration::from_secs_f64(now), sent as u64);
            autotune.on_used();
            // A window in flight is a round trip, and what queues beyond it.
            now += f64::max(round_trip, window / bytes_a_second);
            let at = start + Duration::from_secs_f64(now);
            if autotune.on_acknowledged(at, sent as u64) {
                window = f64::min(4.0 * window, most);
            }
            sent += window;
        }
        window
    }

    #[test]
    fn a_move_to_another_carrier_does_not_make_a_queue_punctual() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut autotune = WindowAutotune::default();
        autotune.on_sent(at(0), 1);
        assert!(!autotune.on_acknowledged(at(1), 1), "nothing was in flight");
        let mut late = |begin: u64, pause: u64| {
            autotune.on_stream_lost(at(begin));
            autotune.on_new_stream(at(begin + pause));
            autotune.on_used();
            autotune.on_sent(at(begin + pause), begin);
            autotune.on_acknowledged(at(begin + pause + 50), begin)
        };
        assert!(!late(100, 10));
        // Another network: what is usual there is not known.
        assert!(late(1_000, 1_000));
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
        let (mut autotune, start) = (WindowAutotune::default(), Instant::now());
        autotune.on_sent(start, 40);
        assert!(!autotune.on_acknowledged(start + Duration::from_micros(300), 40));
        for n in 1..100u32 {
            let at = start + n * Duration::from_millis(10);
            autotune.on_sent(at, u64::from(n) << 20);
            autotune.on_used();
            let read = at + Duration::from_millis(4);
            assert!(!autotune.on_acknowledged(read, u64::from(n) << 20), "{n}");
        }
    }

    #[test]
    fn a_window_that_is_not_used_up_does_not_grow() {
        let (mut autotune, start) = (WindowAutotune::default(), Instant::now());
        for n in 1..100u32 {
            let at = start + n * Duration::from_millis(200);
            autotune.on_sent(at, u64::from(n) * 1000);
            assert!(!autotune.is_sampled(u64::from(n) * 1000 - 1));
            assert!(autotune.is_sampled(u64::from(n) * 1000));
            let read = at + Duration::from_millis(100);
            assert!(!autotune.on_acknowledged(read, u64::from(n) * 1000));
        }
    }
}
