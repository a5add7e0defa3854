//! A picture of the ratios: for each row a bar a way, as long as it is faster or slower than the
//! direct one.

use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::rows::{Better, DIRECT, Figures, Group, Row};

const WIDTH: u32 = 960;
const BAR: i32 = 9;
const GAP: i32 = 10;
const HEAD: i32 = 64;
const FOOT: i32 = 34;
/// Where bars may be, from the left.
const FROM: i32 = 330;
const TO: i32 = 930;
/// The axis: from a twentieth of the direct speed to eight times of it.
const SLOWEST: f64 = 0.05;
const FASTEST: f64 = 8.0;
const TICKS: [(f64, &str); 8] = [
    (0.05, "0.05 ×"),
    (0.1, "0.1 ×"),
    (0.2, "0.2 ×"),
    (0.5, "0.5 ×"),
    (1.0, "as direct"),
    (2.0, "2 ×"),
    (4.0, "4 ×"),
    (8.0, "8 ×"),
];
/// Distinct for people who see fewer colours, too (Okabe and Ito); ours is the last.
const COLOURS: [RGBColor; 5] = [
    RGBColor(153, 153, 153),
    RGBColor(86, 180, 233),
    RGBColor(0, 158, 115),
    RGBColor(230, 159, 0),
    RGBColor(213, 94, 0),
];
const INK: RGBColor = RGBColor(40, 40, 40);
const FAINT: RGBColor = RGBColor(215, 215, 215);

/// Draws what is compared with the direct way, of all rows for which there is a ratio.
pub(super) fn draw(file: &Path, figures: &Figures, ways: &[&'static str]) -> anyhow::Result<()> {
    let ways: Vec<&'static str> = ways.iter().filter(|way| **way != DIRECT).copied().collect();
    let rows: Vec<Row> = [Group::Near, Group::Far]
        .into_iter()
        .flat_map(Row::of)
        .filter(|row| ways.iter().any(|way| figures.ratio(*row, way).is_some()))
        .collect();
    let step = BAR * i32::try_from(ways.len())? + GAP;
    let bottom = HEAD + step * i32::try_from(rows.len())?;
    let height = u32::try_from(bottom + FOOT)?;
    paint(file, figures, &ways, &rows, (step, bottom, height))
        .map_err(|error| anyhow!("the picture could not be drawn: {error}"))
}

type Painted = Result<(), Box<dyn std::error::Error>>;

fn paint(
    file: &Path,
    figures: &Figures,
    ways: &[&'static str],
    rows: &[Row],
    (step, bottom, height): (i32, i32, u32),
) -> Painted {
    let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let text = |size: i32, at: HPos| {
        let style = TextStyle::from(("sans-serif", size).into_font()).color(&INK);
        style.pos(Pos::new(at, VPos::Center))
    };
    let title = "Speed beside a direct connection (to the right: faster)";
    root.draw_text(title, &text(17, HPos::Left), (16, 22))?;
    let mut x = FROM;
    let each = (TO - FROM) / i32::try_from(ways.len().max(1))?;
    for (way, colour) in ways.iter().zip(colours(ways)) {
        let mark = Rectangle::new([(x, 40), (x + 12, 50)], colour.filled());
        root.draw(&mark)?;
        root.draw_text(way, &text(13, HPos::Left), (x + 18, 45))?;
        x += each.min(150);
    }
    for (value, label) in TICKS {
        let x = place(value);
        let line = [(x, HEAD), (x, bottom)];
        let ink = if value == 1.0 { INK } else { FAINT };
        root.draw(&PathElement::new(line, ink.stroke_width(1)))?;
        root.draw_text(label, &text(12, HPos::Center), (x, bottom + 14))?;
    }
    for (index, row) in rows.iter().enumerate() {
        let top = HEAD + step * i32::try_from(index)? + GAP / 2;
        let middle = top + (step - GAP) / 2;
        let far = match row.group() {
            Group::Far => "WAN: ",
            _ => "",
        };
        let name = format!("{far}{}", row.name().replace('`', ""));
        root.draw_text(&name, &text(12, HPos::Right), (FROM - 12, middle))?;
        let bars = ways.iter().zip(colours(ways)).enumerate();
        for (place_in_row, (way, colour)) in bars {
            let Some(ratio) = figures.ratio(*row, way) else {
                continue;
            };
            let speed = match row.better() {
                Better::More => ratio,
                Better::Less => 1.0 / ratio,
            };
            let y = top + BAR * i32::try_from(place_in_row)?;
            let bar = [(place(1.0), y), (place(speed), y + BAR - 1)];
            root.draw(&Rectangle::new(bar, colour.filled()))?;
        }
    }
    root.present()?;
    Ok(())
}

/// The last way has the last colour.
fn colours(ways: &[&'static str]) -> impl Iterator<Item = RGBColor> {
    let skipped = COLOURS.len().saturating_sub(ways.len());
    COLOURS.into_iter().skip(skipped)
}

/// Where a ratio lies, on a logarithmic axis.
fn place(value: f64) -> i32 {
    let share = (value.clamp(SLOWEST, FASTEST) / SLOWEST).ln() / (FASTEST / SLOWEST).ln();
    FROM + (share * f64::from(TO - FROM)).round() as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_axis_holds_every_ratio() {
        assert_eq!(place(SLOWEST), FROM);
        assert_eq!(place(0.0001), FROM);
        assert_eq!(place(FASTEST), TO);
        assert!(place(1.0) > place(0.5) && place(1.0) < place(2.0));
    }

    #[test]
    fn ours_is_the_last_colour_of_as_many_as_there_are_ways() {
        let ours = COLOURS[COLOURS.len() - 1];
        for count in 1..=COLOURS.len() {
            let all: Vec<RGBColor> = colours(&vec!["way"; count]).collect();
            assert_eq!((all.len(), all[count - 1]), (count, ours));
        }
        // A way without a colour would have no bar.
        assert!(crate::ways::NAMES.len() - 1 <= COLOURS.len());
    }

    #[test]
    fn a_picture_names_its_rows_and_ways() {
        let mut figures = Figures::default();
        figures.add(Row::Upload, DIRECT, 100.0);
        figures.add(Row::Upload, "ours", 50.0);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("figures.svg");
        draw(&file, &figures, &[DIRECT, "ours"]).unwrap();
        let svg = std::fs::read_to_string(file).unwrap();
        assert!(
            svg.contains(Row::Upload.name()) && svg.contains("ours"),
            "{svg}"
        );
        assert!(!svg.contains(Row::Fresh.name()));
    }
}
