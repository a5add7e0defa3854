//! Bytes of buffer that many holders share, so that all of them together are bounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of buffer that many holders share. Clones are the same budget.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Account>);

#[derive(Debug)]
struct Account {
    most: u64,
    used: AtomicU64,
    denied: AtomicU64,
    /// What is taken here is taken there as well.
    parent: Option<Budget>,
}

impl Budget {
    /// Of at most this many bytes.
    pub fn new(most: u64) -> Self {
        Self::within(most, None)
    }

    /// A part of this one, of at most `most` bytes: what it takes counts in both.
    #[must_use]
    pub fn part(&self, most: u64) -> Self {
        Self::within(most, Some(self.clone()))
    }

    fn within(most: u64, parent: Option<Self>) -> Self {
        Self(Arc::new(Account {
            most,
            used: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            parent,
        }))
    }

    /// Bytes held now.
    pub fn used(&self) -> u64 {
        self.0.used.load(Ordering::Relaxed)
    }

    /// How often it was used up when it was asked for bytes.
    pub fn denied(&self) -> u64 {
        self.0.denied.load(Ordering::Relaxed)
    }

    /// `bytes` of it, until the grant is dropped; `None` if less is left here or in what this is a
    /// part of.
    pub fn take(&self, bytes: u64) -> Option<Grant> {
        if !self.charge(bytes) {
            return None;
        }
        let mut charged = self;
        while let Some(parent) = &charged.0.parent {
            if !parent.charge(bytes) {
                self.release_to(parent, bytes);
                return None;
            }
            charged = parent;
        }
        Some(Grant {
            budget: self.clone(),
            bytes,
        })
    }

    fn charge(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.0.most);
        let used = &self.0.used;
        let charged = used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .is_ok();
        if !charged {
            self.0.denied.fetch_add(1, Ordering::Relaxed);
        }
        charged
    }

    /// Gives bytes back to this budget and to those above it, up to `end`, which has not been charged.
    fn release_to(&self, end: &Self, bytes: u64) {
        let mut next = Some(self);
        while let Some(budget) = next
            && !Arc::ptr_eq(&budget.0, &end.0)
        {
            budget.0.used.fetch_sub(bytes, Ordering::Relaxed);
            next = budget.0.parent.as_ref();
        }
    }
}

/// A part of a budget; dropping it gives it back.
#[derive(Debug)]
pub struct Grant {
    budget: Budget,
    bytes: u64,
}

impl Grant {
    /// The size of the grant in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut next = Some(&self.budget);
        while let Some(budget) = next {
            budget.0.used.fetch_sub(self.bytes, Ordering::Relaxed);
            next = budget.0.parent.as_ref();
        }
    }
}

/// A part of one budget for each name, for as long as it is in use. Names are those of verified
/// identities, so there are as many entries as identities that hold something, and as many again.
#[derive(Debug, Clone)]
pub struct Budgets {
    whole: Budget,
    each: u64,
    parts: Arc<Mutex<HashMap<String, Weak<Account>>>>,
}

impl Budgets {
    /// Parts of `each` bytes at most of a budget of `whole` bytes.
    pub fn new(whole: u64, each: u64) -> Self {
        Self {
            whole: Budget::new(whole),
            each,
            parts: Arc::default(),
        }
    }

    /// What all names share.
    pub fn whole(&self) -> &Budget {
        &self.whole
    }

    /// The part of this name.
    pub fn of(&self, name: &str) -> Budget {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = parts.get(name).and_then(Weak::upgrade) {
            return Budget(account);
        }
        // Amortised: a sweep happens only when the map would grow.
        if parts.len() == parts.capacity() {
            parts.retain(|_, account| account.strong_count() > 0);
        }
        let part = self.whole.part(self.each);
        parts.insert(name.to_owned(), Arc::downgrade(&part.0));
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_counts_in_the_whole_and_gives_back_to_both() {
        let whole = Budget::new(100);
        let (anna, ben) = (whole.part(80), whole.part(80));
        let held = anna.take(80).unwrap();
        assert_eq!((anna.used(), whole.used(), held.bytes()), (80, 80, 80));
        assert!(anna.take(1).is_none(), "anna's part is used up");
        // The whole denies, and ben's part is as it was.
        assert!(ben.take(21).is_none());
        assert_eq!((ben.used(), whole.used()), (0, 80));
        let rest = ben.take(20).unwrap();
        drop(held);
        assert_eq!((anna.used(), ben.used(), whole.used()), (0, 20, 20));
        drop(rest);
        assert_eq!(whole.used(), 0);
        assert_eq!((anna.denied(), ben.denied(), whole.denied()), (1, 0, 1));
    }

    #[test]
    fn no_amount_overflows() {
        let whole = Budget::new(u64::MAX);
        let _most = whole.take(u64::MAX).unwrap();
        assert!(whole.take(1).is_none());
    }

    #[test]
    fn a_name_has_one_part_while_it_is_in_use_and_costs_nothing_after() {
        let budgets = Budgets::new(100, 60);
        let anna = budgets.of("anna");
        let held = anna.take(60).unwrap();
        assert!(budgets.of("anna").take(1).is_none());
        assert!(budgets.of("ben").take(40).is_some());
        // A grant alone keeps the account.
        drop(anna);
        assert!(budgets.of("anna").take(1).is_none());
        drop(held);
        assert!(budgets.of("anna").take(60).is_some());
        for number in 0..10_000 {
            drop(budgets.of(&format!("user-{number}")));
        }
        let known = budgets.parts.lock().unwrap().len();
        assert!(known < 100, "{known} names are remembered");
        assert_eq!(budgets.whole().used(), 0);
    }
}
