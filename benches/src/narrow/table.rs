//! Markdown tables: one a group of measures, with a row a cell and a column a way.

use super::bulk::Bulk;
use super::figures::{Cell, ECHOES, Figures, Measure};
use crate::report::figure;

/// A title, and what a field of the table has, one beside the other.
const TABLES: [(&str, &[Measure]); 3] = [
    ("A keystroke's echo, in ms: p50 / p90 / p99", &ECHOES),
    (
        "`kubectl get --raw /version`, the whole command, in ms: p50",
        &[Measure::Get],
    ),
    ("The bulk transfer itself, in Mbit/s ↑", &[Measure::Rate]),
];

pub(super) fn tables(figures: &Figures, cells: &[Cell], ways: &[&'static str]) -> String {
    let mut text = String::new();
    for (title, measures) in TABLES {
        let has_any = |cell: &&Cell| {
            let mut ways = ways.iter();
            ways.any(|way| !fields(figures, **cell, way, measures).is_empty())
        };
        let cells: Vec<Cell> = cells
            .iter()
            .filter(|(_, bulk)| measures != [Measure::Rate] || *bulk != Bulk::None)
            .filter(has_any)
            .copied()
            .collect();
        if cells.is_empty() {
            continue;
        }
        text.push_str(&format!("### {title}\n\n| link | bulk |"));
        for way in ways {
            text.push_str(&format!(" {way} |"));
        }
        text.push_str(&format!("\n|---|---|{}\n", "---|".repeat(ways.len())));
        for cell in cells {
            text.push_str(&format!("| {} | {} |", cell.0, cell.1));
            for way in ways {
                let field = match fields(figures, cell, way, measures) {
                    none if none.is_empty() => "–".to_owned(),
                    some => some,
                };
                text.push_str(&format!(" {field} |"));
            }
            text.push('\n');
        }
        text.push('\n');
    }
    text
}

/// The values, and their ratios to the direct way's. Empty where there is none.
fn fields(figures: &Figures, cell: Cell, way: &'static str, measures: &[Measure]) -> String {
    let measures = measures.iter();
    let values: Vec<String> = measures
        .clone()
        .filter_map(|measure| figures.value(cell, way, *measure))
        .map(figure)
        .collect();
    let mut text = values.join(" / ");
    let ratios: Vec<String> = measures
        .filter_map(|measure| figures.ratio(cell, way, *measure))
        .map(|ratio| format!("{ratio:.2} ×"))
        .collect();
    if !ratios.is_empty() {
        text.push_str(&format!(", **{}**", ratios.join(" / ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{CELL, sample};
    use super::*;
    use crate::rows::DIRECT;

    #[test]
    fn a_field_has_percentiles_and_ratios() {
        let mut figures = Figures::default();
        figures.add(CELL, DIRECT, sample(1));
        figures.add(CELL, "ours", sample(2));
        let text = tables(&figures, &[CELL], &[DIRECT, "ssh", "ours"]);
        let head = "| link | bulk | direct | ssh | ours |\n|---|---|---|---|---|\n";
        assert!(text.contains(head), "{text}");
        let row = "| 20 Mbit/s, 1 % loss | exec ↓ | 51.0 / 91.0 / 100 | – | 102 / 182 / 200, \
                   **2.00 × / 2.00 × / 2.00 ×** |\n";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| 1.00 | – | 2.00, **2.00 ×** |"), "{text}");
    }

    #[test]
    fn a_table_without_a_figure_is_left_out() {
        let mut figures = Figures::default();
        let idle = (CELL.0, Bulk::None);
        let mut sample = sample(1);
        sample.rates.clear();
        figures.add(idle, DIRECT, sample);
        let text = tables(&figures, &[idle], &[DIRECT]);
        assert!(
            text.contains("echo") && !text.contains("bulk transfer"),
            "{text}"
        );
    }
}
