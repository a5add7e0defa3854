//! A rate limit for log lines: each place in the code writes so many lines a second and no more, and
//! fewer of them about one peer.
//!
//! Actions of peers are logged, so a peer that repeats one without end would fill disks and hide the
//! rest. All lines pass this one place, so that none is forgotten. Debug and trace are written in full.

use std::{
    collections::HashMap,
    fmt::{self, Debug},
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};
use tracing::{
    Event, Level, Subscriber,
    callsite::Identifier,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

/// Of one place in the code, about all peers. A relay that 5,000 agents come back to within
/// 30 s writes a line for nearly each.
const OF_A_PLACE: Rate = Rate {
    burst: 1000.0,
    per_second: 100.0,
};
/// Of one place and one peer.
const OF_A_PEER: Rate = Rate {
    burst: 30.0,
    per_second: 1.0,
};
/// Buckets that are remembered, of some 60 bytes each. Beyond, only [`OF_A_PLACE`] counts.
const BUCKETS: usize = 4096;
/// Fields that name the peer that caused a line.
const PEER_FIELDS: [&str; 5] = ["client", "source", "user", "peer", "balancer"];

/// Lines that were left out since the process began.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Lines that were left out of the log since the process began, because there were too many like
/// them.
pub fn left_out() -> u64 {
    LEFT_OUT.load(Ordering::Relaxed)
}

/// A format that can report omitted lines.
pub(super) trait LeftOut {
    fn left_out(&self, out: &mut Writer<'_>, count: u64) -> fmt::Result;
}

/// A format that leaves out what exceeds its rate.
pub(super) struct RateLimited<F> {
    format: F,
    limiter: Mutex<RateLimiter<Identifier>>,
    hasher: RandomState,
}

impl<F> RateLimited<F> {
    pub(super) fn new(format: F) -> Self {
        Self {
            format,
            limiter: Mutex::new(RateLimiter::default()),
            hasher: RandomState::new(),
        }
    }
}

impl<S, N, F> FormatEvent<S, N> for RateLimited<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N> + LeftOut,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        if *metadata.level() > Level::INFO {
            return self.format.format_event(context, out, event);
        }
        let mut peer = Peer {
            hasher: &self.hasher,
            hash: None,
        };
        event.record(&mut peer);
        // Decided before anything is formatted: a flood should cost as little as possible.
        let decision = self
            .limiter
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .decide(metadata.callsite(), peer.hash, Instant::now());
        match decision {
            // Nothing is written then.
            Decision::LeaveOut => {
                LEFT_OUT.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Decision::Write { left_out } => {
                if left_out > 0 {
                    self.format.left_out(&mut out, left_out)?;
                }
                self.format.format_event(context, out, event)
            }
        }
    }
}

/// Finds the peer that caused an event; of an address only the IP, since each connection has another
/// port.
struct Peer<'a> {
    hasher: &'a RandomState,
    hash: Option<u64>,
}

impl Visit for Peer<'_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        if PEER_FIELDS.contains(&field.name()) {
            let hash = match value.parse::<SocketAddr>() {
                Ok(address) => self.hasher.hash_one(address.ip()),
                Err(_) => self.hasher.hash_one(value),
            };
            let before = self.hash.unwrap_or_default();
            self.hash = Some(self.hasher.hash_one((before, hash)));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if PEER_FIELDS.contains(&field.name()) {
            self.record_str(field, &format!("{value:?}"));
        }
    }
}

/// How many lines there may be.
#[derive(Clone, Copy)]
struct Rate {
    /// At once, after a rest.
    burst: f64,
    per_second: f64,
}

/// A token bucket.
struct Bucket {
    tokens: f64,
    at: Instant,
    left_out: u64,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            tokens: rate.burst,
            at: now,
            left_out: 0,
        }
    }

    fn refill(&mut self, rate: Rate, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * rate.per_second).min(rate.burst);
        self.at = self.at.max(now);
    }

    fn has_one(&self) -> bool {
        self.tokens >= 1.0
    }

    fn is_at_rest(&mut self, rate: Rate, now: Instant) -> bool {
        self.refill(rate, now);
        self.tokens >= rate.burst && self.left_out == 0
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Decision {
    Write {
        /// Lines of this place and peer that were left out before.
        left_out: u64,
    },
    LeaveOut,
}

/// The decision, by places `P` and hashes of peers.
struct RateLimiter<P> {
    places: HashMap<P, Bucket>,
    peers: HashMap<(P, u64), Bucket>,
}

impl<P> Default for RateLimiter<P> {
    fn default() -> Self {
        Self {
            places: HashMap::new(),
            peers: HashMap::new(),
        }
    }
}

impl<P: std::hash::Hash + Eq + Clone> RateLimiter<P> {
    fn decide(&mut self, place: P, peer: Option<u64>, now: Instant) -> Decision {
        // Any peer can add a key, so the table is bounded; a bucket at rest has the same effect as
        // none.
        if peer.is_some() && self.peers.len() >= BUCKETS {
            self.peers
                .retain(|_, bucket| !bucket.is_at_rest(OF_A_PEER, now));
        }
        let has_room = self.peers.len() < BUCKETS;
        // Places are as many as there are in the code.
        let whole = self
            .places
            .entry(place.clone())
            .or_insert_with(|| Bucket::new(OF_A_PLACE, now));
        whole.refill(OF_A_PLACE, now);
        let mut own = match peer.map(|peer| (place, peer)) {
            Some(key) if has_room => {
                let own = self.peers.entry(key);
                Some(own.or_insert_with(|| Bucket::new(OF_A_PEER, now)))
            }
            // The table is full: a new peer shares the bucket of the place.
            Some(key) => self.peers.get_mut(&key),
            None => None,
        };
        if let Some(own) = &mut own {
            own.refill(OF_A_PEER, now);
        }
        match own {
            // A peer that has used up its own does not use up the others'.
            Some(own) if !own.has_one() => {
                own.left_out += 1;
                return Decision::LeaveOut;
            }
            Some(own) if whole.has_one() => {
                own.tokens -= 1.0;
                whole.tokens -= 1.0;
                let left_out =
                    std::mem::take(&mut own.left_out) + std::mem::take(&mut whole.left_out);
                return Decision::Write { left_out };
            }
            _ => {}
        }
        if whole.has_one() {
            whole.tokens -= 1.0;
            return Decision::Write {
                left_out: std::mem::take(&mut whole.left_out),
            };
        }
        whole.left_out += 1;
        Decision::LeaveOut
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const WRITE: Decision = Decision::Write { left_out: 0 };

    fn written(limiter: &mut RateLimiter<u8>, peer: Option<u64>, times: u32, now: Instant) -> u32 {
        let mut written = 0;
        for _ in 0..times {
            written += u32::from(limiter.decide(1, peer, now) != Decision::LeaveOut);
        }
        written
    }

    #[test]
    fn a_flood_of_one_peer_is_a_burst_and_then_a_line_a_second() {
        let (mut limiter, start) = (RateLimiter::default(), Instant::now());
        assert_eq!(written(&mut limiter, Some(7), 3100, start), 30);
        // Another peer, and another place, are as free as before.
        assert_eq!(limiter.decide(1, Some(8), start), WRITE);
        assert_eq!(limiter.decide(2, Some(7), start), WRITE);
        let later = start + Duration::from_secs(1);
        let resumed = Decision::Write { left_out: 3070 };
        assert_eq!(limiter.decide(1, Some(7), later), resumed);
        assert_eq!(written(&mut limiter, Some(7), 3100, later), 0);
        let rested = later + Duration::from_secs(60);
        assert_eq!(written(&mut limiter, Some(7), 3100, rested), 30);
    }

    #[test]
    fn a_flood_of_many_peers_is_bounded_in_lines_and_memory() {
        let (mut limiter, start) = (RateLimiter::default(), Instant::now());
        let mut lines = 0;
        for peer in 0..100_000 {
            lines += written(&mut limiter, Some(peer), 1, start);
        }
        assert_eq!(lines, 1000);
        assert!(limiter.peers.len() <= BUCKETS);
        let later = start + Duration::from_secs(1);
        assert_eq!(written(&mut limiter, Some(1), 1, later), 1);
        assert_eq!(written(&mut limiter, None, 1000, later), 99);
        // Peers at rest are forgotten, so that newcomers are counted again.
        let rested = later + Duration::from_secs(3600);
        assert_eq!(written(&mut limiter, Some(u64::MAX), 100, rested), 30);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
        let (mut limiter, start) = (RateLimiter::default(), Instant::now());
        let later = start + Duration::from_secs(5);
        assert_eq!(written(&mut limiter, Some(1), 100, later), 30);
        assert_eq!(written(&mut limiter, Some(1), 100, start), 0);
    }
}
