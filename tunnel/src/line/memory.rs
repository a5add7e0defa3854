//! What a line may hold: its shares of budgets that many lines have in common.

use crate::budget::{Budget, Grant};
use crate::proto::line::{ACK_EVERY, SEALED_CHUNK, WINDOW};

/// Step in which bytes buffered for a reader are taken from their budget.
const UNREAD_STEP: usize = 256 * 1024;

/// Unacknowledged bytes of a [charged](super::Line::charge) line that need no grant: as many as the
/// peer reads before it acknowledges, and one chunk more, so that a line goes on where the budget is
/// used up.
const UNACKED_FREE: u64 = ACK_EVERY + SEALED_CHUNK as u64;

/// Step in which unacknowledged bytes are taken from their budget.
const UNACKED_STEP: u64 = 64 * 1024;

/// Budgets of all lines of one component. Clones are the same budgets.
#[derive(Debug, Clone)]
pub struct LineBudgets {
    /// Bytes by which the windows of all lines together may outgrow the initial ones. Default 64 MiB;
    /// so much more than a window each, lines may have to keep for peers that stopped reading.
    pub window_growth: Budget,
    /// Bytes that all lines together may buffer for their readers beyond an initial window each, while
    /// a writer waits for acknowledgements behind them. Default 64 MiB. A peer may send as much as its
    /// window, but none of ours sends more than an initial window that is not read.
    pub unread: Budget,
}

/// Default of [`LineBudgets::window_growth`].
pub const WINDOW_GROWTH: u64 = 64 << 20;

/// Default of [`LineBudgets::unread`].
pub const UNREAD: u64 = 64 << 20;

impl LineBudgets {
    /// Budgets of so many bytes.
    pub fn new(window_growth: u64, unread: u64) -> Self {
        Self {
            window_growth: Budget::new(window_growth),
            unread: Budget::new(unread),
        }
    }
}

impl Default for LineBudgets {
    fn default() -> Self {
        Self::new(WINDOW_GROWTH, UNREAD)
    }
}

/// What one line holds of its budgets.
#[derive(Debug)]
pub(super) struct LineMemory {
    budgets: LineBudgets,
    /// For unacknowledged and unread bytes, of a charged line.
    charged: Option<Budget>,
    window_growth: Vec<Grant>,
    unread: Vec<Grant>,
    unacked: Vec<Grant>,
}

impl LineMemory {
    pub(super) fn new(budgets: LineBudgets) -> Self {
        Self {
            budgets,
            charged: None,
            window_growth: Vec::new(),
            unread: Vec::new(),
            unacked: Vec::new(),
        }
    }

    pub(super) fn charge(&mut self, budget: Budget) {
        self.charged = Some(budget);
    }

    /// Takes so much for a larger window; false: the budget is used up.
    pub(super) fn grow_window(&mut self, by: u64) -> bool {
        let grant = self.budgets.window_growth.take(by);
        let granted = grant.is_some();
        self.window_growth.extend(grant);
        granted
    }

    /// By how much the window has grown.
    pub(super) fn window_growth(&self) -> u64 {
        self.window_growth.iter().map(Grant::bytes).sum()
    }

    pub(super) fn has_grown_window(&self) -> bool {
        !self.window_growth.is_empty()
    }

    pub(super) fn release_window_growth(&mut self) {
        self.window_growth.clear();
    }

    /// Takes what one more write needs, with so many bytes unacknowledged; false: the budget is used
    /// up.
    pub(super) fn reserve_unacked(&mut self, unacked: u64) -> bool {
        let Some(budget) = &self.charged else {
            return true;
        };
        while unacked >= UNACKED_FREE + self.unacked.len() as u64 * UNACKED_STEP {
            match budget.take(UNACKED_STEP) {
                Some(grant) => self.unacked.push(grant),
                None => return false,
            }
        }
        true
    }

    /// Whether grants are held that acknowledgements may release.
    pub(super) fn holds_unacked(&self) -> bool {
        !self.unacked.is_empty()
    }

    /// Releases what so many unacknowledged bytes do not need.
    pub(super) fn release_unacked(&mut self, unacked: u64) {
        let needed = unacked.saturating_sub(UNACKED_FREE).div_ceil(UNACKED_STEP);
        self.unacked
            .truncate(usize::try_from(needed).unwrap_or(usize::MAX));
    }

    /// Takes what so many unread bytes need; false: the budget is used up.
    pub(super) fn reserve_unread(&mut self, unread: usize) -> bool {
        let (budget, free) = match &self.charged {
            Some(charged) => (charged, UNREAD_STEP),
            None => (&self.budgets.unread, WINDOW as usize),
        };
        let beyond = unread.saturating_sub(free);
        while beyond > self.unread.len() * UNREAD_STEP {
            match budget.take(UNREAD_STEP as u64) {
                Some(grant) => self.unread.push(grant),
                None => return false,
            }
        }
        true
    }

    pub(super) fn release_unread(&mut self) {
        self.unread.clear();
    }
}
