//! Entries by (name, generation), and when the last entry of each name left.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::Notify;
use tokio::time::Instant;

pub(super) struct Table<T> {
    next_generation: u64,
    names: HashMap<String, Slot<T>>,
}

/// One name. It stays after its last entry left, to say when that was; names come from verified
/// certificates only, so there are as many as clusters were enrolled.
struct Slot<T> {
    /// Oldest first: generations only rise.
    entries: Vec<(u64, T)>,
    gone_at: Option<Instant>,
    arrived: Arc<Notify>,
}

pub(super) enum Found<T> {
    /// Newest first.
    Here(Vec<T>),
    GoneAt(Instant),
    Unseen,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self {
            next_generation: 1,
            names: HashMap::new(),
        }
    }
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            gone_at: None,
            arrived: Arc::default(),
        }
    }
}

impl<T: Clone> Table<T> {
    pub(super) fn insert(&mut self, name: &str, entry: T) -> u64 {
        let generation = self.next_generation;
        self.next_generation += 1;
        let slot = self.names.entry(name.to_owned()).or_default();
        slot.entries.push((generation, entry));
        slot.gone_at = None;
        slot.arrived.notify_waiters();
        generation
    }

    pub(super) fn remove(&mut self, name: &str, generation: u64, now: Instant) {
        let Some(slot) = self.names.get_mut(name) else {
            return;
        };
        let before = slot.entries.len();
        slot.entries.retain(|(held, _)| *held != generation);
        if before > 0 && slot.entries.is_empty() {
            slot.gone_at = Some(now);
        }
    }

    pub(super) fn find(&self, name: &str) -> Found<T> {
        match self.names.get(name) {
            Some(slot) if !slot.entries.is_empty() => Found::Here(
                slot.entries
                    .iter()
                    .rev()
                    .map(|(_, entry)| entry.clone())
                    .collect(),
            ),
            Some(Slot {
                gone_at: Some(at), ..
            }) => Found::GoneAt(*at),
            _ => Found::Unseen,
        }
    }

    /// Notified whenever an entry arrives under this name.
    pub(super) fn arrivals(&mut self, name: &str) -> Arc<Notify> {
        Arc::clone(&self.names.entry(name.to_owned()).or_default().arrived)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here(table: &Table<&'static str>, name: &str) -> Vec<&'static str> {
        match table.find(name) {
            Found::Here(entries) => entries,
            Found::GoneAt(_) | Found::Unseen => Vec::new(),
        }
    }

    #[test]
    fn a_late_leave_does_not_evict_the_successor() {
        let mut table = Table::default();
        let old = table.insert("prod", "old");
        let new = table.insert("prod", "new");
        assert!(new > old);
        assert_eq!(here(&table, "prod"), ["new", "old"]);
        table.remove("prod", old, Instant::now());
        table.remove("prod", old, Instant::now());
        assert_eq!(here(&table, "prod"), ["new"]);
    }

    #[test]
    fn a_generation_of_one_name_means_nothing_under_another() {
        let mut table = Table::default();
        let prod = table.insert("prod", "prod");
        table.insert("test", "test");
        table.remove("test", prod, Instant::now());
        assert_eq!(here(&table, "test"), ["test"]);
    }

    #[test]
    fn only_the_last_to_leave_makes_a_name_gone() {
        let mut table = Table::default();
        let at = Instant::now();
        assert!(matches!(table.find("prod"), Found::Unseen));
        let one = table.insert("prod", "one");
        let two = table.insert("prod", "two");
        table.remove("prod", one, at);
        assert!(matches!(table.find("prod"), Found::Here(_)));
        table.remove("prod", two, at);
        assert!(matches!(table.find("prod"), Found::GoneAt(when) if when == at));
        table.insert("prod", "three");
        assert_eq!(here(&table, "prod"), ["three"]);
    }

    #[test]
    fn waiting_alone_does_not_make_a_name_seen() {
        let mut table: Table<&str> = Table::default();
        table.arrivals("prod");
        assert!(matches!(table.find("prod"), Found::Unseen));
    }
}
