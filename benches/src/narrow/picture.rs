//! A picture of the times: for each cell a bar a way, for keystrokes to the left and for commands to
//! the right.

use std::path::Path;

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::figures::{Cell, Figures, Measure};

const WIDTH: u32 = 960;
const BAR: i32 = 7;
const GAP: i32 = 8;
const HEAD: i32 = 78;
const FOOT: i32 = 30;
/// Where the names of links and of bulk end, from the left.
const LINK: i32 = 168;
const BULK: i32 = 268;

/// Distinct for people who see fewer colours, too (Okabe and Ito); ours is the last.
const COLOURS: [RGBColor; 3] = [
    RGBColor(153, 153, 153),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
];
const INK: RGBColor = RGBColor(40, 40, 40);
const FAINT: RGBColor = RGBColor(215, 215, 215);

/// Bars on a logarithmic axis, in ms.
struct Panel {
    title: &'static str,
    bar: Measure,
    /// A line from the bar's end.
    tail: Option<Measure>,
    /// From the left of the picture.
    from: i32,
    to: i32,
    least: f64,
    most: f64,
    ticks: &'static [f64],
}

const PANELS: [Panel; 2] = [
    Panel {
        title: "a keystroke's echo: p50, line to p99",
        bar: Measure::Echo(50),
        tail: Some(Measure::Echo(99)),
        from: 280,
        to: 640,
        least: 0.3,
        most: 10_000.0,
        ticks: &[1.0, 10.0, 100.0, 1_000.0, 10_000.0],
    },
    Panel {
        title: "kubectl get --raw /version: p50",
        bar: Measure::Get,
        tail: None,
        from: 680,
        to: 930,
        least: 50.0,
        most: 10_000.0,
        ticks: &[100.0, 1_000.0, 10_000.0],
    },
];

/// Draws all cells for which there is a value.
pub(super) fn draw(
    file: &Path,
    figures: &Figures,
    cells: &[Cell],
    ways: &[&'static str],
) -> anyhow::Result<()> {
    let has_any = |cell: &&Cell| {
        let mut ways = ways.iter();
        ways.any(|way| figures.value(**cell, way, Measure::Get).is_some())
    };
    let cells: Vec<Cell> = cells.iter().filter(has_any).copied().collect();
    let step = BAR * i32::try_from(ways.len())? + GAP;
    let bottom = HEAD + step * i32::try_from(cells.len())?;
    let height = u32::try_from(bottom + FOOT)?;
    let root = SVGBackend::new(file, (WIDTH, height)).into_drawing_area();
    paint(&root, figures, &cells, ways, (step, bottom))
        .map_err(|error| anyhow!("the picture could not be drawn: {error}"))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Painted = Result<(), Box<dyn std::error::Error>>;

fn paint(
    root: &Area<'_>,
    figures: &Figures,
    cells: &[Cell],
    ways: &[&'static str],
    (step, bottom): (i32, i32),
) -> Painted {
    root.fill(&WHITE)?;
    let title = "Beside bulk on the link of a user's machine, in ms (shorter: better)";
    root.draw_text(title, &text(17, HPos::Left), (16, 22))?;
    let mut x = 16;
    for (way, colour) in ways.iter().zip(colours(ways)) {
        root.draw(&Rectangle::new([(x, 40), (x + 12, 50)], colour.filled()))?;
        root.draw_text(way, &text(13, HPos::Left), (x + 18, 45))?;
        x += 150;
    }
    let mut last = None;
    for (index, (link, bulk)) in cells.iter().enumerate() {
        let middle = HEAD + step * i32::try_from(index)? + step / 2;
        // Once for each link.
        if last.replace(*link) != Some(*link) {
            root.draw_text(&link.to_string(), &text(11, HPos::Right), (LINK, middle))?;
            let y = middle - step / 2;
            let line = [(16, y), (PANELS[1].to, y)];
            root.draw(&PathElement::new(line, FAINT.stroke_width(1)))?;
        }
        root.draw_text(&bulk.to_string(), &text(11, HPos::Right), (BULK, middle))?;
    }
    for panel in &PANELS {
        panel.paint(root, figures, cells, ways, (step, bottom))?;
    }
    root.present()?;
    Ok(())
}

impl Panel {
    fn paint(
        &self,
        root: &Area<'_>,
        figures: &Figures,
        cells: &[Cell],
        ways: &[&'static str],
        (step, bottom): (i32, i32),
    ) -> Painted {
        root.draw_text(self.title, &text(12, HPos::Left), (self.from, HEAD - 14))?;
        for tick in self.ticks {
            let x = self.place(*tick);
            let line = [(x, HEAD), (x, bottom)];
            root.draw(&PathElement::new(line, FAINT.stroke_width(1)))?;
            root.draw_text(&tick.to_string(), &text(12, HPos::Center), (x, bottom + 14))?;
        }
        for (index, cell) in cells.iter().enumerate() {
            let top = HEAD + step * i32::try_from(index)? + GAP / 2;
            for (place_in_row, (way, colour)) in ways.iter().zip(colours(ways)).enumerate() {
                let Some(value) = figures.value(*cell, way, self.bar) else {
                    continue;
                };
                let y = top + BAR * i32::try_from(place_in_row)?;
                let end = self.place(value);
                let bar = [(self.from, y), (end, y + BAR - 1)];
                root.draw(&Rectangle::new(bar, colour.filled()))?;
                let tail = self.tail.and_then(|tail| figures.value(*cell, way, tail));
                if let Some(tail) = tail {
                    let y = y + BAR / 2;
                    let line = [(end, y), (self.place(tail), y)];
                    root.draw(&PathElement::new(line, colour.stroke_width(1)))?;
                }
            }
        }
        Ok(())
    }

    fn place(&self, value: f64) -> i32 {
        let share =
            (value.clamp(self.least, self.most) / self.least).ln() / (self.most / self.least).ln();
        self.from + (share * f64::from(self.to - self.from)).round() as i32
    }
}

fn text(size: i32, at: HPos) -> TextStyle<'static> {
    let style = TextStyle::from(("sans-serif", size).into_font()).color(&INK);
    style.pos(Pos::new(at, VPos::Center))
}

/// The last way has the last colour.
fn colours(ways: &[&'static str]) -> impl Iterator<Item = RGBColor> {
    let skipped = COLOURS.len().saturating_sub(ways.len());
    COLOURS.into_iter().skip(skipped)
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{CELL, sample};
    use super::*;
    use crate::rows::DIRECT;

    #[test]
    fn the_axes_hold_every_time() {
        for panel in &PANELS {
            assert_eq!(panel.place(0.0001), panel.from);
            assert_eq!(panel.place(1e9), panel.to);
            assert!(panel.place(200.0) < panel.place(2_000.0));
        }
    }

    #[test]
    fn a_picture_names_its_links_and_ways() {
        let mut figures = Figures::default();
        figures.add(CELL, DIRECT, sample(1));
        figures.add(CELL, "ours", sample(2));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("narrow.svg");
        draw(&file, &figures, &[CELL], &[DIRECT, "ours"]).unwrap();
        let svg = std::fs::read_to_string(file).unwrap();
        for part in ["20 Mbit/s, 1 % loss", "exec ↓", "ours"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
    }
}
