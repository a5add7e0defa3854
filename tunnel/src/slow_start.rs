//! Limits the size of a message on a connection that has just started or was idle.
//!
//! A hop can pass nothing on before it has a whole message. TCP starts with ten segments a round trip
//! and doubles (RFC 6928, RFC 5681), also after an idle time (RFC 2861), so that a message of 48 KiB
//! takes three round trips then, on each hop, one after the other. Messages therefore start small and
//! grow with the bytes sent: each is only a part of what the path carries in a round trip.

use std::time::Duration;

use tokio::time::Instant;

/// One segment with its headers: ten leave at once on a new connection.
const INITIAL: usize = 1300;
/// A message is at most this part of the bytes sent since the last idle time.
const FRACTION: u64 = 8;
/// TCP's least retransmission timeout, and a little. Each such time without data halves the count.
const IDLE: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct SlowStart {
    sent: u64,
    last_sent: Instant,
}

impl SlowStart {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            sent: 0,
            last_sent: now,
        }
    }

    /// Bytes of the next message at most, never more than `max`.
    pub(crate) fn limit(&self, max: usize) -> usize {
        let part = usize::try_from(self.sent / FRACTION).unwrap_or(usize::MAX);
        part.max(INITIAL).min(max)
    }

    /// Accounts for the idle time before bytes that are about to be sent.
    pub(crate) fn before_send(&mut self, now: Instant) {
        let idle = now.saturating_duration_since(self.last_sent).as_millis() / IDLE.as_millis();
        if idle > 0 {
            self.sent = self.sent.checked_shr(idle as u32).unwrap_or(0);
            self.last_sent = now;
        }
    }

    pub(crate) fn on_sent(&mut self, now: Instant, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes as u64);
        self.last_sent = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_grow_with_what_was_sent_and_shrink_when_idle() {
        let now = Instant::now();
        let mut slow_start = SlowStart::new(now);
        let max = 64 * 1024;
        assert_eq!(slow_start.limit(max), INITIAL);
        let mut messages = 0;
        while slow_start.limit(max) < max {
            slow_start.on_sent(now, slow_start.limit(max));
            messages += 1;
        }
        assert!(messages < 48, "{messages}");
        slow_start.on_sent(now, 1 << 20);
        slow_start.before_send(now + IDLE / 2);
        assert_eq!(slow_start.limit(max), max);
        slow_start.before_send(now + IDLE * 5);
        assert!(slow_start.limit(max) < max);
        slow_start.before_send(now + IDLE * 1000);
        assert_eq!(slow_start.limit(max), INITIAL);
        assert_eq!(slow_start.limit(1000), 1000, "never more than is asked for");
    }
}
