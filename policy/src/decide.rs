//! Whether a subject may make a request.

use std::time::SystemTime;

use throwline_kube_wire::{RequestInfo, RequestInfoError};

use crate::decision::{Decision, DenyCode, Obligation};

/// The user of a verified certificate.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// As the certificate has it.
    pub name: &'a str,
    /// As the certificate has them.
    pub groups: &'a [String],
}

/// The request.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// A line to the cluster. Decided for the relay, which sees no more of it.
    Line {
        /// Its name.
        cluster: &'a str,
    },
    /// A request to the API server. Decided for the agent.
    Api {
        /// The agent's own.
        cluster: &'a str,
        /// The strict reading. A rule that looks at it denies a request which has none
        /// ([`DenyCode::Unreadable`]); where no rule does, such a request is the API server's to judge.
        info: Result<&'a RequestInfo, RequestInfoError>,
    },
}

/// The rules in force at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PolicySet {
    /// What holds where no rule applies.
    pub access: Access,
    /// The end of the set, unless another has taken its place by then. `None`: it has none.
    pub until: Option<SystemTime>,
    /// What all that is allowed is tied to.
    pub obligations: Vec<Obligation>,
}

/// What holds without a rule.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Access {
    /// Every enrolled user may reach every enrolled cluster: for as long as one team owns a relay. The
    /// cluster's RBAC still has each user's name.
    #[default]
    Everyone,
    /// No user may do anything: the set of a side that has not received its rules yet.
    Closed,
}

impl PolicySet {
    /// Only this access, and no rule.
    #[must_use]
    pub fn of(access: Access) -> Self {
        Self {
            access,
            ..Self::default()
        }
    }
}

/// Decides one request. Pure: the same arguments have the same answer.
///
/// ```
/// use std::time::{Duration, SystemTime};
/// use throwline_policy::{DenyCode, PolicySet, Request, Subject, decide};
///
/// let now = SystemTime::now();
/// let subject = Subject { name: "dana", groups: &[] };
/// let request = Request::Line { cluster: "prod-eu" };
/// let mut set = PolicySet::default();
/// set.until = Some(now + Duration::from_secs(3600));
///
/// // The caller declares the obligations that it fulfils: none here.
/// let permit = decide(&subject, &request, now, &set).enforced_by(&[], now).unwrap();
/// assert_eq!(permit.until, set.until);
///
/// let later = now + Duration::from_secs(3600);
/// let denial = decide(&subject, &request, later, &set).enforced_by(&[], later).unwrap_err();
/// assert_eq!(denial.code, DenyCode::Expired);
/// ```
pub fn decide(
    subject: &Subject<'_>,
    request: &Request<'_>,
    now: SystemTime,
    set: &PolicySet,
) -> Decision {
    if subject.name.is_empty() {
        let reason = "the session's certificate names no user";
        return Decision::deny(DenyCode::NotAllowed, reason);
    }
    if set.until.is_some_and(|until| until <= now) {
        let reason = "the rules for this cluster have ended, and no newer ones have arrived";
        return Decision::deny(DenyCode::Expired, reason);
    }
    match (set.access, request) {
        (Access::Everyone, _) => Decision::Allow {
            reason: "every enrolled user".into(),
            until: set.until,
            obligations: set.obligations.clone(),
        },
        (Access::Closed, Request::Line { cluster } | Request::Api { cluster, .. }) => {
            Decision::deny(
                DenyCode::NotAllowed,
                format!("you may not reach the cluster {cluster}"),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::decision::Denial;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const LINE: Request<'_> = Request::Line { cluster: "prod" };
    const UNREADABLE: Request<'_> = Request::Api {
        cluster: "prod",
        info: Err(RequestInfoError::Method),
    };

    fn ask(name: &str, request: &Request<'_>, set: &PolicySet) -> Result<(), Denial> {
        let subject = Subject { name, groups: &[] };
        let decision = decide(&subject, request, NOW, set);
        decision.enforced_by(&[], NOW).map(|_| ())
    }

    #[test]
    fn every_enrolled_user_may_do_what_rbac_allows_by_default() {
        let set = PolicySet::default();
        for request in [LINE, UNREADABLE] {
            assert_eq!(ask("dana", &request, &set), Ok(()));
            let denial = ask("", &request, &set).unwrap_err();
            assert_eq!(denial.code, DenyCode::NotAllowed);
        }
    }

    #[test]
    fn a_closed_set_denies_all_and_names_the_cluster() {
        let set = PolicySet::of(Access::Closed);
        for request in [LINE, UNREADABLE] {
            let denial = ask("dana", &request, &set).unwrap_err();
            assert_eq!(denial.code, DenyCode::NotAllowed);
            assert!(denial.reason.contains("prod"), "{denial}");
        }
    }

    #[test]
    fn what_a_set_allows_ends_with_it_and_has_its_obligations() {
        let subject = Subject {
            name: "dana",
            groups: &[],
        };
        let mut set = PolicySet {
            until: Some(NOW + Duration::from_secs(1)),
            ..PolicySet::default()
        };
        let permit = decide(&subject, &LINE, NOW, &set)
            .enforced_by(&[], NOW)
            .unwrap();
        assert_eq!(permit.until, set.until);
        set.obligations.push(Obligation::Record);
        let denial = ask("dana", &LINE, &set).unwrap_err();
        assert_eq!(denial.code, DenyCode::Obligation);
        set.until = Some(NOW);
        let denial = ask("dana", &LINE, &set).unwrap_err();
        assert_eq!(denial.code, DenyCode::Expired);
    }
}
