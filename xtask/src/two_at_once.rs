//! Two runs at the same time, for work that leaves processors idle.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Runs each item in this order, two at once; the results in the order in which they ended.
pub(crate) fn two_at_once<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    run: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let queue: Mutex<VecDeque<T>> = Mutex::new(items.into_iter().collect());
    let results = Mutex::new(Vec::new());
    // A function, so that the queue is free while an item runs.
    let next = || lock(&queue).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(item) = next() {
                    let result = run(item);
                    lock(&results).push(result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// A poisoned lock only means that the other runner panicked; what it holds is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn two_run_at_once() {
        // Passed only by two together.
        let both = Barrier::new(2);
        let outcomes = two_at_once(["a", "b", "c", "d"], |name| {
            both.wait();
            (name, name != "c")
        });
        assert_eq!(outcomes.len(), 4);
        assert!(outcomes.contains(&("c", false)));
        assert!(outcomes.contains(&("d", true)));
    }
}
