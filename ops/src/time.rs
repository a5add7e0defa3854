//! Times as text.

use std::time::{SystemTime, UNIX_EPOCH};

use ::time::OffsetDateTime;
use ::time::format_description::well_known::Rfc3339;

/// RFC 3339 in UTC, to the second; "an unknown time" before 1970 and beyond the year 9999.
#[must_use]
pub fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).ok();
    let text = since.and_then(|since| format(i128::from(since.as_secs()) * 1_000_000_000));
    text.unwrap_or_else(|| "an unknown time".to_owned())
}

/// The same of milliseconds since 1970, with their fraction of a second.
#[must_use]
pub fn rfc3339_of_millis(unix_ms: u64) -> Option<String> {
    format(i128::from(unix_ms) * 1_000_000)
}

fn format(unix_nanos: i128) -> Option<String> {
    let time = OffsetDateTime::from_unix_timestamp_nanos(unix_nanos).ok()?;
    time.format(&Rfc3339).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_in_utc_and_to_the_second() {
        let at = |millis| UNIX_EPOCH + Duration::from_millis(millis);
        assert_eq!(rfc3339(at(1_799_992_800_999)), "2027-01-15T06:00:00Z");
        let text = rfc3339_of_millis(1_799_992_800_250);
        assert_eq!(text.as_deref(), Some("2027-01-15T06:00:00.25Z"));
    }

    #[test]
    fn a_time_that_has_no_form_is_no_panic() {
        let far = UNIX_EPOCH + Duration::from_secs(1 << 50);
        let early = UNIX_EPOCH - Duration::from_secs(1);
        for at in [far, early] {
            assert_eq!(rfc3339(at), "an unknown time");
        }
        assert_eq!(rfc3339_of_millis(u64::MAX), None);
    }
}
