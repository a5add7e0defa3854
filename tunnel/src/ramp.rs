//! How large a piece is that the next hop must have whole before it can pass any of it on.
//!
//! TCP starts with ten segments a round trip and doubles (RFC 6928, RFC 5681), also after a rest
//! (RFC 2861). A message of 48 KiB takes three round trips then, of each hop, one after the other.
//! So pieces begin small and grow with what has been sent: one is never more than a part of what
//! the path takes in a round trip.

use std::time::{Duration, Instant};

/// One segment with its headers: ten leave at once on a new connection.
const FIRST: usize = 1300;
/// A piece, as a part of what was sent since the last rest.
const PART: u64 = 8;
/// TCP's least retransmission timeout, and a little: after each such rest half as much is believed.
const REST: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(crate) struct Ramp {
    sent: u64,
    at: Instant,
}

impl Ramp {
    pub(crate) fn new() -> Self {
        Self {
            sent: 0,
            at: Instant::now(),
        }
    }

    /// Bytes of the next piece at most, of at most `most`.
    pub(crate) fn piece(&self, most: usize) -> usize {
        let part = usize::try_from(self.sent / PART).unwrap_or(usize::MAX);
        part.max(FIRST).min(most)
    }

    /// Bytes are to be sent: how long ago were the last?
    pub(crate) fn look(&mut self, now: Instant) {
        let rests = now.saturating_duration_since(self.at).as_millis() / REST.as_millis();
        if rests > 0 {
            self.sent = self.sent.checked_shr(rests as u32).unwrap_or(0);
            self.at = now;
        }
    }

    pub(crate) fn on_sent(&mut self, now: Instant, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes as u64);
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_grow_with_what_was_sent_and_shrink_with_rest() {
        let mut ramp = Ramp::new();
        let now = ramp.at;
        let most = 64 * 1024;
        assert_eq!(ramp.piece(most), FIRST);
        let mut pieces = 0;
        while ramp.piece(most) < most {
            ramp.on_sent(now, ramp.piece(most));
            pieces += 1;
        }
        assert!(pieces < 48, "{pieces}");
        ramp.on_sent(now, 1 << 20);
        ramp.look(now + REST / 2);
        assert_eq!(ramp.piece(most), most);
        ramp.look(now + REST * 5);
        assert!(ramp.piece(most) < most);
        ramp.look(now + REST * 1000);
        assert_eq!(ramp.piece(most), FIRST);
        assert_eq!(ramp.piece(1000), 1000, "never more than is asked for");
    }
}
