//! Fair shares of a capacity that many names use at once: lines, requests.
//!
//! A name gets at most its share, and the last quarter of the capacity is reserved for names that hold
//! little. So a few greedy names can use up what is not reserved, and every other name still gets in.
//! Where one share is larger than three quarters of the capacity, less is reserved: a share that was set
//! can be had.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Part of the capacity that is reserved for names that hold little: 1/4.
const RESERVED: usize = 4;
/// Part of a name's share that counts as little: 1/16, at least one.
const LITTLE: usize = 16;

/// The capacity and its holders. Clones are the same capacity. The memory it needs is
/// bounded by the number of names that hold something, and so by the capacity.
#[derive(Debug, Clone)]
pub struct Shares {
    capacity: usize,
    per_name: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    total: usize,
    by_name: HashMap<Arc<str>, usize>,
}

/// Why a name gets no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The name holds its whole share; no other name is the cause.
    #[error("the share of one user, {0}, is used up")]
    Name(usize),
    /// The capacity is used up, or what is left is reserved for names that hold less.
    #[error("the capacity for all users, {0}, is used up")]
    All(usize),
}

/// One unit of the capacity; dropping it gives it back.
#[derive(Debug)]
#[must_use]
pub struct Share {
    name: Arc<str>,
    state: Arc<Mutex<State>>,
}

impl Shares {
    /// `capacity` units in all, at most `per_name` of them to one name; both at least 1.
    pub fn new(capacity: usize, per_name: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            capacity,
            per_name: per_name.clamp(1, capacity),
            state: Arc::default(),
        }
    }

    /// Takes one unit.
    ///
    /// # Errors
    /// [`Denied`], which names the limit that was reached.
    pub fn take(&self, name: &str) -> Result<Share, Denied> {
        let mut state = lock(&self.state);
        let held = state.by_name.get(name).copied().unwrap_or(0);
        if held >= self.per_name {
            return Err(Denied::Name(self.per_name));
        }
        // The last units are for names that hold few, so that a few names with many units cannot
        // shut out the others.
        let reserved = (self.capacity / RESERVED).min(self.capacity - self.per_name);
        let most = if held < (self.per_name / LITTLE).max(1) {
            self.capacity
        } else {
            self.capacity - reserved
        };
        if state.total >= most {
            return Err(Denied::All(self.capacity));
        }
        state.total += 1;
        let name = match state.by_name.get_key_value(name) {
            Some((name, _)) => name.clone(),
            None => Arc::from(name),
        };
        state.by_name.insert(name.clone(), held + 1);
        drop(state);
        Ok(Share {
            name,
            state: self.state.clone(),
        })
    }

    /// Units that are held now.
    pub fn held(&self) -> usize {
        lock(&self.state).total
    }
}

impl Share {
    /// The name that metrics and refusals show.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        state.total -= 1;
        if let Some(held) = state.by_name.get_mut(&self.name) {
            *held -= 1;
            if *held == 0 {
                state.by_name.remove(&self.name);
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Nothing under this lock can panic half-way through a change.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take_all(shares: &Shares, name: &str) -> Vec<Share> {
        std::iter::from_fn(|| shares.take(name).ok()).collect()
    }

    #[test]
    fn a_name_gets_its_share_and_no_more() {
        let shares = Shares::new(1024, 256);
        let held = take_all(&shares, "anna");
        assert_eq!(held.len(), 256);
        assert_eq!(shares.take("anna").unwrap_err(), Denied::Name(256));
        let of_ben = shares.take("ben").unwrap();
        assert_eq!((of_ben.name(), shares.held()), ("ben", 257));
        drop(held);
        assert!(shares.take("anna").is_ok());
    }

    #[test]
    fn many_greedy_names_together_leave_the_reserve_to_others() {
        let shares = Shares::new(1024, 256);
        let mut greedy = Vec::new();
        for name in 0..8 {
            greedy.extend(take_all(&shares, &format!("greedy-{name}")));
        }
        // Three hold their whole share, five what counts as little.
        assert_eq!(greedy.len(), 3 * 256 + 5 * 16);
        assert_eq!(shares.take("greedy-3").unwrap_err(), Denied::All(1024));
        let others: Vec<_> = (0..16)
            .filter_map(|name| shares.take(&format!("other-{name}")).ok())
            .collect();
        assert_eq!(others.len(), 16);
    }

    #[test]
    fn the_capacity_is_never_exceeded_and_nothing_is_kept_of_idle_names() {
        let shares = Shares::new(8, 4);
        let held: Vec<_> = (0..20)
            .filter_map(|name| shares.take(&format!("user-{name}")).ok())
            .collect();
        assert_eq!((held.len(), shares.held()), (8, 8));
        assert_eq!(shares.take("late").unwrap_err(), Denied::All(8));
        drop(held);
        assert_eq!(shares.held(), 0);
        assert!(lock(&shares.state).by_name.is_empty());
        // A share as large as the capacity can be had.
        let whole = Shares::new(8, 8);
        assert_eq!(take_all(&whole, "anna").len(), 8);
        // A capacity of one still serves one.
        let one = Shares::new(0, 0);
        let first = one.take("anna").unwrap();
        assert!(one.take("ben").is_err());
        drop(first);
        assert!(one.take("ben").is_ok());
    }
}
