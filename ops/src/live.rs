//! A registry of live sessions, lines and carriers, which may have to end before their time.
//!
//! Each entry has the facts by which it can be selected: its identity, its certificate's serial, its
//! cluster. One call ends all entries that a decision covers, with a reason.
//!
//! **Invariant:** an entry leaves with its guard and by its own number, so the registry holds nothing
//! that has ended, and a late guard cannot evict a successor.
//!
//! ```
//! use std::sync::Arc;
//! use throwline_ops::Live;
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! #[derive(Clone, Debug, PartialEq)]
//! enum Reason { Revoked, Stopping }
//! struct Line { identity: &'static str, serial: &'static str, cluster: &'static str }
//!
//! let live: Arc<Live<Line, Reason>> = Arc::default();
//! let line = live.enter(Line { identity: "dana", serial: "01", cluster: "prod" });
//! let other = live.enter(Line { identity: "kim", serial: "02", cluster: "prod" });
//!
//! let ended = live.end(|line| (line.serial == "01").then_some(Reason::Revoked));
//! assert_eq!(ended, 1);
//! assert_eq!(line.ending().ended().await, Reason::Revoked);
//! assert_eq!(other.ending().reason(), None);
//!
//! // At the end of the process: everything, and whatever is entered later.
//! live.close(Reason::Stopping);
//! assert_eq!(other.ending().reason(), Some(Reason::Stopping));
//! # });
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use tokio_util::sync::CancellationToken;

/// The registry. `K` has the facts by which an entry is selected, `R` is the reason of its end.
#[derive(Debug)]
pub struct Live<K, R> {
    entries: Mutex<Entries<K, R>>,
}

#[derive(Debug)]
struct Entries<K, R> {
    next: u64,
    held: HashMap<u64, (K, Ending<R>)>,
    /// The reason with which every later entry begins.
    closed: Option<R>,
}

/// Whether one entry was ended, and why. Clones are the same.
#[derive(Debug)]
pub struct Ending<R> {
    token: CancellationToken,
    reason: Arc<OnceLock<R>>,
}

/// Keeps an entry in its registry.
#[derive(Debug)]
pub struct LiveGuard<K, R> {
    registry: Arc<Live<K, R>>,
    number: u64,
    ending: Ending<R>,
}

impl<K, R> Default for Live<K, R> {
    fn default() -> Self {
        let entries = Entries {
            next: 0,
            held: HashMap::new(),
            closed: None,
        };
        Self {
            entries: Mutex::new(entries),
        }
    }
}

impl<K, R: Clone> Live<K, R> {
    /// Makes an entry that lasts until the guard is dropped. An earlier [`end`](Self::end) does not
    /// apply to it, so the caller checks the decision once more after this call.
    pub fn enter(self: &Arc<Self>, key: K) -> LiveGuard<K, R> {
        let ending = Ending::default();
        let mut entries = self.lock();
        if let Some(reason) = &entries.closed {
            ending.end(reason.clone());
        }
        let number = entries.next;
        entries.next += 1;
        entries.held.insert(number, (key, ending.clone()));
        drop(entries);
        LiveGuard {
            registry: Arc::clone(self),
            number,
            ending,
        }
    }

    /// Ends each entry for which `decide` returns a reason, and returns their number. An entry that was
    /// ended before keeps its first reason.
    pub fn end(&self, decide: impl Fn(&K) -> Option<R>) -> usize {
        self.end_in(self.lock(), decide)
    }

    /// Ends every entry, now and whenever one is made later. Returns the number of those that were
    /// live now. The first reason counts.
    pub fn close(&self, reason: R) -> usize {
        let mut entries = self.lock();
        let reason = entries.closed.get_or_insert(reason).clone();
        self.end_in(entries, |_| Some(reason.clone()))
    }

    fn end_in(
        &self,
        entries: MutexGuard<'_, Entries<K, R>>,
        decide: impl Fn(&K) -> Option<R>,
    ) -> usize {
        let ended: Vec<(Ending<R>, R)> = entries
            .held
            .values()
            .filter(|(_, ending)| ending.reason().is_none())
            .filter_map(|(key, ending)| Some((ending.clone(), decide(key)?)))
            .collect();
        // Woken tasks may drop their guards at once, which takes the lock.
        drop(entries);
        let count = ended.len();
        for (ending, reason) in ended {
            ending.end(reason);
        }
        count
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.lock().held.len()
    }

    /// Whether nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<K, R> Live<K, R> {
    fn lock(&self) -> MutexGuard<'_, Entries<K, R>> {
        // Nothing under this lock can panic half-way through a change.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, R: Clone> LiveGuard<K, R> {
    /// The entry's end, for tasks that do not hold the guard.
    pub fn ending(&self) -> Ending<R> {
        self.ending.clone()
    }

    /// Ends this entry alone; the first reason counts.
    pub fn end(&self, reason: R) {
        self.ending.end(reason);
    }

    /// Replaces the facts by which the entry is selected, as when a certificate was renewed.
    pub fn rekey(&self, key: K) {
        if let Some((held, _)) = self.registry.lock().held.get_mut(&self.number) {
            *held = key;
        }
    }
}

impl<K, R> Drop for LiveGuard<K, R> {
    fn drop(&mut self) {
        self.registry.lock().held.remove(&self.number);
    }
}

impl<R> Default for Ending<R> {
    fn default() -> Self {
        Self {
            token: CancellationToken::new(),
            reason: Arc::default(),
        }
    }
}

impl<R> Clone for Ending<R> {
    fn clone(&self) -> Self {
        Self {
            token: self.token.clone(),
            reason: Arc::clone(&self.reason),
        }
    }
}

impl<R: Clone> Ending<R> {
    /// Ends the entry; the first reason counts.
    pub fn end(&self, reason: R) {
        // Before the token, so that the reason is there for all that it wakes.
        let _ = self.reason.set(reason);
        self.token.cancel();
    }

    /// Why the entry was ended; `None` while it was not.
    pub fn reason(&self) -> Option<R> {
        self.reason.get().cloned()
    }

    /// Waits until the entry is ended; never returns if it is not.
    pub async fn ended(&self) -> R {
        self.token.cancelled().await;
        match self.reason() {
            Some(reason) => reason,
            // The token is cancelled by `end` alone.
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_call_ends_all_that_it_is_about_and_nothing_else() {
        let live: Arc<Live<&str, u8>> = Arc::default();
        let (first, second, other) = (live.enter("dana"), live.enter("dana"), live.enter("kim"));
        let end =
            |name: &'static str, reason| live.end(|key: &&str| (*key == name).then_some(reason));
        assert_eq!(end("dana", 1), 2);
        assert_eq!(first.ending().ended().await, 1);
        assert_eq!(second.ending().reason(), Some(1));
        assert_eq!(other.ending().reason(), None);
        // The first reason stays.
        assert_eq!(end("dana", 2), 0);
        assert_eq!(first.ending().reason(), Some(1));
    }

    #[test]
    fn an_entry_leaves_with_its_guard_and_follows_its_new_key() {
        let live: Arc<Live<&str, u8>> = Arc::default();
        let guard = live.enter("old");
        guard.rekey("new");
        assert_eq!(live.end(|key| (*key == "old").then_some(1)), 0);
        assert_eq!(live.end(|key| (*key == "new").then_some(1)), 1);
        drop(guard);
        assert!(live.is_empty());
    }

    #[test]
    fn a_late_guard_does_not_evict_its_successor() {
        let live: Arc<Live<&str, u8>> = Arc::default();
        let old = live.enter("dana");
        let new = live.enter("dana");
        drop(old);
        assert_eq!(live.len(), 1);
        assert_eq!(live.end(|key| (*key == "dana").then_some(1)), 1);
        assert_eq!(new.ending().reason(), Some(1));
    }

    #[test]
    fn after_the_close_an_entry_is_ended_when_it_is_made() {
        let live: Arc<Live<&str, u8>> = Arc::default();
        let (revoked, other) = (live.enter("dana"), live.enter("kim"));
        revoked.end(1);
        assert_eq!(live.close(2), 1);
        assert_eq!(revoked.ending().reason(), Some(1));
        assert_eq!(other.ending().reason(), Some(2));
        assert_eq!(live.close(3), 0);
        assert_eq!(live.enter("late").ending().reason(), Some(2));
    }
}
