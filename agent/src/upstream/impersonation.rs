//! How the agent's own account may act for users, and what its ceiling excludes: read from the rules that
//! the API server lists for it. Pure.
//!
//! Constrained impersonation (KEP-5284, on by default since Kubernetes 1.36) requires
//! `impersonate:user-info` on the user and `impersonate-on:user-info:VERB` on the request's target; the
//! second is a ceiling. The older verb `impersonate` has none, and is checked where the first two are
//! refused. After one request that it allowed, the API server checks it first for all users. So a ceiling is in force only where no right of the older kind is there.

use serde_json::Value;
use throwline_tunnel::proto::messages::Impersonation;

use throwline_policy::rules::CREDENTIAL_EXTRA;

/// The API group of users, groups and extras in constrained impersonation.
pub(crate) const AUTHENTICATION: &str = "authentication.k8s.io";
pub(crate) const WHO: &str = "impersonate:user-info";
pub(crate) const LEGACY: &str = "impersonate";
const ON: &str = "impersonate-on:user-info:";

/// What an account may do about the parts of an identity.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) users: bool,
    pub(crate) groups: bool,
    pub(crate) extras: bool,
}

/// The rights of the agent's account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rights {
    pub(crate) how: Impersonation,
    /// Resources that the account lacks the right to impersonate.
    pub(crate) missing: Vec<String>,
    /// What the ceiling does not allow in any namespace, in words.
    pub(crate) ceiling: Vec<&'static str>,
}

impl Rights {
    /// `needs_extra`: the fingerprint of the user's certificate is sent along.
    pub(crate) fn new(constrained: Parts, legacy: Parts, needs_extra: bool) -> Self {
        let any_legacy = legacy.users || legacy.groups || legacy.extras;
        let how = match (constrained.users, any_legacy) {
            // An older right beside it lifts the ceiling of constrained impersonation, so both
            // together are reported.
            (true, true) => Impersonation::Both,
            (true, false) => Impersonation::Constrained,
            (false, _) if legacy.users => Impersonation::Legacy,
            (false, _) => Impersonation::None,
        };
        let used = match how {
            Impersonation::Legacy => legacy,
            _ => constrained,
        };
        let mut missing = Vec::new();
        if !used.users {
            missing.push("users".to_owned());
        }
        if !used.groups {
            missing.push("groups".to_owned());
        }
        if !used.extras && needs_extra {
            missing.push(format!("userextras/{CREDENTIAL_EXTRA}"));
        }
        Self {
            how,
            missing,
            ceiling: Vec::new(),
        }
    }

    /// Reads a `SelfSubjectRulesReview`. `None`: it is incomplete.
    pub(crate) fn read(review: &Value, needs_extra: bool) -> Option<Self> {
        let status = review.get("status")?;
        let rules = status.get("resourceRules")?.as_array()?;
        // A missing rule proves nothing then: each right is asked for by itself.
        if status.get("incomplete").and_then(Value::as_bool) != Some(false) {
            return None;
        }
        let any = |verb: &str, group: &str, resource: &str| {
            rules.iter().any(|rule| {
                lists(rule, "verbs", verb)
                    && lists_or_all(rule, "apiGroups", group)
                    && covers(rule, resource)
            })
        };
        let extra = format!("userextras/{CREDENTIAL_EXTRA}");
        // The verb "*" is no ceiling, but all of the older kind.
        let constrained = Parts {
            users: any(WHO, AUTHENTICATION, "users"),
            groups: any(WHO, AUTHENTICATION, "groups"),
            extras: any(WHO, AUTHENTICATION, &extra),
        };
        let older =
            |group: &str, resource: &str| any(LEGACY, group, resource) || any("*", group, resource);
        let legacy = Parts {
            users: older("", "users"),
            groups: older("", "groups"),
            extras: older(AUTHENTICATION, &extra),
        };
        let mut rights = Self::new(constrained, legacy, needs_extra);
        if rights.how == Impersonation::Constrained {
            rights.ceiling = ceiling(rules);
        }
        Some(rights)
    }

    /// The details: what is wrong, or what the ceiling is.
    pub(crate) fn message(&self) -> String {
        let lacks = || format!("the agent may not impersonate {}", self.missing.join(", "));
        match self.how {
            Impersonation::Both => "the ceiling is not in force: the agent's account has the verb impersonate as well; \
                                    remove that binding"
                .to_owned(),
            Impersonation::Unsupported => "the agent's account has rights of constrained impersonation only, which this \
                                           API server does not know (Kubernetes 1.36 does): users are refused"
                .to_owned(),
            _ if !self.missing.is_empty() => lacks(),
            _ if !self.ceiling.is_empty() => format!("ceiling: {}", self.ceiling.join(", ")),
            _ => String::new(),
        }
    }

    /// Logs it: once, when it is found or has changed.
    pub(crate) fn log(&self) {
        let (how, missing) = (self.how.as_str(), self.missing.join(", "));
        match self.how {
            Impersonation::Both | Impersonation::Unsupported => {
                tracing::warn!(impersonation = how, "{}", self.message());
            }
            _ if !missing.is_empty() => tracing::warn!(
                impersonation = how,
                missing,
                "the agent's own account may not impersonate all that it has to; bind it to the ClusterRole \
                 throwline-who, and to one of the ceilings (docs/operating.md)"
            ),
            Impersonation::Legacy => tracing::info!(
                impersonation = how,
                "the agent acts for users by the verb impersonate, so there is no ceiling"
            ),
            _ => tracing::info!(
                impersonation = how,
                ceiling = self.ceiling.join(", "),
                "the agent acts for users below a ceiling"
            ),
        }
    }
}

/// What the rules for all namespaces exclude.
fn ceiling(rules: &[Value]) -> Vec<&'static str> {
    let on = |verbs: &[&str], resource: &str| {
        rules.iter().any(|rule| {
            verbs
                .iter()
                .any(|verb| lists(rule, "verbs", &format!("{ON}{verb}")))
                && lists_or_all(rule, "apiGroups", "")
                && covers(rule, resource)
        })
    };
    if !on(&["get", "list"], "pods") {
        // Rules of other namespaces are not listed.
        return vec!["nothing but in single namespaces"];
    }
    let mut leaves_out = Vec::new();
    if !on(&["get", "create"], "pods/exec") {
        leaves_out.push("no exec");
    }
    if !on(&["get", "list", "watch"], "secrets") {
        leaves_out.push("no secrets");
    }
    let writes = ["create", "update", "patch", "delete", "deletecollection"];
    let may_write = rules.iter().any(|rule| {
        let writes = writes
            .iter()
            .any(|verb| lists(rule, "verbs", &format!("{ON}{verb}")));
        writes && !is_about_reviews(rule)
    });
    if !may_write {
        leaves_out.push("no writes");
    }
    leaves_out
}

/// `kubectl auth can-i` and `whoami` only read, though by a create.
fn is_about_reviews(rule: &Value) -> bool {
    let resources = strings(rule, "resources");
    let mut all = resources.iter().peekable();
    all.peek().is_some() && all.all(|resource| resource.starts_with("selfsubject"))
}

fn covers(rule: &Value, resource: &str) -> bool {
    let below = resource
        .split_once('/')
        .map(|(_, subresource)| format!("*/{subresource}"));
    let resources = strings(rule, "resources");
    resources
        .iter()
        .any(|one| *one == "*" || *one == resource || below.as_deref() == Some(*one))
}

fn lists(rule: &Value, field: &str, value: &str) -> bool {
    strings(rule, field).contains(&value)
}

fn lists_or_all(rule: &Value, field: &str, value: &str) -> bool {
    strings(rule, field)
        .iter()
        .any(|one| *one == "*" || *one == value)
}

fn strings<'a>(rule: &'a Value, field: &str) -> Vec<&'a str> {
    let list = rule.get(field).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn who(names: &[&str]) -> Value {
        json!({"verbs": [WHO], "apiGroups": [AUTHENTICATION], "resourceNames": names,
               "resources": ["users", "groups", "userextras/throwline.dev/credential-id"]})
    }

    fn on(verbs: &[&str], resources: &[&str]) -> Value {
        let verbs: Vec<_> = verbs.iter().map(|verb| format!("{ON}{verb}")).collect();
        json!({"verbs": verbs, "apiGroups": [""], "resources": resources})
    }

    fn legacy() -> Value {
        json!({"verbs": ["impersonate"], "apiGroups": ["", AUTHENTICATION],
               "resources": ["users", "groups", "userextras/throwline.dev/credential-id"]})
    }

    fn rights(rules: &[Value]) -> Rights {
        let review = json!({"status": {"resourceRules": rules, "nonResourceRules": [], "incomplete": false}});
        Rights::read(&review, true).unwrap()
    }

    #[test]
    fn the_kinds_of_accounts_are_distinguished() {
        use Impersonation::{Both, Constrained, Legacy, None};
        let view = || {
            on(
                &["get", "list", "watch"],
                &["pods", "pods/log", "configmaps"],
            )
        };
        let everything = json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]});
        for (rules, how) in [
            (vec![who(&[]), view()], Constrained),
            (vec![who(&["dana"]), view()], Constrained),
            (vec![who(&[])], Constrained),
            (vec![legacy()], Legacy),
            (vec![everything.clone()], Legacy),
            (vec![who(&[]), view(), legacy()], Both),
            (vec![who(&[]), view(), everything], Both),
            (vec![view()], None),
            (vec![], None),
        ] {
            let rights = rights(&rules);
            assert_eq!(rights.how, how, "{rules:?}");
            let lacks = if how == None { 3 } else { 0 };
            assert_eq!(rights.missing.len(), lacks, "{rules:?}");
        }
        // One right of the older kind is enough to void the ceiling for a user without groups.
        let users = json!({"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"]});
        assert_eq!(rights(&[who(&[]), users]).how, Both);
        // The cluster's own "edit" may impersonate service accounts, which agents never do.
        let accounts =
            json!({"verbs": ["impersonate"], "apiGroups": [""], "resources": ["serviceaccounts"]});
        assert_eq!(rights(&[who(&[]), accounts]).how, Constrained);
    }

    #[test]
    fn a_ceiling_is_described_by_what_it_excludes() {
        let read = ["get", "list", "watch"];
        let reviews = json!({"verbs": [format!("{ON}create")], "apiGroups": ["authorization.k8s.io"],
                             "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]});
        let view = [who(&[]), reviews.clone(), on(&read, &["pods", "pods/log"])];
        assert_eq!(
            rights(&view).ceiling,
            ["no exec", "no secrets", "no writes"]
        );
        // GET is enough for an exec by WebSocket.
        let leaky = [who(&[]), reviews.clone(), on(&read, &["*"])];
        assert_eq!(rights(&leaky).ceiling, ["no writes"]);
        let all = [who(&[]), on(&["get", "list", "create"], &["*"])];
        assert!(rights(&all).ceiling.is_empty());
        let elsewhere = [who(&[]), reviews];
        assert_eq!(
            rights(&elsewhere).ceiling,
            ["nothing but in single namespaces"]
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        let users = json!({"verbs": ["impersonate"], "apiGroups": [""], "resources": ["users"]});
        let found = rights(&[users]);
        assert_eq!(found.how, Impersonation::Legacy);
        assert_eq!(
            found.missing,
            ["groups", "userextras/throwline.dev/credential-id"]
        );
        assert!(found.message().contains("groups"));
    }

    #[test]
    fn an_incomplete_answer_is_not_used() {
        for status in [
            json!({"resourceRules": [], "incomplete": true}),
            json!({"resourceRules": []}),
            json!({"incomplete": false}),
            json!({"resourceRules": "x", "incomplete": false}),
        ] {
            assert_eq!(Rights::read(&json!({"status": status}), true), None);
        }
        // Garbage within is no right.
        let review = json!({"status": {"incomplete": false,
            "resourceRules": [null, 1, {"verbs": "impersonate"}, {"verbs": [1], "resources": {}}]}});
        assert_eq!(
            Rights::read(&review, true).unwrap().how,
            Impersonation::None
        );
    }
}
