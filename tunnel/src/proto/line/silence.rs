//! When a line that hears nothing should try another way.
//!
//! A path that swallows everything says nothing: TCP goes on for minutes, and a carrier's own pings
//! for one. A line knows earlier, because it knows that it said something: then silence is probed
//! with a PING, and if that stays unanswered too, another way is tried beside this one.

use std::time::{Duration, Instant};

/// From words without an answer to the PING.
pub const PROBE: Duration = Duration::from_secs(1);

/// From words without an answer to the first doubt about the way: 3 s, so that somebody who types
/// is on another way within 5 s. It doubles with each vain doubt, up to [`MOST`].
pub const PATIENCE: Duration = Duration::from_secs(3);

/// The longest patience.
pub const MOST: Duration = Duration::from_secs(60);

/// Bytes a second that even a slow way is believed to carry: 64 KiB. Bulk that was handed down may
/// take its time to arrive, and its answer to come back.
const SLOW: u64 = 64 * 1024;

/// What to do at a look at the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Nothing,
    /// Ask for a sign of life.
    Probe,
    /// Try another way, and leave this one only when that works.
    Suspect,
}

#[derive(Debug, Default)]
pub struct Silence {
    heard: u64,
    since: Option<Instant>,
    probed: bool,
    doubts: u32,
}

impl Silence {
    /// Looks at a line, some times a second. `heard`: bytes that ever came in. `outstanding`: bytes
    /// that went out since the last that came in.
    pub fn look(&mut self, now: Instant, heard: u64, outstanding: u64) -> Action {
        if heard != self.heard {
            *self = Self {
                heard,
                ..Self::default()
            };
        }
        if outstanding == 0 {
            self.since = None;
            self.probed = false;
            return Action::Nothing;
        }
        let silent = now.saturating_duration_since(*self.since.get_or_insert(now));
        if !self.probed {
            if silent < PROBE {
                return Action::Nothing;
            }
            self.probed = true;
            return Action::Probe;
        }
        let patience = PATIENCE.saturating_mul(1 << self.doubts.min(10)).min(MOST);
        let on_the_way = Duration::from_millis(outstanding.saturating_mul(1000) / SLOW);
        if silent < patience.saturating_add(on_the_way) {
            return Action::Nothing;
        }
        self.doubts += 1;
        Action::Suspect
    }

    /// The line has another stream: what was said on the old one counts no more.
    pub fn moved(&mut self) {
        self.since = None;
        self.probed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn words_without_an_answer_are_probed_then_doubted_ever_more_seldom() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        assert_eq!(silence.look(start, 0, 40), Action::Nothing);
        assert_eq!(silence.look(at(start, 999), 0, 40), Action::Nothing);
        assert_eq!(silence.look(at(start, 1000), 0, 40), Action::Probe);
        assert_eq!(silence.look(at(start, 2900), 0, 52), Action::Nothing);
        assert_eq!(silence.look(at(start, 3000), 0, 52), Action::Suspect);
        assert_eq!(silence.look(at(start, 3500), 0, 52), Action::Nothing);
        assert_eq!(silence.look(at(start, 6000), 0, 52), Action::Suspect);
        assert_eq!(silence.look(at(start, 9000), 0, 52), Action::Nothing);
    }

    #[test]
    fn any_byte_is_a_sign_of_life() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        silence.look(start, 0, 40);
        assert_eq!(silence.look(at(start, 1500), 0, 40), Action::Probe);
        assert_eq!(silence.look(at(start, 3500), 12, 0), Action::Nothing);
        assert_eq!(silence.look(at(start, 4000), 12, 9), Action::Nothing);
        assert_eq!(silence.look(at(start, 4900), 12, 9), Action::Nothing);
        assert_eq!(silence.look(at(start, 5000), 12, 9), Action::Probe);
    }

    #[test]
    fn a_line_that_says_nothing_is_never_doubted() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        for second in 0..1000 {
            let now = at(start, second * 1000);
            assert_eq!(silence.look(now, 5, 0), Action::Nothing);
        }
    }

    #[test]
    fn bulk_is_given_the_time_of_a_slow_way() {
        let (mut silence, start) = (Silence::default(), Instant::now());
        let bulk = 1024 * 1024;
        silence.look(start, 0, bulk);
        assert_eq!(silence.look(at(start, 1000), 0, bulk), Action::Probe);
        assert_eq!(silence.look(at(start, 18_900), 0, bulk), Action::Nothing);
        assert_eq!(silence.look(at(start, 19_000), 0, bulk), Action::Suspect);
    }
}
