//! The figures as a Markdown table: medians, their spread, and the ratio that counts.

use crate::measure::{ROWS, Sample};

/// Every sample of a run, by row and way.
#[derive(Default)]
pub(crate) struct Report {
    direct: Vec<Sample>,
    /// Through lines that end with their carrier.
    unkept: Vec<Sample>,
    through: Vec<Sample>,
}

impl Report {
    pub(crate) fn direct(&mut self, samples: Vec<Sample>) {
        self.direct.extend(samples);
    }

    pub(crate) fn unkept(&mut self, samples: Vec<Sample>) {
        self.unkept.extend(samples);
    }

    pub(crate) fn through(&mut self, samples: Vec<Sample>) {
        self.through.extend(samples);
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::from(
            "| row | unit | direct | through the line | ratio | without resumption | with : without |\n\
             |---|---|---|---|---|---|---|\n",
        );
        for (row, unit, less_is_better) in ROWS {
            let (direct, through) = (values(&self.direct, row), values(&self.through, row));
            let unkept = values(&self.unkept, row);
            let note = if less_is_better {
                ""
            } else {
                " (more is better)"
            };
            text.push_str(&format!(
                "| {row} | {unit}{note} | {} | {} | {} | {} | {} |\n",
                cell(&direct),
                cell(&through),
                ratio(&through, &direct),
                cell(&unkept),
                ratio(&through, &unkept)
            ));
        }
        text
    }
}

fn values(samples: &[Sample], row: &str) -> Vec<f64> {
    let mut values: Vec<f64> = samples
        .iter()
        .filter(|s| s.row == row)
        .map(|s| s.value)
        .collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(sorted: &[f64]) -> f64 {
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Of the medians.
fn ratio(one: &[f64], other: &[f64]) -> String {
    let ratio = median(one) / median(other);
    match ratio.is_finite() {
        true => format!("{ratio:.2} ×"),
        false => "–".to_owned(),
    }
}

/// The median, and between which values all rounds lay.
fn cell(sorted: &[f64]) -> String {
    match (sorted.first(), sorted.last()) {
        (Some(least), Some(most)) => format!(
            "{} ({}–{})",
            figure(median(sorted)),
            figure(*least),
            figure(*most)
        ),
        _ => "–".to_owned(),
    }
}

fn figure(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_that_of_the_medians() {
        let mut report = Report::default();
        let row = ROWS[0].0;
        for value in [100.0, 900.0, 110.0] {
            report.direct(vec![Sample { row, value }]);
        }
        for value in [220.0, 200.0, 240.0] {
            report.through(vec![Sample { row, value }]);
        }
        let text = report.markdown();
        assert!(
            text.contains("110 (100–900) | 220 (200–240) | 2.00 ×"),
            "{text}"
        );
    }

    #[test]
    fn a_row_without_samples_has_no_ratio() {
        assert!(Report::default().markdown().contains("| – | – | – |"));
    }
}
