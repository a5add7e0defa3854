//! Windows of the HTTP/2 on a session whose other end is far away.

use std::time::Duration;

/// What a path is taken to carry, bytes a second: 1 Gbit/s.
const BYTES_A_SECOND: u128 = 125_000_000;

/// The largest window of a stream, bytes.
pub const STREAM_WINDOW: u32 = 18 * 1024 * 1024;

/// The window that lets one stream fill a path of this round trip, at most [`STREAM_WINDOW`] bytes.
/// One and a half times what is on the way: HTTP/2's window is given again when half of it was read.
pub fn stream_window(round_trip: Duration) -> u32 {
    let on_the_way = round_trip.as_millis().saturating_mul(BYTES_A_SECOND) / 1000;
    u32::try_from(on_the_way.saturating_mul(3) / 2)
        .map_or(STREAM_WINDOW, |window| window.min(STREAM_WINDOW))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_grows_with_the_path_up_to_its_bound() {
        assert_eq!(stream_window(Duration::ZERO), 0);
        assert_eq!(stream_window(Duration::from_millis(20)), 3_750_000);
        assert_eq!(stream_window(Duration::from_millis(80)), 15_000_000);
        for seconds in [1, 60, u64::MAX] {
            assert_eq!(stream_window(Duration::from_secs(seconds)), STREAM_WINDOW);
        }
    }
}
