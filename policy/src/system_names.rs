//! Names that begin with `system:`, which Kubernetes keeps for its own components.
//!
//! Its bootstrap roles are bound to them: a user in `system:nodes`, or called
//! `system:kube-controller-manager`, has rights that no administrator granted to a person. So they
//! are refused where tokens are made, where certificates are issued and in the agent, each on its
//! own, unless one is allowed there by its exact name.

/// Kubernetes: "names prefixed with `system:` are reserved for Kubernetes system use".
const PREFIX: &str = "system:";
/// The API server permits this group everything, before RBAC.
const MASTERS: &str = "system:masters";
/// The API server adds it to every authenticated user, also by impersonation.
pub const AUTHENTICATED: &str = "system:authenticated";

/// A name that may not pass, or cannot be an exception, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ReservedName(String);

/// The exceptions. By default there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SystemNames(Vec<String>);

impl SystemNames {
    /// Exceptions for these names.
    ///
    /// ```
    /// use throwline_policy::SystemNames;
    ///
    /// let names = SystemNames::allowing(vec!["system:nodes".to_owned()]).unwrap();
    /// assert!(names.check("dana", &["system:nodes".to_owned()]).is_ok());
    /// assert!(names.check("system:admin", &[]).is_err());
    /// assert!(SystemNames::allowing(vec!["system:masters".to_owned()]).is_err());
    /// ```
    ///
    /// # Errors
    /// A name that is not in Kubernetes' own name space, so needs no permission, or
    /// `system:masters`, which is never passed on.
    pub fn allowing(names: Vec<String>) -> Result<Self, ReservedName> {
        for name in &names {
            check_exception(name)?;
        }
        Ok(Self(names))
    }

    /// Checks a user and the groups.
    ///
    /// # Errors
    /// The user or one of the groups is Kubernetes' own, and not allowed. The group
    /// [`AUTHENTICATED`] passes, since every user has it anyway.
    pub fn check(&self, user: &str, groups: &[String]) -> Result<(), ReservedName> {
        if !self.allows(user) {
            return Err(ReservedName(refusal("user", user)));
        }
        let refused = groups
            .iter()
            .find(|group| *group != AUTHENTICATED && !self.allows(group));
        match refused {
            Some(group) => Err(ReservedName(refusal("group", group))),
            None => Ok(()),
        }
    }

    fn allows(&self, name: &str) -> bool {
        !name.starts_with(PREFIX) || (name != MASTERS && self.0.iter().any(|one| one == name))
    }
}

/// Whether `name` can be an exception at all; for the parsers of flags.
///
/// # Errors
/// See [`SystemNames::allowing`].
pub fn check_exception(name: &str) -> Result<(), ReservedName> {
    if name == MASTERS {
        return Err(ReservedName(refusal("group", MASTERS)));
    }
    match name.strip_prefix(PREFIX) {
        Some(rest) if !rest.is_empty() => Ok(()),
        _ => Err(ReservedName(format!(
            "{name:?} does not begin with \"{PREFIX}\", so it needs no exception"
        ))),
    }
}

fn refusal(what: &str, name: &str) -> String {
    if name == MASTERS {
        return format!(
            "the {what} \"{MASTERS}\" does not pass through throwline, because it is above the cluster's RBAC; \
             give the user a group of your own and bind that one, to cluster-admin if need be"
        );
    }
    format!(
        "the {what} {name:?} does not pass through throwline, because Kubernetes keeps names with \"{PREFIX}\" for its \
         own components; use a name of your own, or allow this one with --allow-system-name where the token is made, \
         at the relay and at the agent"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(allowed: &[&str], user: &str, groups: &[&str]) -> Result<(), String> {
        let owned = |names: &[&str]| {
            names
                .iter()
                .map(|&name| name.to_owned())
                .collect::<Vec<_>>()
        };
        let names = SystemNames::allowing(owned(allowed)).unwrap();
        names
            .check(user, &owned(groups))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn names_of_kubernetes_pass_only_where_they_are_allowed() {
        for (user, groups) in [
            ("system:kube-controller-manager", vec![]),
            ("system:node:a", vec![]),
            ("system:serviceaccount:kube-system:x", vec![]),
            ("system:anonymous", vec![]),
            ("system:", vec![]),
            ("dana", vec!["devs", "system:nodes"]),
            ("dana", vec!["system:unauthenticated"]),
            ("dana", vec!["system:masters"]),
        ] {
            let error = check(&["system:other"], user, &groups).unwrap_err();
            assert!(error.contains("throwline"), "{error}");
        }
        let groups = ["devs", "system:authenticated", "systems", "my:system:x"];
        check(&[], "dana", &groups).unwrap();
        check(&["system:admin"], "system:admin", &[]).unwrap();
        check(&["system:nodes"], "dana", &["system:nodes"]).unwrap();
        check(&["system:node:a"], "system:node:ab", &[]).unwrap_err();
    }

    #[test]
    fn masters_can_never_be_allowed() {
        for bad in ["system:masters", "devs", "system:", ""] {
            let names = SystemNames::allowing(vec![bad.to_owned()]);
            assert!(names.is_err(), "{bad}");
        }
    }
}
