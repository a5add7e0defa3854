//! A Markdown table of one group of rows.

use crate::rows::{Better, Figures, Group, Row};

pub(super) fn table(figures: &Figures, group: Group, ways: &[&'static str]) -> String {
    // A way without one figure in the group has no place in its table.
    let has_any =
        |way: &&&'static str| Row::of(group).any(|row| figures.spread(row, way).is_some());
    let ways: Vec<&'static str> = ways.iter().filter(has_any).copied().collect();
    let mut text = String::from("| row | unit |");
    for way in &ways {
        text.push_str(&format!(" {way} |"));
    }
    text.push_str("\n|---|---|");
    text.push_str(&"---|".repeat(ways.len()));
    text.push('\n');
    for row in Row::of(group) {
        let more = match row.better() {
            Better::Less => "",
            Better::More => " ↑",
        };
        text.push_str(&format!("| {} | {}{more} |", row.name(), row.unit()));
        for way in &ways {
            text.push_str(&format!(" {} |", cell(figures, row, way)));
        }
        text.push('\n');
    }
    text
}

/// The median, between which values all rounds lay, and the ratio to the direct way.
fn cell(figures: &Figures, row: Row, way: &'static str) -> String {
    let Some(spread) = figures.spread(row, way) else {
        return "–".to_owned();
    };
    let mut text = figure(spread.median);
    if spread.least != spread.most {
        text.push_str(&format!(
            " ({}–{})",
            figure(spread.least),
            figure(spread.most)
        ));
    }
    if let Some(ratio) = figures.ratio(row, way) {
        text.push_str(&format!(", **{ratio:.2} ×**"));
    }
    text
}

/// With as many digits as mean something.
pub(crate) fn figure(value: f64) -> String {
    if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::DIRECT;

    #[test]
    fn a_cell_has_median_spread_and_ratio() {
        let mut figures = Figures::default();
        for value in [1000.0, 1100.0, 1300.0] {
            figures.add(Row::Upload, DIRECT, value);
        }
        figures.add(Row::Upload, "ssh", 550.0);
        let text = table(&figures, Group::Near, &[DIRECT, "ssh", "absent"]);
        assert!(text.starts_with("| row | unit | direct | ssh |\n|---|---|---|---|\n"));
        let row = "| bulk upload, one connection | MB/s ↑ | 1100 (1000–1300) | 550, **0.50 ×** |\n";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| – | – |"), "{text}");
    }
}
