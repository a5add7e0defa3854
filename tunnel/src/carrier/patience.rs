//! Whether a flush first waits for the tasks that are ready: what they say leaves with it, in one
//! message, record and system call. Where one stream at a time speaks, nobody has anything to add, and
//! waiting is a task switch for nothing.

/// Waits in vain, one after the other, until most flushes wait no more.
const VAIN: u32 = 16;
/// Then one flush of so many waits, to see whether it is worth it again.
const ONE_OF: u32 = 16;

#[derive(Debug, Default)]
pub(super) struct Patience {
    /// What was corked when the wait began.
    waiting: Option<usize>,
    /// Waits in vain, and flushes without one since.
    vain: u32,
}

impl Patience {
    /// Before a flush of so many bytes; asked again after the tasks that were ready, when it says yes.
    pub(super) fn waits(&mut self, corked: usize) -> bool {
        if let Some(before) = self.waiting.take() {
            // A full cork has left meanwhile, so less is more, too.
            let is_worth_it = corked != before;
            self.vain = if is_worth_it { 0 } else { self.vain + 1 };
            return false;
        }
        if corked == 0 {
            return false;
        }
        if self.vain >= VAIN {
            self.vain += 1;
            if self.vain < VAIN + ONE_OF {
                return false;
            }
            self.vain = VAIN;
        }
        self.waiting = Some(corked);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of so many flushes, those that waited; `more` is what others add to each meanwhile.
    fn waited(patience: &mut Patience, flushes: usize, more: usize) -> usize {
        let mut count = 0;
        for _ in 0..flushes {
            if patience.waits(10) {
                count += 1;
                assert!(!patience.waits(10 + more), "it waits once");
            }
        }
        count
    }

    #[test]
    fn it_waits_as_long_as_others_have_something_to_add() {
        let mut patience = Patience::default();
        assert_eq!(waited(&mut patience, 100, 1), 100);
    }

    #[test]
    fn after_waits_in_vain_it_only_tries_now_and_then() {
        let mut patience = Patience::default();
        assert_eq!(waited(&mut patience, 16, 0), 16);
        let tried = waited(&mut patience, 1600, 0);
        assert!((90..=110).contains(&tried), "{tried} of 1600");
        // The first that is worth it is found within as many flushes as one try takes.
        assert!(waited(&mut patience, 16, 1) >= 1);
        assert_eq!(waited(&mut patience, 100, 1), 100);
    }

    #[test]
    fn nothing_is_nothing_to_wait_for() {
        let mut patience = Patience::default();
        assert!(!patience.waits(0));
    }
}
