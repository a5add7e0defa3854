//! When to ping, and when to regard the other side as dead.
//!
//! A state machine over a passed-in clock: any inbound byte is a sign of life, a ping goes out
//! each interval, and without a byte for `dead_after` the carrier is dead. Pings are sent on busy
//! carriers too, because they also measure the round trip.

use std::time::{Duration, Instant};

/// Intervals of the pings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Mean time between pings.
    pub ping_interval: Duration,
    /// Each interval is drawn from `ping_interval` ± this share, so that many carriers made at
    /// once do not ping at once.
    pub jitter: f64,
    /// Silence after which the carrier is dead.
    pub dead_after: Duration,
}

/// What the driver does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Wait for the next timer.
    Nothing,
    /// Send a ping.
    Ping,
    /// Close the carrier: nothing was received for too long.
    Dead,
}

/// Decides when to ping, and when a carrier is dead.
#[derive(Debug)]
pub struct Liveness {
    config: Config,
    seed: u64,
    next_ping: Instant,
    last_byte: Instant,
}

impl Liveness {
    /// A carrier that is alive at `now`; `seed` makes the jitter.
    pub fn new(config: Config, now: Instant, seed: u64) -> Self {
        let mut liveness = Self {
            config,
            seed,
            next_ping: now,
            last_byte: now,
        };
        liveness.schedule(now);
        liveness
    }

    /// Bytes came in.
    pub fn on_bytes(&mut self, now: Instant) {
        self.last_byte = self.last_byte.max(now);
    }

    /// When to call [`Self::on_timer`] next.
    pub fn next(&self) -> Instant {
        self.next_ping.min(self.last_byte + self.config.dead_after)
    }

    /// The timer has expired.
    pub fn on_timer(&mut self, now: Instant) -> Action {
        if now >= self.last_byte + self.config.dead_after {
            return Action::Dead;
        }
        if now >= self.next_ping {
            self.schedule(now);
            return Action::Ping;
        }
        Action::Nothing
    }

    fn schedule(&mut self, now: Instant) {
        // SplitMix64: spread matters here, not secrecy.
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let unit = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64;
        let factor = 1.0 + self.config.jitter.clamp(0.0, 0.9) * (2.0 * unit - 1.0);
        self.next_ping = now + self.config.ping_interval.mul_f64(factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: Config = Config {
        ping_interval: Duration::from_secs(18),
        jitter: 0.2,
        dead_after: Duration::from_secs(50),
    };

    #[test]
    fn pings_within_the_jitter_and_dies_of_silence() {
        let start = Instant::now();
        for seed in 0..200 {
            let mut live = Liveness::new(CONFIG, start, seed);
            let (mut now, mut pings) = (start, 0);
            loop {
                let next = live.next();
                let gap = next - now;
                now = next;
                match live.on_timer(now) {
                    Action::Ping => {
                        assert!(gap >= Duration::from_millis(14_400), "{gap:?}");
                        assert!(gap <= Duration::from_millis(21_600), "{gap:?}");
                        pings += 1;
                    }
                    Action::Dead => break,
                    Action::Nothing => panic!("woken for nothing"),
                }
            }
            assert_eq!(now - start, CONFIG.dead_after);
            assert!((2..=3).contains(&pings), "{pings}");
        }
    }

    #[test]
    fn any_byte_puts_death_off() {
        let start = Instant::now();
        let mut live = Liveness::new(CONFIG, start, 1);
        let later = start + Duration::from_secs(49);
        live.on_bytes(later);
        assert_ne!(live.on_timer(start + Duration::from_secs(98)), Action::Dead);
        assert_eq!(live.on_timer(later + CONFIG.dead_after), Action::Dead);
    }

    #[test]
    fn a_clock_that_steps_back_does_no_harm() {
        let start = Instant::now() + Duration::from_secs(100);
        let mut live = Liveness::new(CONFIG, start, 1);
        live.on_bytes(start - Duration::from_secs(90));
        assert_eq!(live.on_timer(start), Action::Nothing);
    }
}
