//! The links of a user's machine that are measured.

use std::fmt;

/// Round trip of the links that have one, beside the time that bytes take at the link's rate.
pub(super) const ROUND_TRIP_MS: u64 = 40;
/// Of the links that lose packets, in each direction.
pub(super) const LOSS_PERCENT: u32 = 1;

/// A link, the same in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Link {
    pub(super) mbit: u32,
    pub(super) is_far: bool,
    pub(super) is_lossy: bool,
}

impl Link {
    /// All of them, the most ordinary ones first.
    pub(super) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for mbit in [20, 5, 50] {
            for (is_lossy, is_far) in [(false, false), (false, true), (true, false), (true, true)] {
                all.push(Self {
                    mbit,
                    is_far,
                    is_lossy,
                });
            }
        }
        all
    }

    pub(super) fn bits_a_second(self) -> f64 {
        f64::from(self.mbit) * 1e6
    }

    /// Bytes that leave at once after a pause: 2 ms' worth, and two packets at least. More would let
    /// a burst pass by the queue, less would cost rate where a timer is late.
    pub(super) fn burst(self) -> u32 {
        (self.mbit * 1_000_000 / 8 / 500).max(3_200)
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} Mbit/s", self.mbit)?;
        if self.is_lossy {
            write!(f, ", {LOSS_PERCENT} % loss")?;
        }
        if self.is_far {
            write!(f, ", {ROUND_TRIP_MS} ms")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_link_has_a_name_of_its_own() {
        let names: Vec<String> = Link::all().iter().map(Link::to_string).collect();
        assert_eq!(names.len(), 12);
        assert_eq!(names[0], "20 Mbit/s");
        assert_eq!(names[3], "20 Mbit/s, 1 % loss, 40 ms");
        let unique: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
    }

    #[test]
    fn a_burst_is_two_packets_at_least() {
        let of = |mbit| Link {
            mbit,
            is_far: false,
            is_lossy: false,
        };
        assert_eq!(of(5).burst(), 3_200);
        assert_eq!(of(50).burst(), 12_500);
    }
}
