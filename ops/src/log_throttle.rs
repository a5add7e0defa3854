//! A failure that repeats is logged once, then at growing intervals (1 min, doubling to 1 h), so that
//! the log of a night without a relay is a page and not a book.

use std::time::Duration;

use tokio::time::Instant;

const FIRST: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(60 * 60);

/// Decides which of many equal messages are logged. Pure: time is passed in.
#[derive(Debug, Default)]
pub struct LogThrottle(Option<Last>);

#[derive(Debug)]
struct Last {
    kind: &'static str,
    at: Instant,
    interval: Duration,
    silent: u32,
}

impl LogThrottle {
    /// `Some`: log a failure of this kind now, with how many of it were left out since the last.
    pub fn admit(&mut self, kind: &'static str, now: Instant) -> Option<u32> {
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
    pub fn recovered(&mut self) -> bool {
        self.0.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_logged_then_ever_fewer() {
        let (mut throttle, start) = (LogThrottle::default(), Instant::now());
        let mut times = Vec::new();
        for second in 0..4 * 3600 {
            if throttle
                .admit("connect", start + Duration::from_secs(second))
                .is_some()
            {
                times.push(second);
            }
        }
        assert_eq!(times[..5], [0, 60, 180, 420, 900]);
        assert!(times.len() < 12, "{times:?}");
    }

    #[test]
    fn another_kind_is_logged_at_once_and_a_recovery_starts_over() {
        let (mut throttle, now) = (LogThrottle::default(), Instant::now());
        assert_eq!(throttle.admit("connect", now), Some(0));
        assert_eq!(throttle.admit("connect", now), None);
        assert_eq!(throttle.admit("tls", now), Some(0));
        assert!(throttle.recovered());
        assert!(!throttle.recovered());
        assert_eq!(throttle.admit("tls", now), Some(0));
    }
}
