//! Counts by name with a cap: carriers of an identity, lines of a user, lines to a cluster.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// How many of something each name has. Names come from verified certificates only, so the map
/// is bounded by the number of identities that hold something.
#[derive(Clone)]
pub(crate) struct Tally {
    cap: usize,
    counts: Arc<Mutex<HashMap<String, usize>>>,
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
    }
}
