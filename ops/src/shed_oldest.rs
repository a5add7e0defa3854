//! A bounded set of connections that sheds its oldest member for a newcomer.
//!
//! For connections that anyone can open and that have not authenticated themselves. If newcomers had
//! to wait for room, one peer that holds all places silently would lock out every other. An honest
//! peer is through its handshake or request long before it is the oldest.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// The set. Clones are the same set.
#[derive(Debug, Clone)]
pub struct ShedOldest {
    capacity: usize,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// In order of arrival.
    members: BTreeMap<u64, Entry>,
}

#[derive(Debug, Clone, Default)]
struct Entry {
    shed: CancellationToken,
    /// How many [`Busy`] guards it has.
    busy: Arc<AtomicUsize>,
}

/// A member of the set; dropping it leaves the set.
#[derive(Debug)]
#[must_use]
pub struct Member {
    number: u64,
    entry: Entry,
    set: ShedOldest,
}

/// While it is held, its member is shed only if all members are busy.
#[derive(Debug)]
#[must_use]
pub struct Busy(Arc<AtomicUsize>);

impl ShedOldest {
    /// A set of at most `capacity` members, and at least one.
    pub fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            state: Arc::default(),
        }
    }

    /// Enters a newcomer. Where the set is full, it sheds its oldest member that is not busy, or the
    /// oldest of all.
    pub fn enter(&self) -> Member {
        let mut state = self.lock();
        if state.members.len() >= self.capacity {
            state.shed();
        }
        let number = state.next;
        state.next += 1;
        let entry = Entry::default();
        state.members.insert(number, entry.clone());
        drop(state);
        Member {
            number,
            entry,
            set: self.clone(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing under this lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn shed(&mut self) {
        let idle = |(number, entry): (&u64, &Entry)| {
            (entry.busy.load(Ordering::Relaxed) == 0).then_some(*number)
        };
        let oldest = self.members.keys().next().copied();
        let chosen = self.members.iter().find_map(idle).or(oldest);
        if let Some(entry) = chosen.and_then(|number| self.members.remove(&number)) {
            entry.shed.cancel();
        }
    }
}

impl Member {
    /// Ends when this member was shed.
    pub fn shed(&self) -> WaitForCancellationFuture<'_> {
        self.entry.shed.cancelled()
    }

    /// Marks this member as busy until the guard is dropped.
    pub fn busy(&self) -> Busy {
        self.entry.busy.fetch_add(1, Ordering::Relaxed);
        Busy(self.entry.busy.clone())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.set.lock().members.remove(&self.number);
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_shed(member: &Member) -> bool {
        member.entry.shed.is_cancelled()
    }

    #[test]
    fn the_oldest_makes_room_and_who_has_left_counts_no_more() {
        let set = ShedOldest::new(2);
        let (first, second) = (set.enter(), set.enter());
        assert!(!is_shed(&first));
        let third = set.enter();
        assert!(is_shed(&first));
        drop(second);
        let fourth = set.enter();
        assert!(!is_shed(&third) && !is_shed(&fourth));
        drop(first);
        assert_eq!(set.lock().members.len(), 2);
    }

    #[test]
    fn a_busy_member_is_shed_only_where_all_are_busy() {
        let set = ShedOldest::new(2);
        let (first, second) = (set.enter(), set.enter());
        let working = first.busy();
        let third = set.enter();
        assert!(!is_shed(&first) && is_shed(&second));
        let also_working = third.busy();
        let fourth = set.enter();
        assert!(is_shed(&first) && !is_shed(&third) && !is_shed(&fourth));
        drop((working, also_working));
        let _fifth = set.enter();
        assert!(is_shed(&third) && !is_shed(&fourth));
    }
}
