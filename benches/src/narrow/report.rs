//! The figures for people: tables, a picture, and both in the README.

use std::path::Path;

use anyhow::Context;

use super::figures::{Cell, Figures};
use super::ways::Way;
use super::{picture, table};
use crate::report::{described, put};

/// Beside the README that shows it.
const PICTURE: &str = "narrow.svg";

/// One run, with all that its figures depend on.
pub(super) struct Report<'a> {
    pub(super) figures: &'a Figures,
    pub(super) cells: &'a [Cell],
    pub(super) ways: &'a [Way],
    pub(super) rounds: u8,
    pub(super) keystrokes: usize,
    pub(super) gets: usize,
    /// Ways that could not be measured, and why.
    pub(super) left_out: &'a [String],
}

impl Report<'_> {
    /// As "2026-11-25, 2 cores of …, one round".
    pub(super) fn described(&self) -> anyhow::Result<String> {
        let versions = self.ways.iter().map(|way| way.version.as_str());
        let mut versions: Vec<&str> = versions.filter(|version| !version.is_empty()).collect();
        let kubectl = self
            .ways
            .first()
            .map(|way| format!("kubectl {}", way.kubectl.version.label));
        versions.extend(kubectl.as_deref());
        let rounds = match self.rounds {
            1 => "one round".to_owned(),
            more => format!("{more} rounds"),
        };
        let file = "/proc/sys/net/ipv4/tcp_congestion_control";
        let congestion_control = std::fs::read_to_string(file).context(file)?;
        Ok(format!(
            "{}, {rounds} of {} keystrokes and {} commands a cell, TCP's congestion control is {}. {}.",
            described()?,
            self.keystrokes,
            self.gets,
            congestion_control.trim(),
            versions.join("; ")
        ))
    }

    pub(super) fn tables(&self) -> String {
        let mut text = table::tables(self.figures, self.cells, &self.names());
        for ((link, bulk), way, why) in self.figures.failures() {
            text.push_str(&format!("- {way}, {link}, {bulk}: {why}\n"));
        }
        for missing in self.left_out {
            text.push_str(&format!("- Left out: {missing}\n"));
        }
        text
    }

    /// Rewrites the part of the README of this crate about narrow links, and the picture beside it.
    pub(super) fn publish(&self, dir: &Path) -> anyhow::Result<()> {
        picture::draw(&dir.join(PICTURE), self.figures, self.cells, &self.names())?;
        let text = format!(
            "{} dist profile.\n\n**×** is the ratio to the direct way.\n\n![How long a keystroke and a command \
             take]({PICTURE})\n\n{}",
            self.described()?,
            self.tables()
        );
        let readme = dir.join("README.md");
        let old = std::fs::read_to_string(&readme).context("the README of the benches")?;
        std::fs::write(&readme, put(&old, "narrow", &text)?)?;
        Ok(())
    }

    fn names(&self) -> Vec<&'static str> {
        self.ways.iter().map(|way| way.name).collect()
    }
}
