//! The policy of lines: which users may open lines to which clusters, and until when. What they may do
//! there is decided by the cluster's own RBAC.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use throwline_certs::PeerIdentity;
use throwline_policy::{Decision, Denial, DenyCode, Permit, PolicySet, Request, Subject, decide};
use tracing::debug;

use crate::clock::reached;

/// How long a policy may take to renew a permission whose end has come.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(2);

/// Consulted for each line, and for each cluster of a list.
#[async_trait]
pub trait Policy: Send + Sync + 'static {
    /// Decides on lines of this user to this cluster, at the time `now` of the authority's clock. A live line is
    /// ended at the end of the permission, unless a second decision permits it for longer.
    async fn decide(&self, user: &PeerIdentity, cluster: &str, now: SystemTime) -> Decision;
}

/// Every enrolled user may open lines to every enrolled cluster: the default, for as long as
/// one team owns a relay. The cluster's RBAC still has each user's name.
#[derive(Debug, Clone, Copy, Default)]
pub struct Everyone;

#[async_trait]
impl Policy for Everyone {
    async fn decide(&self, user: &PeerIdentity, cluster: &str, now: SystemTime) -> Decision {
        let subject = Subject {
            name: user.id.name(),
            groups: &user.groups,
        };
        let request = Request::Line { cluster };
        decide(&subject, &request, now, &PolicySet::default())
    }
}

/// What the relay may act on. It meets no obligations: a permission that has one is a denial here.
pub(crate) async fn permit(
    policy: &dyn Policy,
    user: &PeerIdentity,
    cluster: &str,
    now: SystemTime,
) -> Result<Permit, Denial> {
    let decision = policy.decide(user, cluster, now).await;
    decision.enforced_by(&[], now)
}

/// The permission of one line: the decision that allowed it, and the policy for the next one.
pub(crate) struct LinePermission {
    policy: Arc<dyn Policy>,
    user: PeerIdentity,
    cluster: String,
    /// `None`: it lasts as long as the line.
    until: Option<SystemTime>,
}

impl LinePermission {
    /// # Errors
    /// The policy's denial.
    pub(crate) async fn request(
        policy: Arc<dyn Policy>,
        user: &PeerIdentity,
        cluster: &str,
        now: SystemTime,
    ) -> Result<Self, Denial> {
        let permit = permit(&*policy, user, cluster, now).await?;
        Ok(Self {
            policy,
            user: user.clone(),
            cluster: cluster.to_owned(),
            until: permit.until,
        })
    }

    /// Returns when the line is no longer permitted, with the denial.
    ///
    /// At the end of a permission the policy decides once more, so that a line goes on without a pause under
    /// a permission that was extended. A policy that does not answer extends nothing.
    pub(crate) async fn ended(mut self, now: impl Fn() -> SystemTime) -> Denial {
        loop {
            let Some(until) = self.until else {
                return std::future::pending().await;
            };
            reached(until, &now).await;
            let renewal = permit(&*self.policy, &self.user, &self.cluster, now());
            match tokio::time::timeout(RENEWAL_TIMEOUT, renewal).await {
                Ok(Ok(permit)) => {
                    debug!(cluster = %self.cluster, "a line's permission was extended");
                    self.until = permit.until;
                }
                Ok(Err(denial)) => return denial,
                Err(_) => {
                    return Denial {
                        code: DenyCode::Expired,
                        reason: "the permission has ended, and was not extended in time".into(),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::time::Instant;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// Permits lines for an hour, a number of times.
    struct Hours {
        left: AtomicU32,
        /// Then it does not answer, in place of a denial.
        hangs: bool,
    }

    #[async_trait]
    impl Policy for Hours {
        async fn decide(&self, _: &PeerIdentity, _: &str, now: SystemTime) -> Decision {
            let left = self.left.load(Ordering::Relaxed);
            if left == 0 {
                if self.hangs {
                    std::future::pending::<()>().await;
                }
                return Decision::deny(DenyCode::NotAllowed, "no grant");
            }
            self.left.store(left - 1, Ordering::Relaxed);
            Decision::Allow {
                reason: "a grant".into(),
                until: Some(now + HOUR),
                obligations: Vec::new(),
            }
        }
    }

    fn user() -> PeerIdentity {
        let now = SystemTime::UNIX_EPOCH;
        PeerIdentity {
            id: "spiffe://d/user/dana".parse().unwrap(),
            groups: Vec::new(),
            serial: "01".to_owned(),
            not_before: now,
            not_after: now + HOUR,
            fingerprint: [0; 32],
            public_key: Vec::new(),
        }
    }

    /// How long a line lasts under a policy, and why it ends.
    async fn lasts(policy: Hours) -> (Duration, Denial) {
        let start = Instant::now();
        let clock = move || SystemTime::UNIX_EPOCH + start.elapsed();
        let permission = LinePermission::request(Arc::new(policy), &user(), "prod", clock()).await;
        let denial = permission.unwrap().ended(clock).await;
        (start.elapsed(), denial)
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_lasts_until_its_permission_ends_and_is_not_extended() {
        let [once, twice] = [1, 2].map(|times| Hours {
            left: AtomicU32::new(times),
            hangs: false,
        });
        let (lasted, denial) = lasts(once).await;
        assert_eq!(lasted, HOUR);
        assert_eq!(denial.code, DenyCode::NotAllowed);
        let (lasted, _) = lasts(twice).await;
        assert_eq!(lasted, 2 * HOUR);
    }

    #[tokio::test(start_paused = true)]
    async fn a_policy_that_does_not_answer_extends_nothing() {
        let hangs = Hours {
            left: AtomicU32::new(1),
            hangs: true,
        };
        let (lasted, denial) = lasts(hangs).await;
        assert_eq!(lasted, HOUR + RENEWAL_TIMEOUT);
        assert_eq!(denial.code, DenyCode::Expired);
    }

    #[tokio::test(start_paused = true)]
    async fn a_permission_without_an_end_does_not_end() {
        let permission =
            LinePermission::request(Arc::new(Everyone), &user(), "prod", SystemTime::now()).await;
        let ended = permission.unwrap().ended(SystemTime::now);
        assert!(tokio::time::timeout(1000 * HOUR, ended).await.is_err());
    }
}
