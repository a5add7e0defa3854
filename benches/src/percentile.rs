//! Percentiles of measured times.

use std::time::Duration;

/// In seconds, by the nearest rank; of no times it is not a number. Sorts the times.
pub(crate) fn percentile(times: &mut [Duration], percent: usize) -> f64 {
    times.sort_unstable();
    let rank = (times.len() * percent / 100).min(times.len().saturating_sub(1));
    times.get(rank).map_or(f64::NAN, Duration::as_secs_f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_sorted_times() {
        let mut times: Vec<_> = (1..=100).rev().map(Duration::from_secs).collect();
        assert_eq!(percentile(&mut times, 50), 51.0);
        assert_eq!(percentile(&mut times, 99), 100.0);
        assert_eq!(percentile(&mut times[..1], 99), 1.0);
        assert!(percentile(&mut [], 50).is_nan());
    }
}
