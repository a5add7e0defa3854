//! Detects that a line's path has stalled.
//!
//! A path that drops everything reports nothing: TCP retransmits for minutes, and a carrier's own
//! pings detect it after one. A line detects it earlier, because it has sent something that must be
//! answered: silence is then probed with a PING. If that is not answered either, the line tries
//! another path beside this one.

use std::time::{Duration, Instant};

/// From unanswered bytes to the PING.
pub const PROBE_AFTER: Duration = Duration::from_secs(1);

/// From unanswered bytes to the first suspicion: 3 s, so that an interactive session is on another
/// path within 5 s. It doubles with each suspicion that nothing follows, up to [`MAX_SUSPECT_AFTER`].
pub const SUSPECT_AFTER: Duration = Duration::from_secs(3);

/// The longest of these delays.
pub const MAX_SUSPECT_AFTER: Duration = Duration::from_secs(60);

/// Assumed throughput of a slow path, bytes a second: 64 KiB. Bulk that was handed down takes time to
/// arrive before it can be answered.
const MIN_THROUGHPUT: u64 = 64 * 1024;

/// What the line should do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The path is alive, or idle.
    Nothing,
    /// Send a PING.
    Probe,
    /// Try another path, and leave this one only when that works.
    Suspect,
}

/// Detects a path that delivers nothing while an answer is due.
#[derive(Debug, Default)]
pub struct StallDetector {
    /// Bytes received, ever, at the last check.
    received: u64,
    wait: Wait,
    /// Suspicions since a byte was received.
    suspicions: u32,
}

/// For an answer on the present stream.
#[derive(Debug, Default)]
enum Wait {
    /// Nothing is unanswered.
    #[default]
    None,
    Silent {
        since: Instant,
    },
    /// A PING was sent, too.
    Probed {
        since: Instant,
    },
}

impl StallDetector {
    /// Checks a line, a few times a second. `received`: bytes received, ever. `unanswered`: bytes sent
    /// since the last that were received.
    pub fn check(&mut self, now: Instant, received: u64, unanswered: u64) -> Action {
        if received != self.received {
            *self = Self {
                received,
                ..Self::default()
            };
        }
        if unanswered == 0 {
            self.wait = Wait::None;
            return Action::Nothing;
        }
        match self.wait {
            Wait::None => {
                self.wait = Wait::Silent { since: now };
                Action::Nothing
            }
            Wait::Silent { since } => {
                if now.saturating_duration_since(since) < PROBE_AFTER {
                    return Action::Nothing;
                }
                // `since` stays: the delay before a suspicion begins with the silence, not with the
                // PING.
                self.wait = Wait::Probed { since };
                Action::Probe
            }
            Wait::Probed { since } => {
                let silent = now.saturating_duration_since(since);
                if silent < self.suspect_after(unanswered) {
                    return Action::Nothing;
                }
                // Doubles the next delay: when the peer itself is unreachable, another path is not
                // dialled every 3 s.
                self.suspicions += 1;
                Action::Suspect
            }
        }
    }

    fn suspect_after(&self, unanswered: u64) -> Duration {
        let delay = SUSPECT_AFTER
            .saturating_mul(1 << self.suspicions.min(10))
            .min(MAX_SUSPECT_AFTER);
        let transmission = unanswered.saturating_mul(1000) / MIN_THROUGHPUT;
        delay.saturating_add(Duration::from_millis(transmission))
    }

    /// The line has another stream: bytes sent on the old one are not waited for.
    pub fn on_new_stream(&mut self) {
        self.wait = Wait::None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn unanswered_bytes_are_probed_then_suspected_ever_less_often() {
        let (mut detector, start) = (StallDetector::default(), Instant::now());
        assert_eq!(detector.check(start, 0, 40), Action::Nothing);
        assert_eq!(detector.check(at(start, 999), 0, 40), Action::Nothing);
        assert_eq!(detector.check(at(start, 1000), 0, 40), Action::Probe);
        assert_eq!(detector.check(at(start, 2900), 0, 52), Action::Nothing);
        assert_eq!(detector.check(at(start, 3000), 0, 52), Action::Suspect);
        assert_eq!(detector.check(at(start, 3500), 0, 52), Action::Nothing);
        assert_eq!(detector.check(at(start, 6000), 0, 52), Action::Suspect);
        assert_eq!(detector.check(at(start, 9000), 0, 52), Action::Nothing);
    }

    #[test]
    fn any_byte_ends_the_wait() {
        let (mut detector, start) = (StallDetector::default(), Instant::now());
        detector.check(start, 0, 40);
        assert_eq!(detector.check(at(start, 1500), 0, 40), Action::Probe);
        assert_eq!(detector.check(at(start, 3500), 12, 0), Action::Nothing);
        assert_eq!(detector.check(at(start, 4000), 12, 9), Action::Nothing);
        assert_eq!(detector.check(at(start, 4900), 12, 9), Action::Nothing);
        assert_eq!(detector.check(at(start, 5000), 12, 9), Action::Probe);
    }

    #[test]
    fn a_line_that_sends_nothing_is_never_suspected() {
        let (mut detector, start) = (StallDetector::default(), Instant::now());
        for second in 0..1000 {
            let now = at(start, second * 1000);
            assert_eq!(detector.check(now, 5, 0), Action::Nothing);
        }
    }

    #[test]
    fn bulk_is_given_the_time_of_a_slow_path() {
        let (mut detector, start) = (StallDetector::default(), Instant::now());
        let bulk = 1024 * 1024;
        detector.check(start, 0, bulk);
        assert_eq!(detector.check(at(start, 1000), 0, bulk), Action::Probe);
        assert_eq!(detector.check(at(start, 18_900), 0, bulk), Action::Nothing);
        assert_eq!(detector.check(at(start, 19_000), 0, bulk), Action::Suspect);
    }
}
