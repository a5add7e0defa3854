//! What a run is asked for, and so which links and bulk transfers it measures.

use anyhow::ensure;

use super::bulk::Bulk;
use super::cell::Sizes;
use super::figures::Cell;
use super::link::Link;
use super::ways::NAMES;
use crate::rows::DIRECT;

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Options {
    /// A short run on one link, to see that everything measures; its figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// How many times each cell is measured.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=20))]
    pub(super) rounds: u8,
    /// Leave README.md and its picture as they are.
    #[arg(long)]
    dry: bool,
    /// Also cp and port-forward on all links, not on those of 20 Mbit/s without loss alone.
    #[arg(long)]
    all: bool,
    /// Measure only the link of this name, or all whose name has this in it, e.g. "1 % loss". Implies
    /// --dry.
    #[arg(long)]
    link: Option<String>,
    /// The same for bulk transfers, e.g. "exec" or "none". Implies --dry.
    #[arg(long)]
    bulk: Option<String>,
    /// Measure only this way beside the direct one, e.g. "Throwline". Implies --dry.
    #[arg(long)]
    only: Option<String>,
    /// TCP's congestion control in the namespaces, e.g. "cubic". By default the machine's.
    #[arg(long)]
    pub(super) congestion_control: Option<String>,
}

impl Options {
    pub(super) fn sizes(&self) -> Sizes {
        match self.quick {
            true => Sizes::QUICK,
            false => Sizes::FULL,
        }
    }

    pub(super) fn is_published(&self) -> bool {
        let is_part = self.link.is_some() || self.bulk.is_some() || self.only.is_some();
        !self.quick && !self.dry && !is_part
    }

    /// The cells to measure, all of a link together.
    ///
    /// # Errors
    /// A filter that nothing passes.
    pub(super) fn cells(&self) -> anyhow::Result<Vec<Cell>> {
        let mut links = chosen(Link::all(), self.link.as_deref());
        if self.quick && self.link.is_none() {
            links.truncate(1);
        }
        let bulks = chosen(Bulk::ALL.to_vec(), self.bulk.as_deref());
        let mut cells = Vec::new();
        for link in links {
            let wanted = bulks.iter().filter(|bulk| self.is_wanted(link, **bulk));
            cells.extend(wanted.map(|bulk| (link, *bulk)));
        }
        ensure!(
            !cells.is_empty(),
            "no link and bulk transfer have that name; there are: {}; {}",
            listed(&Link::all()),
            listed(&Bulk::ALL)
        );
        Ok(cells)
    }

    fn is_wanted(&self, link: Link, bulk: Bulk) -> bool {
        let is_ordinary = link.mbit == 20 && !link.is_lossy && !link.is_far && !self.quick;
        self.all || self.bulk.is_some() || is_ordinary || bulk.is_of_every_link()
    }

    /// # Errors
    /// There is no such way.
    pub(super) fn ways(&self) -> anyhow::Result<Vec<&'static str>> {
        let is_wanted = |name: &&'static str| match &self.only {
            Some(only) => *name == DIRECT || name == only,
            None => true,
        };
        let ways: Vec<&'static str> = NAMES.into_iter().filter(is_wanted).collect();
        let is_found = self
            .only
            .as_ref()
            .is_none_or(|only| NAMES.contains(&&**only));
        ensure!(
            is_found,
            "no way has that name; there are: {}",
            NAMES.join(", ")
        );
        Ok(ways)
    }
}

/// The one of that name, else those whose name has the filter in it.
fn chosen<T: ToString>(mut all: Vec<T>, filter: Option<&str>) -> Vec<T> {
    if let Some(filter) = filter {
        let is_one = all.iter().any(|one| one.to_string() == filter);
        all.retain(|one| match is_one {
            true => one.to_string() == filter,
            false => one.to_string().contains(filter),
        });
    }
    all
}

fn listed<T: ToString>(all: &[T]) -> String {
    let names: Vec<String> = all
        .iter()
        .map(|one| format!("\"{}\"", one.to_string()))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        options: Options,
    }

    fn options(arguments: &[&str]) -> Options {
        let arguments = ["narrow"].iter().chain(arguments);
        Only::try_parse_from(arguments).unwrap().options
    }

    #[test]
    fn exec_is_measured_on_all_links_and_the_rest_on_one() {
        let cells = options(&[]).cells().unwrap();
        assert_eq!(cells.len(), 12 * 3 + 4);
        assert_eq!(options(&["--all"]).cells().unwrap().len(), 12 * 7);
        assert_eq!(options(&["--quick"]).cells().unwrap().len(), 3);
    }

    #[test]
    fn a_name_is_that_link_and_a_part_of_it_are_several() {
        let links = |filter| {
            let cells = options(&["--bulk", "none", "--link", filter]).cells();
            cells.map(|cells| cells.len()).unwrap_or(0)
        };
        assert_eq!(links("5 Mbit/s"), 1);
        assert_eq!(links("1 % loss"), 6);
        assert_eq!(links("1 % loss, 40 ms"), 3);
        assert_eq!(links("modem"), 0);
    }

    #[test]
    fn only_a_whole_run_is_published() {
        assert!(options(&[]).is_published());
        for part in [
            &["--dry"][..],
            &["--quick"],
            &["--bulk", "exec"],
            &["--link", "5 Mbit/s"],
            &["--only", "Throwline"],
        ] {
            assert!(!options(part).is_published(), "{part:?}");
        }
    }

    #[test]
    fn the_direct_way_is_always_measured() {
        assert_eq!(
            options(&["--only", "Throwline"]).ways().unwrap(),
            [DIRECT, "Throwline"]
        );
        assert!(options(&["--only", "telnet"]).ways().is_err());
    }
}
