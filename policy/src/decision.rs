//! The content of a decision.

use std::borrow::Cow;
use std::time::SystemTime;

use http::StatusCode;
use throwline_kube_wire::Status;

/// The answer of [`decide`](crate::decide). A caller acts on it through [`Decision::enforced_by`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Decision {
    /// It may, within bounds.
    Allow {
        /// What lets it pass, for the audit.
        reason: Cow<'static, str>,
        /// The end of the permission: what runs then is ended. `None`: it does not end before the session.
        until: Option<SystemTime>,
        /// What the caller must do for the permission to hold.
        obligations: Vec<Obligation>,
    },
    /// It may not.
    Deny {
        /// Why, for programs.
        code: DenyCode,
        /// Why, for people: what was denied, and what they can do.
        reason: Cow<'static, str>,
    },
}

/// What a permission is tied to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Obligation {
    /// What passes is recorded, or nothing passes.
    Record,
    /// The subject gives a reason first.
    Reason,
    /// Another person approves first.
    Approval,
}

/// Why something is denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DenyCode {
    /// No rule allows it.
    NotAllowed,
    /// What allowed it has ended.
    Expired,
    /// The request cannot be read as the API server will read it, so no rule can be applied to it.
    Unreadable,
    /// It is allowed on a condition that the deciding side cannot meet.
    Obligation,
}

/// A permission whose conditions its holder has promised to meet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Permit {
    /// What lets it pass, for the audit.
    pub reason: Cow<'static, str>,
    /// When what runs under it must be ended.
    pub until: Option<SystemTime>,
    /// What the holder does for it.
    pub obligations: Vec<Obligation>,
}

/// A denial.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Denial {
    /// Why, for programs.
    pub code: DenyCode,
    /// Why, for people.
    pub reason: Cow<'static, str>,
}

impl Decision {
    /// Without an end and without conditions.
    pub fn allow(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Allow {
            reason: reason.into(),
            until: None,
            obligations: Vec::new(),
        }
    }

    /// A denial.
    pub fn deny(code: DenyCode, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Deny {
            code,
            reason: reason.into(),
        }
    }

    /// What a caller may act on that meets these obligations and no others, at the time `now`.
    ///
    /// # Errors
    /// The denial; also of a permission that has ended, or that is tied to another obligation: half a
    /// condition met is none.
    pub fn enforced_by(self, met: &[Obligation], now: SystemTime) -> Result<Permit, Denial> {
        let (reason, until, obligations) = match self {
            Self::Allow {
                reason,
                until,
                obligations,
            } => (reason, until, obligations),
            Self::Deny { code, reason } => return Err(Denial { code, reason }),
        };
        if until.is_some_and(|until| until <= now) {
            return Err(Denial {
                code: DenyCode::Expired,
                reason: "the permission has ended".into(),
            });
        }
        match obligations.iter().find(|needed| !met.contains(needed)) {
            Some(needed) => Err(Denial {
                code: DenyCode::Obligation,
                reason: needed.unmet().into(),
            }),
            None => Ok(Permit {
                reason,
                until,
                obligations,
            }),
        }
    }
}

impl Obligation {
    fn unmet(self) -> &'static str {
        match self {
            Self::Record => "it may only be done recorded, and this version does not record",
            Self::Reason => "it may only be done for a reason, and this version asks for none",
            Self::Approval => "it needs an approval, and this version asks for none",
        }
    }
}

impl From<Denial> for Status {
    fn from(denial: Denial) -> Self {
        match denial.code {
            DenyCode::Unreadable => Self::bad_request(denial.reason),
            DenyCode::NotAllowed | DenyCode::Expired | DenyCode::Obligation => {
                Self::new(StatusCode::FORBIDDEN, "Forbidden", denial.reason)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn recorded(until: Option<SystemTime>) -> Decision {
        Decision::Allow {
            reason: "a grant".into(),
            until,
            obligations: vec![Obligation::Record, Obligation::Reason],
        }
    }

    #[test]
    fn an_obligation_that_is_not_met_is_a_denial() {
        for met in [&[][..], &[Obligation::Record], &[Obligation::Approval]] {
            let denial = recorded(None).enforced_by(met, NOW).unwrap_err();
            assert_eq!(denial.code, DenyCode::Obligation, "{met:?}");
            assert_eq!(Status::from(denial).code, 403);
        }
        let met = [Obligation::Reason, Obligation::Record];
        let permit = recorded(None).enforced_by(&met, NOW).unwrap();
        assert_eq!(permit.obligations.len(), 2);
    }

    #[test]
    fn a_permission_ends_at_its_end_and_not_before() {
        let met = [Obligation::Reason, Obligation::Record];
        let end = NOW + Duration::from_secs(1);
        let permit = recorded(Some(end)).enforced_by(&met, NOW).unwrap();
        assert_eq!(permit.until, Some(end));
        let denial = recorded(Some(end)).enforced_by(&met, end).unwrap_err();
        assert_eq!(denial.code, DenyCode::Expired);
    }

    #[test]
    fn a_denial_stays_one() {
        let denied = Decision::deny(DenyCode::Unreadable, "why");
        let denial = denied.enforced_by(&[Obligation::Record], NOW).unwrap_err();
        let status = Status::from(denial);
        assert_eq!(
            (status.code.as_u16(), status.message.as_str()),
            (400, "why")
        );
    }
}
