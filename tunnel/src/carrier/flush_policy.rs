//! Decides whether a flush is delayed until the ready tasks have run, so that their bytes leave in
//! the same message, TLS record and system call. With one active stream no other task has bytes to
//! add, and the delay is a task switch for nothing.

/// Useless delays in a row after which most flushes are no longer delayed.
const MAX_USELESS: u32 = 16;
/// From then on one flush of so many is delayed, to detect that it is useful again.
const PROBE_EVERY: u32 = 16;

#[derive(Debug, Default)]
pub(super) struct FlushCoalescer {
    /// Bytes in the cork when the delay began; `None`: no flush is delayed.
    delayed_at: Option<usize>,
    /// Useless delays, and flushes without one since.
    useless: u32,
}

impl FlushCoalescer {
    /// Called before a flush of so many bytes. After `true`, called once more when the tasks that
    /// were ready have run.
    pub(super) fn should_wait(&mut self, corked: usize) -> bool {
        if let Some(before) = self.delayed_at.take() {
            // A full cork has left meanwhile, so fewer bytes also mean that some were added.
            let was_useful = corked != before;
            self.useless = if was_useful { 0 } else { self.useless + 1 };
            return false;
        }
        if corked == 0 {
            return false;
        }
        if self.useless >= MAX_USELESS {
            self.useless += 1;
            if self.useless < MAX_USELESS + PROBE_EVERY {
                return false;
            }
            self.useless = MAX_USELESS;
        }
        self.delayed_at = Some(corked);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many flushes, those that were delayed; `more` bytes are added meanwhile.
    fn delayed(policy: &mut FlushCoalescer, flushes: usize, more: usize) -> usize {
        let mut count = 0;
        for _ in 0..flushes {
            if policy.should_wait(10) {
                count += 1;
                assert!(!policy.should_wait(10 + more), "it waits once");
            }
        }
        count
    }

    #[test]
    fn every_flush_is_delayed_while_others_add_bytes() {
        let mut policy = FlushCoalescer::default();
        assert_eq!(delayed(&mut policy, 100, 1), 100);
    }

    #[test]
    fn after_useless_delays_only_some_flushes_probe() {
        let mut policy = FlushCoalescer::default();
        assert_eq!(delayed(&mut policy, 16, 0), 16);
        let probes = delayed(&mut policy, 1600, 0);
        assert!((90..=110).contains(&probes), "{probes} of 1600");
        // A useful delay is found within as many flushes as one probe takes.
        assert!(delayed(&mut policy, 16, 1) >= 1);
        assert_eq!(delayed(&mut policy, 100, 1), 100);
    }

    #[test]
    fn an_empty_cork_is_not_waited_for() {
        let mut policy = FlushCoalescer::default();
        assert!(!policy.should_wait(0));
    }
}
