//! How many handshakes a second the relay takes on, so that thousands that come back at once cost
//! the lines that are open no more than their share of the processor.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::relay::Shared;

/// Whoever must wait longer is answered and told when to come again.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nobody is sent away for longer: the queue may be an attacker's.
const LATEST: Duration = Duration::from_secs(30);

/// Two virtual queues: a newcomer gets the next free moment or, where that is too far away, the
/// next appointment. Who has an appointment queues again when it comes; a moment that was held
/// for those who were sent away would be lost.
pub(crate) struct Pace {
    /// Between two handshakes, once the burst is used up.
    interval: Duration,
    /// How far behind the present the next free moment may lag: the burst.
    slack: Duration,
    next: Mutex<Next>,
}

#[derive(Default)]
struct Next {
    moment: Option<Instant>,
    appointment: Option<Instant>,
}

/// What becomes of a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Now,
    /// To come again after this long.
    Later(Duration),
}

/// How long a newcomer would have to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    Here(Duration),
    Elsewhere(Duration),
}

/// Waits for a turn, if it comes soon.
pub(crate) async fn in_turn(shared: &Shared) -> Turn {
    let wait = shared.pace.turn(Instant::now());
    if wait != Wait::Here(Duration::ZERO) {
        shared.metrics.limited("handshakes");
    }
    match wait {
        Wait::Here(wait) => {
            tokio::time::sleep(wait).await;
            Turn::Now
        }
        Wait::Elsewhere(wait) => Turn::Later(wait),
    }
}

impl Pace {
    /// `per_second` once as many were taken at once; at least 1.
    pub(crate) fn new(per_second: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self {
            interval,
            slack: Duration::from_secs(1),
            next: Mutex::default(),
        }
    }

    fn turn(&self, now: Instant) -> Wait {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let earliest = now.checked_sub(self.slack).unwrap_or(now);
        let moment = next.moment.map_or(earliest, |moment| moment.max(earliest));
        let wait = moment.saturating_duration_since(now);
        if wait <= PATIENCE {
            next.moment = Some(moment + self.interval);
            return Wait::Here(wait);
        }
        let soonest = now + PATIENCE;
        let mine = next.appointment.map_or(soonest, |mine| mine.max(soonest));
        let wait = mine.saturating_duration_since(now);
        if wait >= LATEST {
            return Wait::Elsewhere(LATEST);
        }
        next.appointment = Some(mine + self.interval);
        Wait::Elsewhere(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_goes_at_once_the_next_wait_and_the_rest_come_later() {
        let (pace, now) = (Pace::new(100), Instant::now());
        let turns: Vec<Wait> = (0..4000).map(|_| pace.turn(now)).collect();
        let at_once = turns
            .iter()
            .filter(|turn| **turn == Wait::Here(Duration::ZERO));
        assert_eq!(at_once.count(), 101);
        let waits = |turn: &&Wait| matches!(turn, Wait::Here(wait) if *wait <= PATIENCE);
        assert_eq!(turns.iter().filter(waits).count(), 301);
        // Each is told another moment, and none a moment too far away.
        let later: Vec<Duration> = turns
            .iter()
            .filter_map(|turn| match turn {
                Wait::Elsewhere(wait) => Some(*wait),
                Wait::Here(_) => None,
            })
            .collect();
        assert!(later.is_sorted());
        assert_eq!(later.last(), Some(&LATEST));
        assert!(
            later
                .iter()
                .all(|wait| *wait >= PATIENCE && *wait <= LATEST)
        );
    }

    #[test]
    fn whoever_is_sent_away_holds_up_nobody() {
        let (pace, start) = (Pace::new(100), Instant::now());
        let mut coming: Vec<Duration> = vec![Duration::ZERO; 1000];
        let mut served = Vec::new();
        // Each comes when it was told to, until it is served.
        while let Some(at) = coming.iter().min().copied() {
            coming.swap_remove(coming.iter().position(|other| *other == at).unwrap());
            match pace.turn(start + at) {
                Wait::Here(wait) => served.push(at + wait),
                Wait::Elsewhere(wait) => coming.push(at + wait),
            }
        }
        assert_eq!(served.len(), 1000);
        let last = served.iter().max().unwrap();
        assert!(*last < Duration::from_secs(12), "{last:?}");
    }

    #[test]
    fn a_steady_rate_never_waits() {
        let (pace, start) = (Pace::new(10), Instant::now());
        for number in 0..100 {
            let now = start + Duration::from_millis(100) * number;
            assert_eq!(pace.turn(now), Wait::Here(Duration::ZERO));
        }
    }
}
