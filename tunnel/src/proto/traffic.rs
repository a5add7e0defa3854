//! Which lines move bulk. A person waits for the bytes of the others, so bulk has a carrier of its own:
//! the two do not share a send queue, a socket or a lost segment.

use std::time::{Duration, Instant};

/// What a line, or a carrier, is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum TrafficClass {
    /// Keystrokes, requests, watch events, and everything at its beginning.
    #[default]
    Interactive,
    /// Many bytes without a pause: a copy, a download, the output of a long command.
    Bulk,
}

impl TrafficClass {
    /// Each of them.
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];

    /// As messages have it.
    pub fn of(is_bulk: bool) -> Self {
        match is_bulk {
            true => Self::Bulk,
            false => Self::Interactive,
        }
    }

    /// Whether it is bulk.
    pub fn is_bulk(self) -> bool {
        self == Self::Bulk
    }
}

/// The shortest time over which bytes are counted.
const INTERVAL: Duration = Duration::from_millis(400);
/// More bytes a second than terminals, watches and small requests need. It is half of what a link of
/// 1 Mbit/s carries.
const BULK_RATE: f64 = 64.0 * 1024.0;
/// A line is bulk after so many such intervals in a row: a list of 100 KiB is none.
const BULK_AFTER: u32 = 2;
/// Bulk that moved less than this a second for [`QUIET_AFTER`] is interactive again.
const QUIET_RATE: f64 = 16.0 * 1024.0;
/// A transfer that pauses for less does not move to and fro.
const QUIET_AFTER: Duration = Duration::from_secs(5);

/// Classifies a line by the bytes that it moves.
#[derive(Debug, Default)]
pub struct TrafficMeter {
    class: TrafficClass,
    /// When bytes were counted last, and how many there were by then.
    counted: Option<(Instant, u64)>,
    /// Intervals in a row with the rate of bulk.
    busy: u32,
    quiet_since: Option<Instant>,
}

impl TrafficMeter {
    /// As last observed.
    pub fn class(&self) -> TrafficClass {
        self.class
    }

    /// To be called a few times a second with all bytes of both directions so far.
    pub fn observe(&mut self, now: Instant, bytes: u64) -> TrafficClass {
        let Some((since, before)) = self.counted else {
            self.counted = Some((now, bytes));
            return self.class;
        };
        let elapsed = now.saturating_duration_since(since);
        if elapsed < INTERVAL {
            return self.class;
        }
        self.counted = Some((now, bytes));
        let rate = bytes.saturating_sub(before) as f64 / elapsed.as_secs_f64();
        self.busy = if rate >= BULK_RATE { self.busy + 1 } else { 0 };
        if rate >= QUIET_RATE {
            self.quiet_since = None;
        }
        match self.class {
            TrafficClass::Interactive if self.busy >= BULK_AFTER => {
                self.class = TrafficClass::Bulk;
            }
            TrafficClass::Bulk if rate < QUIET_RATE => {
                let quiet_since = *self.quiet_since.get_or_insert(since);
                if now.saturating_duration_since(quiet_since) >= QUIET_AFTER {
                    self.class = TrafficClass::Interactive;
                }
            }
            _ => {}
        }
        self.class
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The class after each half second in which so many KiB were moved.
    fn classes(kib: &[u64]) -> Vec<TrafficClass> {
        let mut meter = TrafficMeter::default();
        let mut now = Instant::now();
        meter.observe(now, 0);
        let mut bytes = 0;
        kib.iter()
            .map(|moved| {
                now += Duration::from_millis(500);
                bytes += moved * 1024;
                meter.observe(now, bytes)
            })
            .collect()
    }

    #[test]
    fn what_moves_many_bytes_without_a_pause_is_bulk() {
        use TrafficClass::{Bulk, Interactive};
        assert_eq!(classes(&[40, 40, 40]), [Interactive, Bulk, Bulk]);
        // A list, whatever its size, is over before.
        assert_eq!(classes(&[900, 0, 900, 0]), [Interactive; 4]);
        assert_eq!(classes(&[20; 20]), [Interactive; 20]);
    }

    #[test]
    fn bulk_becomes_interactive_after_a_long_pause_only() {
        let mut transfer = vec![500, 500];
        transfer.extend([0; 9]);
        transfer.push(500);
        transfer.extend([0; 10]);
        let classes = classes(&transfer);
        assert!(classes[1..21].iter().all(|class| class.is_bulk()));
        assert_eq!(classes[21], TrafficClass::Interactive);
    }

    #[test]
    fn calls_in_quick_succession_count_as_one() {
        let mut meter = TrafficMeter::default();
        let now = Instant::now();
        for bytes in 0..100 {
            let class = meter.observe(now, bytes * 1024 * 1024);
            assert_eq!(class, TrafficClass::Interactive);
        }
    }
}
