//! How the agent's capacity is shared among users: lines, requests, memory.
//!
//! | what | all users | one user | over it |
//! |---|---|---|---|
//! | lines | [`Limits::lines`] | [`Limits::lines_per_user`] | the line is refused, with the limit |
//! | requests and watches | [`Limits::requests`] | [`Limits::requests_per_user`] | 429, with the limit |
//! | bytes kept for slow peers | [`Limits::memory`] | [`Limits::memory_per_user`] | the stream continues with small buffers |
//! | windows for uploads | [`Limits::uploads`] | [`Limits::uploads_per_user`] | a new session gets a small window |
//!
//! Of lines and requests the last quarter is reserved for users who hold little: [`Shares`].

use throwline_ops::{Denied, Share, Shares};
use throwline_tunnel::budget::{Budget, Budgets, Grant};

use crate::metrics::Metrics;

pub(crate) mod large_heads;
mod send_quota;

pub(crate) use send_quota::{SendPermit, SendQuota};

/// Knobs of the shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Lines (sealed sessions) of all users. Default 2,000; more are refused with a reason. Idle,
    /// each costs its TLS and line buffers, about 100 KiB.
    pub lines: usize,
    /// Lines of one user. Default 256: one for each exec, port-forward or cp, and a few for all
    /// requests. Worst case: 430 KiB each outside every budget, so 110 MiB.
    pub lines_per_user: usize,
    /// Requests and watches under way, of all users; upgrades are not among them. Default 4,096.
    /// Worst case: `upstream.stream_window` and 64 KiB for each that is not read, so 1.25 GiB.
    pub requests: usize,
    /// The same of one user. Default 512; k9s with many watches stays below 100. Worst case 160 MiB.
    pub requests_per_user: usize,
    /// Bytes that may be kept for users who do not read or do not acknowledge: of lines until they
    /// are acknowledged, of answers until HTTP/2 has sent them. Default 256 MiB.
    pub memory: u64,
    /// The same of one user. Default 64 MiB.
    pub memory_per_user: u64,
    /// HTTP/2 windows of sessions, into which users send bodies that the API server may not take.
    /// Default 256 MiB; a session beyond that has the smallest window that HTTP/2 allows, 64 KiB.
    pub uploads: u64,
    /// The same of one user. Default 80 MiB: two sessions over a long path, and ten others.
    pub uploads_per_user: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            lines: 2000,
            lines_per_user: 256,
            requests: 4096,
            requests_per_user: 512,
            memory: 256 << 20,
            memory_per_user: 64 << 20,
            uploads: 256 << 20,
            uploads_per_user: 80 << 20,
        }
    }
}

impl Limits {
    /// The same shares of about this many bytes in all. A line counts with the 430 KiB outside every
    /// budget, a request with 320 KiB; a quarter of `bytes` is for each of these two and for each
    /// of the two budgets.
    #[must_use]
    pub fn within(bytes: u64) -> Self {
        let default = Self::default();
        let quarter = bytes / 4;
        let most = |each: u64, default: usize| {
            usize::try_from(quarter / each).map_or(default, |count| count.clamp(8, default))
        };
        let lines = most(430 << 10, default.lines);
        let requests = most(320 << 10, default.requests);
        let memory = quarter.min(default.memory);
        let uploads = quarter.min(default.uploads);
        Self {
            lines,
            lines_per_user: default.lines_per_user.min(lines.div_ceil(4)),
            requests,
            requests_per_user: default.requests_per_user.min(requests.div_ceil(4)),
            memory,
            memory_per_user: default.memory_per_user.min(memory / 4),
            uploads,
            uploads_per_user: default.uploads_per_user.min(uploads / 3),
        }
    }
}

/// A limit that is reached, and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuotaExceeded {
    #[error(
        "you have {0} lines open to this cluster, the most that one user may have \
         (--max-lines-per-user of the agent)"
    )]
    LinesOfUser(usize),
    #[error("the agent carries {0} lines, the most that it may; try again")]
    Lines(usize),
    #[error(
        "you have {0} requests and watches under way in this cluster, the most that one user may have \
         (--max-requests-per-user of the agent)"
    )]
    RequestsOfUser(usize),
    #[error("the agent has {0} requests and watches under way, the most that it may; try again")]
    Requests(usize),
}

impl QuotaExceeded {
    /// For the metric.
    fn label(self) -> &'static str {
        match self {
            Self::LinesOfUser(_) => "lines-per-user",
            Self::Lines(_) => "lines",
            Self::RequestsOfUser(_) => "requests-per-user",
            Self::Requests(_) => "requests",
        }
    }
}

/// The shares of one agent. Clones are the same shares.
#[derive(Clone)]
pub struct Quotas {
    lines: Shares,
    requests: Shares,
    memory: Budgets,
    uploads: Budgets,
    metrics: Metrics,
}

impl Quotas {
    pub fn new(limits: Limits, metrics: Metrics) -> Self {
        Self {
            lines: Shares::new(limits.lines, limits.lines_per_user),
            requests: Shares::new(limits.requests, limits.requests_per_user),
            memory: Budgets::new(limits.memory, limits.memory_per_user),
            uploads: Budgets::new(limits.uploads, limits.uploads_per_user),
            metrics,
        }
    }

    /// A share for a line of this user.
    ///
    /// # Errors
    /// The limit that is reached.
    pub(crate) fn line(&self, user: &str) -> Result<Share, QuotaExceeded> {
        self.lines.take(user).map_err(|denied| {
            self.exceeded(match denied {
                Denied::Name(most) => QuotaExceeded::LinesOfUser(most),
                Denied::All(most) => QuotaExceeded::Lines(most),
            })
        })
    }

    /// A share for a request of this user.
    ///
    /// # Errors
    /// The limit that is reached.
    pub(crate) fn request(&self, user: &str) -> Result<Share, QuotaExceeded> {
        self.requests.take(user).map_err(|denied| {
            self.exceeded(match denied {
                Denied::Name(most) => QuotaExceeded::RequestsOfUser(most),
                Denied::All(most) => QuotaExceeded::Requests(most),
            })
        })
    }

    fn exceeded(&self, limit: QuotaExceeded) -> QuotaExceeded {
        self.metrics.limited(limit.label());
        limit
    }

    /// The budget for bytes that this user's peers have not taken yet.
    pub(crate) fn memory(&self, user: &str) -> Budget {
        self.memory.of(user)
    }

    /// The first of these windows for which this user's budget suffices, with its grant; `least` if
    /// there is none.
    pub(crate) fn window(
        &self,
        user: &str,
        preferred: [u32; 2],
        least: u32,
    ) -> (u32, Option<Grant>) {
        let budget = self.uploads.of(user);
        let granted = preferred
            .into_iter()
            .find_map(|window| Some((window, budget.take(window.into())?)));
        match granted {
            Some((window, grant)) => (window, Some(grant)),
            None => {
                self.metrics.limited("uploads");
                (least, None)
            }
        }
    }

    /// Sets the gauges to what is held now.
    pub(crate) fn update_gauges(&self) {
        let show = |gauge: &prometheus::IntGauge, count: u64| {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        show(&self.metrics.kept_bytes, self.memory.whole().used());
        show(&self.metrics.requests_now, self.requests.held() as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_follow_the_memory_that_there_is() {
        let most = Limits::default();
        assert_eq!(Limits::within(u64::MAX), most);
        let small = Limits::within(256 << 20);
        assert!(small.memory == 64 << 20 && small.memory_per_user == 16 << 20);
        assert!(small.requests == 204 && small.requests_per_user == 51);
        assert!(small.lines == 152 && small.lines_per_user == 38);
        let none = Limits::within(0);
        assert!(none.lines == 8 && none.requests_per_user == 2 && none.memory == 0);
    }

    #[test]
    fn one_users_windows_leave_others_theirs() {
        let limits = Limits {
            uploads: 100,
            uploads_per_user: 60,
            ..Limits::default()
        };
        let quotas = Quotas::new(limits, Metrics::default());
        let mut held = Vec::new();
        let mut window = |user| {
            let (window, grant) = quotas.window(user, [40, 10], 1);
            held.push(grant);
            window
        };
        let windows: Vec<u32> = (0..4).map(|_| window("anna")).collect();
        assert_eq!(windows, [40, 10, 10, 1]);
        assert_eq!((window("ben"), window("ben")), (40, 1));
    }
}
