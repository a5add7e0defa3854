//! Handshakes under way and waiting, without I/O: which begins when, and which is sent away.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::bound::Bound;
use super::rates::{Bucket, Pace};
use super::ring::{Network, Ring};

/// A peer that would wait for longer is rejected with a time to retry after. Peers give up after 10 s of TLS.
pub(super) const MAX_QUEUE_DELAY: Duration = Duration::from_secs(5);
/// A peer that was expected to wait for less, and has waited for so long, is rejected likewise.
pub(super) const OVERDUE: Duration = Duration::from_secs(7);
/// The longest time to retry after: an estimate for a later time would be worth little.
pub(super) const LATEST: Duration = Duration::from_secs(30);
/// Appointments for each handshake that is expected to end: peers dial up to a fifth later than the
/// relay proposed, so that they do not dial together.
const OVERBOOKED: f64 = 1.2;
/// A handshake under way for so long waits for its peer, and needs no processor meanwhile.
pub(super) const STALLED: Duration = Duration::from_secs(4);
/// Handshakes from known networks for one from an unknown network.
const KNOWN_FIRST: u32 = 4;
/// A network with so many waiting gets no more appointments, where others wait as well.
const GREEDY: usize = 16;

/// How an arrival goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Arrived {
    Admitted(u64),
    Waits(u64),
    RetryAfter(Duration),
}

/// The end of a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Admitted,
    RetryAfter(Duration),
}

/// Handshakes under way and waiting, without their I/O. `W` ends one wait.
pub(super) struct Queue<W> {
    next_ticket: u64,
    /// When each that is under way began; without those that stall.
    pub(super) active: BTreeMap<u64, Instant>,
    pub(super) waiting: BTreeMap<u64, Waiting<W>>,
    /// Those from known networks, and the others.
    pub(super) classes: [Ring; 2],
    /// How many from known networks were served since one from another.
    known_in_a_row: u32,
    bucket: Bucket,
    pub(super) bound: Bound,
    pub(super) pace: Pace,
    /// The next moment that can be given to a peer.
    appointment: Option<Instant>,
}

pub(super) struct Waiting<W> {
    since: Instant,
    network: Network,
    class: usize,
    tell: W,
}

impl<W> Queue<W> {
    pub(super) fn new(per_second: u32, now: Instant) -> Self {
        let most = f64::from(per_second.max(1));
        Self {
            next_ticket: 0,
            active: BTreeMap::new(),
            waiting: BTreeMap::new(),
            classes: Default::default(),
            known_in_a_row: 0,
            bucket: Bucket::new(most, now),
            bound: Bound::new(),
            pace: Pace::new(most, now),
            appointment: None,
        }
    }

    pub(super) fn arrive(
        &mut self,
        now: Instant,
        network: Network,
        is_known: bool,
        tell: W,
    ) -> Arrived {
        self.refresh(now);
        if self.waiting.is_empty() && self.may_begin() {
            let ticket = self.ticket();
            self.begin(ticket, now);
            return Arrived::Admitted(ticket);
        }
        let class = usize::from(!is_known);
        let own = self.classes[class].waiting_of(network);
        let ahead = match is_known {
            true => self.classes[0].ahead_of(own),
            false => self.classes[0].len + self.classes[1].ahead_of(own),
        };
        let wait = Duration::from_secs_f64((ahead + 1) as f64 / self.pace.per_second);
        if wait <= MAX_QUEUE_DELAY {
            let ticket = self.ticket();
            self.classes[class].push(network, ticket);
            let waiting = Waiting {
                since: now,
                network,
                class,
                tell,
            };
            self.waiting.insert(ticket, waiting);
            return Arrived::Waits(ticket);
        }
        // One network's flood must not use up the moments for others.
        let is_alone = self
            .classes
            .iter()
            .map(|class| class.turns.len())
            .sum::<usize>()
            <= 1;
        if own >= GREEDY && !is_alone {
            return Arrived::RetryAfter(LATEST);
        }
        Arrived::RetryAfter(self.appoint(now))
    }

    /// The next moment at which the relay expects to have a place, as a wait from now.
    fn appoint(&mut self, now: Instant) -> Duration {
        let soonest = now + MAX_QUEUE_DELAY;
        let at = self.appointment.map_or(soonest, |at| at.max(soonest));
        let wait = at.saturating_duration_since(now);
        if wait >= LATEST {
            return LATEST;
        }
        let every = 1.0 / (self.pace.per_second * OVERBOOKED);
        self.appointment = Some(at + Duration::from_secs_f64(every));
        wait
    }

    /// Those whose waiting ends now.
    pub(super) fn advance(&mut self, now: Instant) -> Vec<(W, Verdict)> {
        self.refresh(now);
        let mut verdicts = Vec::new();
        while self.may_begin() {
            let Some(ticket) = self.take_next() else {
                break;
            };
            if let Some(waiting) = self.waiting.remove(&ticket) {
                self.begin(ticket, now);
                verdicts.push((waiting.tell, Verdict::Admitted));
            }
        }
        while let Some(oldest) = self.waiting.first_entry()
            && oldest.get().since + OVERDUE <= now
        {
            let ticket = *oldest.key();
            let waiting = oldest.remove();
            self.classes[waiting.class].remove(waiting.network, ticket);
            let wait = self.appoint(now);
            verdicts.push((waiting.tell, Verdict::RetryAfter(wait)));
        }
        verdicts
    }

    /// When to advance next, unless something changes before.
    pub(super) fn next(&self, now: Instant) -> Option<Instant> {
        let overdue = self.waiting.first_key_value()?.1.since + OVERDUE;
        let place = match self.active.first_key_value() {
            Some((_, began)) if self.active.len() as f64 >= self.bound.limit => *began + STALLED,
            _ => now + self.bucket.until_one(),
        };
        // A timer is good to a millisecond; no sooner, or it would spin.
        Some(overdue.min(place).max(now + Duration::from_millis(1)))
    }

    pub(super) fn completed(&mut self, ticket: u64, now: Instant) {
        if let Some(began) = self.active.remove(&ticket) {
            let is_full = !self.waiting.is_empty();
            let took = now.duration_since(began);
            self.bound.completed(took, is_full, now);
        }
        self.pace.ended();
    }

    /// One that waits or is under way has gone.
    pub(super) fn leave(&mut self, ticket: u64) {
        self.active.remove(&ticket);
        if let Some(waiting) = self.waiting.remove(&ticket) {
            self.classes[waiting.class].remove(waiting.network, ticket);
        }
    }

    fn refresh(&mut self, now: Instant) {
        self.bucket.fill(now);
        self.pace
            .measure(!self.waiting.is_empty(), self.bucket.most, now);
        while let Some(oldest) = self.active.first_entry()
            && *oldest.get() + STALLED <= now
        {
            oldest.remove();
        }
    }

    fn may_begin(&self) -> bool {
        self.bucket.tokens >= 1.0 && (self.active.len() as f64) < self.bound.limit
    }

    fn begin(&mut self, ticket: u64, now: Instant) {
        self.bucket.tokens -= 1.0;
        self.active.insert(ticket, now);
    }

    fn take_next(&mut self) -> Option<u64> {
        let known_first = self.known_in_a_row < KNOWN_FIRST || self.classes[1].len == 0;
        let class = match (known_first, self.classes[0].len) {
            (true, 1..) => {
                self.known_in_a_row += 1;
                0
            }
            _ => {
                self.known_in_a_row = 0;
                1
            }
        };
        self.classes[class].pop()
    }

    fn ticket(&mut self) -> u64 {
        self.next_ticket += 1;
        self.next_ticket
    }
}
