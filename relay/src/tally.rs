//! Caps by name: carriers of an identity, lines of a user and to a cluster, bytes of their buffers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntCounter;
use throwline_tunnel::splice::Budget;

/// How many of something each name has. Names come from verified certificates only, so the map
/// is bounded by the number of identities that hold something.
#[derive(Clone)]
pub(crate) struct Tally {
    cap: usize,
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// Budgets by name, for as long as somebody holds one.
#[derive(Clone)]
pub(crate) struct Budgets {
    most: u64,
    /// How often one was used up, counted when its last spender goes.
    denied: IntCounter,
    held: Arc<Mutex<HashMap<String, (Budget, usize)>>>,
}

/// The right to spend of a name's budget; dropping it gives it back.
pub(crate) struct Spender {
    pub(crate) budget: Budget,
    denied: IntCounter,
    held: Arc<Mutex<HashMap<String, (Budget, usize)>>>,
    name: String,
}

impl Budgets {
    /// Of `most` bytes each.
    pub(crate) fn new(most: u64, denied: IntCounter) -> Self {
        Self {
            most,
            denied,
            held: Arc::default(),
        }
    }

    pub(crate) fn of(&self, name: &str) -> Spender {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (budget, spenders) = held
            .entry(name.to_owned())
            .or_insert_with(|| (Budget::new(self.most), 0));
        *spenders += 1;
        Spender {
            budget: budget.clone(),
            denied: self.denied.clone(),
            held: Arc::clone(&self.held),
            name: name.to_owned(),
        }
    }
}

impl Drop for Spender {
    fn drop(&mut self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, spenders)) = held.get_mut(&self.name) {
            *spenders -= 1;
            if *spenders == 0 {
                held.remove(&self.name);
                self.denied.inc_by(self.budget.denied());
            }
        }
    }
}

/// One of them; dropping it gives it back.
pub(crate) struct Share {
    counts: Arc<Mutex<HashMap<String, usize>>>,
    name: String,
}

impl Tally {
    pub(crate) fn new(cap: usize) -> Self {
        Self {
            cap,
            counts: Arc::default(),
        }
    }

    /// `None` when the name has all it may have.
    pub(crate) fn take(&self, name: &str) -> Option<Share> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let held = counts.get(name).copied().unwrap_or(0);
        if held >= self.cap {
            return None;
        }
        counts.insert(name.to_owned(), held + 1);
        Some(Share {
            counts: Arc::clone(&self.counts),
            name: name.to_owned(),
        })
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(held) = counts.get_mut(&self.name) {
            *held -= 1;
            if *held == 0 {
                counts.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_has_its_own_cap() {
        let tally = Tally::new(2);
        let one = tally.take("anna").unwrap();
        let _two = tally.take("anna").unwrap();
        assert!(tally.take("anna").is_none());
        assert!(tally.take("ben").is_some());
        drop(one);
        assert!(tally.take("anna").is_some());
    }

    #[test]
    fn nothing_is_kept_for_names_that_hold_nothing() {
        let tally = Tally::new(2);
        drop(tally.take("anna"));
        assert!(tally.counts.lock().unwrap().is_empty());

        let denied = IntCounter::new("denied", "a test").unwrap();
        let budgets = Budgets::new(2, denied);
        let (one, two) = (budgets.of("anna"), budgets.of("anna"));
        drop(one);
        assert_eq!(budgets.held.lock().unwrap().len(), 1);
        drop(two);
        assert!(budgets.held.lock().unwrap().is_empty());
    }
}
