//! All that one run found, by cell and way.

use std::collections::BTreeMap;

use super::bulk::Bulk;
use super::cell::Sample;
use super::link::Link;
use crate::percentile::percentile;
use crate::rows::{DIRECT, Spread};

/// A row of the report.
pub(super) type Cell = (Link, Bulk);

/// A measure of a cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Measure {
    /// Percentile of the keystrokes of all rounds, in ms.
    Echo(usize),
    /// The median of the commands of all rounds, in ms.
    Get,
    /// The median of the rounds, in Mbit/s.
    Rate,
}

/// The percentiles of keystrokes that are reported.
pub(super) const ECHOES: [Measure; 3] = [Measure::Echo(50), Measure::Echo(90), Measure::Echo(99)];

#[derive(Debug, Default)]
pub(super) struct Figures {
    samples: BTreeMap<(Cell, &'static str), Sample>,
    /// Why a cell has fewer samples than rounds: the last reason.
    failures: BTreeMap<(Cell, &'static str), String>,
}

impl Figures {
    pub(super) fn add(&mut self, cell: Cell, way: &'static str, sample: Sample) {
        let all = self.samples.entry((cell, way)).or_default();
        all.echoes.extend(sample.echoes);
        all.gets.extend(sample.gets);
        all.rates.extend(sample.rates);
    }

    pub(super) fn fail(&mut self, cell: Cell, way: &'static str, why: String) {
        self.failures.insert((cell, way), why);
    }

    pub(super) fn failures(&self) -> impl Iterator<Item = (Cell, &'static str, &str)> {
        let failures = self.failures.iter();
        failures.map(|((cell, way), why)| (*cell, *way, why.as_str()))
    }

    pub(super) fn value(&self, cell: Cell, way: &'static str, measure: Measure) -> Option<f64> {
        let sample = self.samples.get(&(cell, way))?;
        let value = match measure {
            Measure::Echo(percent) => percentile(&mut sample.echoes.clone(), percent) * 1e3,
            Measure::Get => percentile(&mut sample.gets.clone(), 50) * 1e3,
            Measure::Rate => Spread::of(&sample.rates)?.median,
        };
        value.is_finite().then_some(value)
    }

    /// How a way compares with the direct one, as `value / direct`.
    pub(super) fn ratio(&self, cell: Cell, way: &'static str, measure: Measure) -> Option<f64> {
        let ratio = self.value(cell, way, measure)? / self.value(cell, DIRECT, measure)?;
        (way != DIRECT && ratio.is_finite()).then_some(ratio)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::super::bulk::Direction;
    use super::*;

    pub(in super::super) const CELL: Cell = (
        Link {
            mbit: 20,
            is_far: false,
            is_lossy: true,
        },
        Bulk::Exec(Direction::Down),
    );

    /// Echoes of 1 to 100 ms times `factor`, commands and rates likewise.
    pub(in super::super) fn sample(factor: u32) -> Sample {
        Sample {
            echoes: (1..=100)
                .map(Duration::from_millis)
                .map(|it| it * factor)
                .collect(),
            gets: vec![Duration::from_millis(100) * factor; 8],
            rates: vec![f64::from(factor)],
        }
    }

    #[test]
    fn percentiles_are_of_all_rounds_together() {
        let mut figures = Figures::default();
        figures.add(CELL, DIRECT, sample(1));
        figures.add(CELL, DIRECT, sample(3));
        let value = |measure| figures.value(CELL, DIRECT, measure);
        assert_eq!(value(Measure::Echo(99)), Some(297.0));
        assert_eq!(value(Measure::Get), Some(300.0));
        assert_eq!(value(Measure::Rate), Some(2.0));
        assert_eq!(figures.value(CELL, "other", Measure::Get), None);
    }

    #[test]
    fn a_ratio_is_to_the_direct_way() {
        let mut figures = Figures::default();
        figures.add(CELL, DIRECT, sample(1));
        figures.add(CELL, "other", sample(2));
        for measure in ECHOES {
            assert_eq!(figures.ratio(CELL, "other", measure), Some(2.0));
        }
        assert_eq!(figures.ratio(CELL, DIRECT, Measure::Get), None);
        let idle = (CELL.0, Bulk::None);
        figures.add(idle, "other", sample(2));
        assert_eq!(figures.ratio(idle, "other", Measure::Get), None);
    }
}
