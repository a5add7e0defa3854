//! HTTP/2 windows for long paths, from the bandwidth-delay product (BDP).

use std::time::Duration;

/// Assumed bandwidth of a path, bytes a second: 1 Gbit/s.
const BANDWIDTH: u128 = 125_000_000;

/// The largest window of a stream, bytes.
pub const STREAM_WINDOW: u32 = 18 * 1024 * 1024;

/// From this round trip on an end is far away. Windows of 512 KiB would hold bulk up, and a busy
/// machine does not explain the delay.
pub const THRESHOLD: Duration = Duration::from_millis(20);

/// The window that lets one stream fill a path of this round trip, at most [`STREAM_WINDOW`] bytes.
/// One and a half times the bandwidth-delay product, since HTTP/2 updates a window only when half of
/// it was read.
pub fn stream_window(round_trip: Duration) -> u32 {
    let bdp = round_trip.as_millis().saturating_mul(BANDWIDTH) / 1000;
    u32::try_from(bdp.saturating_mul(3) / 2)
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
