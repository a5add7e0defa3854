//! A failure that repeats is said once, then at growing intervals, so that the log of a night
//! without a relay is a page and not a book.

use std::time::Duration;

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(60 * 60);

/// What was said last.
#[derive(Debug, Default)]
pub(crate) struct Said(Option<Last>);

#[derive(Debug)]
struct Last {
    kind: &'static str,
    at: Instant,
    interval: Duration,
    silent: u32,
}

impl Said {
    /// Whether to say a failure of this kind now; with how many were not said since the last.
    pub(crate) fn say(&mut self, kind: &'static str, now: Instant) -> Option<u32> {
        match &mut self.0 {
            Some(last) if last.kind == kind => {
                if now.duration_since(last.at) < last.interval {
                    last.silent += 1;
                    return None;
                }
                last.at = now;
                last.interval = (last.interval * 2).min(LONGEST);
                Some(std::mem::take(&mut last.silent))
            }
            other => {
                *other = Some(Last {
                    kind,
                    at: now,
                    interval: FIRST,
                    silent: 0,
                });
                Some(0)
            }
        }
    }

    /// All is well; true if it was not before.
    pub(crate) fn recovered(&mut self) -> bool {
        self.0.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_said_then_ever_fewer() {
        let (mut said, start) = (Said::default(), Instant::now());
        let mut times = Vec::new();
        for second in 0..4 * 3600 {
            if said
                .say("connect", start + Duration::from_secs(second))
                .is_some()
            {
                times.push(second);
            }
        }
        assert_eq!(times[..5], [0, 60, 180, 420, 900]);
        assert!(times.len() < 12, "{times:?}");
    }

    #[test]
    fn another_kind_is_said_at_once_and_a_recovery_starts_over() {
        let (mut said, now) = (Said::default(), Instant::now());
        assert_eq!(said.say("connect", now), Some(0));
        assert_eq!(said.say("connect", now), None);
        assert_eq!(said.say("tls", now), Some(0));
        assert!(said.recovered());
        assert!(!said.recovered());
        assert_eq!(said.say("tls", now), Some(0));
    }
}
