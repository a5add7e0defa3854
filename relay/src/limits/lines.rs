//! How many lines there may be, of all users, of each user and to each cluster, and how many bytes
//! their buffers may hold.

use throwline_ops::{Denied, Share, Shares};
use throwline_tunnel::splice::Budget;

use super::keyed::{BudgetPermit, KeyedBudget, KeyedLimit, Permit};
use crate::config::Limits;
use crate::metrics::Metrics;

pub(crate) struct LineLimits {
    /// All lines of this relay, with each user's share.
    per_user: Shares,
    per_cluster: KeyedLimit,
    buffers_per_user: KeyedBudget,
    buffers_per_cluster: KeyedBudget,
}

/// The right to one line, until it is dropped.
pub(crate) struct LinePermit {
    buffers: [BudgetPermit; 2],
    _of_user: Share,
    _of_cluster: Permit,
}

/// Which limit a line would exceed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum LineLimitReached {
    User { limit: usize },
    Relay { limit: usize },
    Cluster,
}

impl LineLimits {
    pub(crate) fn new(limits: &Limits, metrics: &Metrics) -> Self {
        Self {
            per_user: Shares::new(limits.lines, limits.lines_per_user),
            per_cluster: KeyedLimit::new(limits.lines_per_cluster),
            buffers_per_user: KeyedBudget::new(
                limits.buffered_bytes_per_user,
                metrics.limit_counter("buffers-per-user"),
            ),
            buffers_per_cluster: KeyedBudget::new(
                limits.buffered_bytes_per_cluster,
                metrics.limit_counter("buffers-per-cluster"),
            ),
        }
    }

    pub(crate) fn take(&self, user: &str, cluster: &str) -> Result<LinePermit, LineLimitReached> {
        let of_user = self.per_user.take(user).map_err(|denied| match denied {
            Denied::Name(limit) => LineLimitReached::User { limit },
            Denied::All(limit) => LineLimitReached::Relay { limit },
        })?;
        let of_cluster = self.per_cluster.take(cluster);
        Ok(LinePermit {
            _of_user: of_user,
            _of_cluster: of_cluster.ok_or(LineLimitReached::Cluster)?,
            buffers: [
                self.buffers_per_user.of(user),
                self.buffers_per_cluster.of(cluster),
            ],
        })
    }
}

impl LinePermit {
    /// The budgets of the line's user and of its cluster.
    pub(crate) fn budgets(&self) -> impl Iterator<Item = Budget> {
        self.buffers.iter().map(|permit| permit.budget.clone())
    }
}

impl LineLimitReached {
    /// The limit's name in metrics.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::User { .. } => "lines-per-user",
            Self::Relay { .. } => "lines",
            Self::Cluster => "lines-per-cluster",
        }
    }
}
