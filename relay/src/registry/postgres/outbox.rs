//! The tunnels of this relay, and those of them for which the database has not the present state. No I/O.

use std::collections::{BTreeMap, BTreeSet};

use super::notice::Row;

/// Writes made in one transaction, so that a storm of agents makes few of them.
const BATCH: usize = 500;

#[derive(Default)]
pub(super) struct Outbox {
    live: BTreeMap<i64, Row>,
    to_insert: BTreeSet<i64>,
    to_delete: BTreeSet<i64>,
    draining: bool,
    draining_owed: bool,
}

/// What is to be written next.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) inserts: Vec<Row>,
    pub(super) deletes: Vec<i64>,
    pub(super) draining: bool,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.inserts.is_empty() && self.deletes.is_empty() && !self.draining
    }
}

impl Outbox {
    pub(super) fn join(&mut self, row: Row) {
        self.to_insert.insert(row.carrier);
        self.live.insert(row.carrier, row);
    }

    pub(super) fn leave(&mut self, carrier: i64) {
        if self.live.remove(&carrier).is_none() {
            return;
        }
        self.to_insert.remove(&carrier);
        // Owed even if it seems unwritten: a commit may have succeeded without our hearing so.
        self.to_delete.insert(carrier);
    }

    pub(super) fn drain(&mut self) {
        self.draining = true;
        self.draining_owed = true;
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining
    }

    /// The next writes; they stay owed until [`done`](Self::done).
    pub(super) fn next(&self) -> Batch {
        Batch {
            inserts: self
                .to_insert
                .iter()
                .take(BATCH)
                .filter_map(|carrier| self.live.get(carrier).cloned())
                .collect(),
            deletes: self.to_delete.iter().take(BATCH).copied().collect(),
            draining: self.draining_owed,
        }
    }

    pub(super) fn done(&mut self, batch: &Batch) {
        for row in &batch.inserts {
            self.to_insert.remove(&row.carrier);
        }
        for carrier in &batch.deletes {
            self.to_delete.remove(carrier);
        }
        self.draining_owed &= !batch.draining;
    }

    /// The database has forgotten this relay: every live tunnel is owed, and nothing else.
    pub(super) fn forgotten(&mut self) {
        self.to_insert = self.live.keys().copied().collect();
        self.to_delete.clear();
        self.draining_owed = self.draining;
    }

    pub(super) fn owed(&self) -> usize {
        self.to_insert.len() + self.to_delete.len() + usize::from(self.draining_owed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(carrier: i64) -> Row {
        Row {
            carrier,
            cluster: "prod".into(),
            agent_instance: String::new(),
            since: 0,
            certificate: String::new(),
            bulk: false,
        }
    }

    #[test]
    fn a_write_is_owed_until_it_is_done() {
        let mut outbox = Outbox::default();
        outbox.join(row(1));
        let batch = outbox.next();
        assert_eq!(batch.inserts, [row(1)]);
        assert_eq!(outbox.next(), batch);
        // It left while the write was under way: then its removal is owed.
        outbox.leave(1);
        outbox.done(&batch);
        assert_eq!(outbox.next().deletes, [1]);
        let batch = outbox.next();
        outbox.done(&batch);
        assert!(outbox.next().is_empty());
        outbox.leave(1);
        assert_eq!(outbox.owed(), 0);
    }

    #[test]
    fn who_was_forgotten_owes_all_that_lives() {
        let mut outbox = Outbox::default();
        for carrier in 0..3 {
            outbox.join(row(carrier));
        }
        let batch = outbox.next();
        outbox.done(&batch);
        outbox.leave(0);
        outbox.drain();
        outbox.forgotten();
        let batch = outbox.next();
        assert_eq!(batch.inserts, [row(1), row(2)]);
        assert!(batch.deletes.is_empty() && batch.draining);
    }

    #[test]
    fn a_storm_is_written_in_batches() {
        let mut outbox = Outbox::default();
        for carrier in 0..1_200 {
            outbox.join(row(carrier));
        }
        let mut batches = 0;
        while outbox.owed() > 0 {
            let batch = outbox.next();
            outbox.done(&batch);
            batches += 1;
        }
        assert_eq!(batches, 3);
    }
}
