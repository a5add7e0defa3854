//! The figures for people: a table, a picture, and both in the README.

mod machine;
mod picture;
mod readme;
mod table;

use std::path::Path;

use anyhow::Context;

use crate::rows::{Figures, Group};
use crate::ways::Way;

pub(crate) use machine::described;
pub(crate) use readme::put;
pub(crate) use table::figure;

/// Beside the README that shows it.
const PICTURE: &str = "figures.svg";

/// One run, with all that its figures depend on.
pub(crate) struct Report<'a> {
    pub(crate) figures: &'a Figures,
    pub(crate) ways: &'a [Way],
    pub(crate) rounds: usize,
    /// Ways that could not be measured, and why.
    pub(crate) left_out: &'a [String],
}

impl Report<'_> {
    pub(crate) fn tables(&self) -> String {
        let names: Vec<&str> = self.ways.iter().map(|way| way.name).collect();
        let mut text = String::new();
        for group in Group::ALL {
            text.push_str(&format!("### {}\n\n", group.title()));
            if !group.note().is_empty() {
                text.push_str(&format!("{}\n\n", group.note()));
            }
            text.push_str(&table::table(self.figures, group, &names));
            text.push('\n');
        }
        for (row, way, why) in self.figures.failures() {
            text.push_str(&format!("- {way}, {}: {why}\n", row.name()));
        }
        text
    }

    /// Rewrites the part of the README of this crate about the last run, and the picture beside it.
    pub(crate) fn publish(&self, dir: &Path) -> anyhow::Result<()> {
        let names: Vec<&'static str> = self.ways.iter().map(|way| way.name).collect();
        picture::draw(&dir.join(PICTURE), self.figures, &names)?;
        let versions = self.ways.iter().map(|way| way.version.as_str());
        let versions: Vec<&str> = versions.filter(|version| !version.is_empty()).collect();
        let rounds = match self.rounds {
            1 => "one round".to_owned(),
            more => format!("{more} rounds"),
        };
        let mut text = format!(
            "{}, {}, dist profile. {}.\n\nMedians of the rounds (least–most); **×** is the ratio to the direct \
             way.\n\n![How fast each way is beside the direct one]({PICTURE})\n\n{}",
            machine::described()?,
            rounds,
            versions.join("; "),
            self.tables()
        );
        for missing in self.left_out {
            text.push_str(&format!("- Left out: {missing}\n"));
        }
        let readme = dir.join("README.md");
        let old = std::fs::read_to_string(&readme).context("the README of the benches")?;
        std::fs::write(&readme, put(&old, "figures", &text)?)?;
        Ok(())
    }
}
