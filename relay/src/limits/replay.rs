//! Assertions that were already used.
//!
//! An assertion is good once. It is remembered until its own `exp` has passed by the clock
//! tolerance, after which the claims check refuses it anyway; so the memory is bounded by time
//! as well as by count.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, PoisonError};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replay {
    /// Seen before.
    Used,
    /// The memory is full; letting it through unseen would be a hole.
    Full,
}

pub(crate) struct ReplayCache {
    cap: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Identity and `jti` → the second in which it may be forgotten.
    seen: HashMap<(String, String), u64>,
    /// The same, in order of forgetting.
    due: BTreeMap<u64, Vec<(String, String)>>,
}

impl ReplayCache {
    pub(crate) fn new(cap: usize) -> Self {
        Self {
            cap,
            state: Mutex::default(),
        }
    }

    /// Takes note of an assertion, keyed by its issuer too, so that one identity cannot use up
    /// the names of another. The claims were checked before, so the name is short. Times are
    /// Unix seconds.
    pub(crate) fn use_once(
        &self,
        issuer: &str,
        jti: &str,
        forget_at: u64,
        now: u64,
    ) -> Result<(), Replay> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.forget(now);
        let key = (issuer.to_owned(), jti.to_owned());
        if state.seen.contains_key(&key) {
            return Err(Replay::Used);
        }
        if state.seen.len() >= self.cap {
            return Err(Replay::Full);
        }
        state.due.entry(forget_at).or_default().push(key.clone());
        state.seen.insert(key, forget_at);
        Ok(())
    }
}

impl State {
    fn forget(&mut self, now: u64) {
        while let Some(entry) = self.due.first_entry() {
            if *entry.key() >= now {
                break;
            }
            for key in entry.remove() {
                self.seen.remove(&key);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_use_is_refused_until_it_is_forgotten() {
        let cache = ReplayCache::new(10);
        assert_eq!(cache.use_once("a", "1", 120, 0), Ok(()));
        assert_eq!(cache.use_once("a", "1", 120, 60), Err(Replay::Used));
        assert_eq!(cache.use_once("a", "1", 120, 120), Err(Replay::Used));
        assert_eq!(cache.use_once("a", "1", 300, 121), Ok(()));
    }

    #[test]
    fn two_identities_do_not_share_names() {
        let cache = ReplayCache::new(10);
        assert_eq!(cache.use_once("a", "1", 120, 0), Ok(()));
        assert_eq!(cache.use_once("b", "1", 120, 0), Ok(()));
    }

    #[test]
    fn a_full_memory_refuses_and_recovers() {
        let cache = ReplayCache::new(2);
        assert_eq!(cache.use_once("a", "1", 10, 0), Ok(()));
        assert_eq!(cache.use_once("a", "2", 20, 0), Ok(()));
        assert_eq!(cache.use_once("a", "3", 20, 0), Err(Replay::Full));
        assert_eq!(cache.use_once("a", "3", 30, 11), Ok(()));
        let state = cache.state.lock().unwrap();
        assert_eq!(state.seen.len(), 2);
        assert_eq!(state.due.values().flatten().count(), 2);
    }
}
