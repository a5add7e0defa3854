//! Limits for each key: carriers of an identity, lines of a user and to a cluster, bytes of their buffers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::IntCounter;
use throwline_tunnel::splice::Budget;

/// How many units each name holds, up to one limit for all. Names come from verified certificates only, so the map
/// is bounded by the number of identities that hold something.
#[derive(Clone)]
pub(crate) struct KeyedLimit {
    cap: usize,
    counts: Arc<Mutex<HashMap<String, usize>>>,
}

/// A budget for each name, for as long as a permit of it is held.
#[derive(Clone)]
pub(crate) struct KeyedBudget {
    most: u64,
    /// How often a budget was used up, counted when its last permit is dropped.
    denied: IntCounter,
    held: Arc<Mutex<HashMap<String, (Budget, usize)>>>,
}

/// The right to use a name's budget. The budget lasts until its last permit is dropped.
pub(crate) struct BudgetPermit {
    pub(crate) budget: Budget,
    denied: IntCounter,
    held: Arc<Mutex<HashMap<String, (Budget, usize)>>>,
    name: String,
}

impl KeyedBudget {
    /// Of `most` bytes each.
    pub(crate) fn new(most: u64, denied: IntCounter) -> Self {
        Self {
            most,
            denied,
            held: Arc::default(),
        }
    }

    pub(crate) fn of(&self, name: &str) -> BudgetPermit {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (budget, spenders) = held
            .entry(name.to_owned())
            .or_insert_with(|| (Budget::new(self.most), 0));
        *spenders += 1;
        BudgetPermit {
            budget: budget.clone(),
            denied: self.denied.clone(),
            held: Arc::clone(&self.held),
            name: name.to_owned(),
        }
    }
}

impl Drop for BudgetPermit {
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

/// One unit; dropping it gives it back.
pub(crate) struct Permit {
    counts: Arc<Mutex<HashMap<String, usize>>>,
    name: String,
}

impl KeyedLimit {
    pub(crate) fn new(cap: usize) -> Self {
        Self {
            cap,
            counts: Arc::default(),
        }
    }

    /// `None` when the name holds as many as it may.
    pub(crate) fn take(&self, name: &str) -> Option<Permit> {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let held = counts.get(name).copied().unwrap_or(0);
        if held >= self.cap {
            return None;
        }
        counts.insert(name.to_owned(), held + 1);
        Some(Permit {
            counts: Arc::clone(&self.counts),
            name: name.to_owned(),
        })
    }
}

impl Drop for Permit {
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
        let tally = KeyedLimit::new(2);
        let one = tally.take("anna").unwrap();
        let _two = tally.take("anna").unwrap();
        assert!(tally.take("anna").is_none());
        assert!(tally.take("ben").is_some());
        drop(one);
        assert!(tally.take("anna").is_some());
    }

    #[test]
    fn nothing_is_kept_for_names_that_hold_nothing() {
        let tally = KeyedLimit::new(2);
        drop(tally.take("anna"));
        assert!(tally.counts.lock().unwrap().is_empty());

        let denied = IntCounter::new("denied", "a test").unwrap();
        let budgets = KeyedBudget::new(2, denied);
        let (one, two) = (budgets.of("anna"), budgets.of("anna"));
        drop(one);
        assert_eq!(budgets.held.lock().unwrap().len(), 1);
        drop(two);
        assert!(budgets.held.lock().unwrap().is_empty());
    }
}
