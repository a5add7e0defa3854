//! Draining is ownership: work in progress holds a guard, and the drain ends with the last one.
//!
//! ```
//! use std::time::Duration;
//! use throwline_ops::Drain;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let drain = Drain::new();
//! let guard = drain.guard();
//! let work = tokio::spawn(async move {
//!     // The request, the copy, the upload: while the guard lives, the process does not exit.
//!     tokio::task::yield_now().await;
//!     drop(guard);
//! });
//!
//! // At shutdown, stop accepting, then wait for what has begun, within a grace period.
//! assert_eq!(drain.drained_within(Duration::from_secs(60)).await, Ok(()));
//! # work.await.unwrap();
//!
//! // Work that does not end is counted, and the caller decides what to do about it.
//! let _stuck = drain.guard();
//! assert_eq!(drain.drained_within(Duration::ZERO).await, Err(1));
//! # });
//! ```

use std::time::Duration;
use tokio::sync::watch;

/// Hands out guards and waits for them.
#[derive(Clone, Debug)]
pub struct Drain(watch::Sender<usize>);

/// Held by a piece of work for as long as it must not be cut off.
#[derive(Debug)]
pub struct DrainGuard(watch::Sender<usize>);

impl Default for Drain {
    fn default() -> Self {
        Self::new()
    }
}

impl Drain {
    /// A drain with no guard held.
    pub fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    /// A guard for one piece of work.
    pub fn guard(&self) -> DrainGuard {
        self.0.send_modify(|held| *held += 1);
        DrainGuard(self.0.clone())
    }

    /// How many guards are held now.
    pub fn in_progress(&self) -> usize {
        *self.0.borrow()
    }

    /// Ends when no guard is held.
    pub async fn drained(&self) {
        // The wait cannot fail: `self` keeps the channel open.
        let _ = self.0.subscribe().wait_for(|held| *held == 0).await;
    }

    /// The same, given up after `grace`.
    ///
    /// # Errors
    /// The number of guards that were still held after `grace`.
    pub async fn drained_within(&self, grace: Duration) -> Result<(), usize> {
        match tokio::time::timeout(grace, self.drained()).await {
            Ok(()) => Ok(()),
            Err(_) => match self.in_progress() {
                0 => Ok(()),
                left => Err(left),
            },
        }
    }
}

impl Clone for DrainGuard {
    fn clone(&self) -> Self {
        self.0.send_modify(|held| *held += 1);
        Self(self.0.clone())
    }
}

impl Drop for DrainGuard {
    fn drop(&mut self) {
        self.0.send_modify(|held| *held -= 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_with_the_last_guard() {
        let drain = Drain::new();
        drain.drained().await;
        let one = drain.guard();
        let two = one.clone();
        assert_eq!(drain.in_progress(), 2);
        let waiter = tokio::spawn({
            let drain = drain.clone();
            async move { drain.drained().await }
        });
        drop(one);
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(two);
        waiter.await.unwrap();
    }

    #[tokio::test]
    async fn gives_up_after_the_grace() {
        let drain = Drain::new();
        let _stuck = drain.guard();
        assert_eq!(drain.drained_within(Duration::ZERO).await, Err(1));
    }
}
