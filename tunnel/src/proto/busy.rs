//! A relay's word, before TLS, that it has no place for a handshake now and when it expects to.
//!
//! It is a fatal TLS alert (RFC 8446, section 6) instead of a ServerHello, so it costs the relay no key
//! exchange and no signature. Its description is one that IANA has not assigned; to other TLS clients
//! it is a failed handshake, as section 6.2 requires of unknown ones. It is not signed: an
//! attacker on the path could as well drop every packet, and gains at most [`LONGEST`] a time.

use std::time::Duration;

/// Descriptions from here on mean 1 s, 2 s and so on.
const FIRST: u8 = 0xc0;
/// The longest wait that can be encoded, and that a dialer accepts: 64 s.
pub const LONGEST: Duration = Duration::from_secs(64);

/// The record to send. Waits are rounded up to seconds and cut to 1 s … [`LONGEST`].
pub fn alert(wait: Duration) -> [u8; 7] {
    let seconds = wait.as_millis().div_ceil(1000).clamp(1, 64);
    // At most 64, so at most 0xff.
    let code = FIRST + u8::try_from(seconds - 1).unwrap_or(u8::MAX - FIRST);
    // ContentType alert, legacy version, length; level fatal, description.
    [21, 3, 3, 0, 2, 2, code]
}

/// What an alert's description means, if it is one of these.
pub fn retry_after(description: u8) -> Option<Duration> {
    let beyond = description.checked_sub(FIRST)?;
    Some(Duration::from_secs(u64::from(beyond) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_what_is_heard() {
        for (wait, decoded) in [(0, 1), (1, 1), (1001, 2), (30_000, 30), (900_000, 64)] {
            let record = alert(Duration::from_millis(wait));
            assert_eq!(record[..6], [21, 3, 3, 0, 2, 2]);
            assert_eq!(retry_after(record[6]), Some(Duration::from_secs(decoded)));
        }
        // Those of TLS, 0 to 120, are not decoded as a wait.
        for known in 0..=120 {
            assert_eq!(retry_after(known), None);
        }
        assert_eq!(retry_after(0xff), Some(LONGEST));
    }
}
