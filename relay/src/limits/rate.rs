//! A rate limiter: a token bucket for each address.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::limits::half_open::network_of;

/// Addresses remembered. Beyond it the fullest buckets, which limit no address, go first; only an
/// attacker with this many networks makes the limit forget.
const MAX_ADDRESSES: usize = 65_536;

pub(crate) struct RateLimit {
    burst: f64,
    per_second: f64,
    buckets: Mutex<HashMap<IpAddr, Bucket>>,
}

#[derive(Clone, Copy)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl RateLimit {
    pub(crate) fn new(burst: u32, per_minute: u32) -> Self {
        Self {
            burst: f64::from(burst.max(1)),
            per_second: f64::from(per_minute.max(1)) / 60.0,
            buckets: Mutex::default(),
        }
    }

    /// Takes one token.
    ///
    /// # Errors
    /// How long to wait for one.
    pub(crate) fn take(&self, address: IpAddr, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let address = network_of(address);
        if buckets.len() >= MAX_ADDRESSES && !buckets.contains_key(&address) {
            self.make_room(&mut buckets, now);
        }
        let bucket = buckets.entry(address).or_insert(Bucket {
            tokens: self.burst,
            at: now,
        });
        bucket.tokens = self.filled(*bucket, now);
        bucket.at = now;
        if bucket.tokens >= 1.0 {
            bucket.tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64(
            (1.0 - bucket.tokens) / self.per_second,
        ))
    }

    fn filled(&self, bucket: Bucket, now: Instant) -> f64 {
        let idle = now.saturating_duration_since(bucket.at).as_secs_f64();
        (bucket.tokens + idle * self.per_second).min(self.burst)
    }

    fn make_room(&self, buckets: &mut HashMap<IpAddr, Bucket>, now: Instant) {
        buckets.retain(|_, bucket| self.filled(*bucket, now) < self.burst);
        if buckets.len() >= MAX_ADDRESSES {
            buckets.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let limit = RateLimit::new(3, 60);
        let start = Instant::now();
        let address = IpAddr::from([10, 0, 0, 1]);
        for _ in 0..3 {
            assert_eq!(limit.take(address, start), Ok(()));
        }
        let wait = limit.take(address, start).unwrap_err();
        assert_eq!(wait, Duration::from_secs(1));
        assert_eq!(limit.take(address, start + wait), Ok(()));
        assert!(limit.take(address, start + wait).is_err());
        assert_eq!(limit.take(IpAddr::from([10, 0, 0, 2]), start), Ok(()));
    }

    #[test]
    fn memory_stays_bounded() {
        let limit = RateLimit::new(1, 60);
        let start = Instant::now();
        for number in 0..70_000u32 {
            let address = IpAddr::from(number.to_be_bytes());
            assert_eq!(limit.take(address, start), Ok(()));
        }
        assert!(limit.buckets.lock().unwrap().len() <= MAX_ADDRESSES);
    }
}
