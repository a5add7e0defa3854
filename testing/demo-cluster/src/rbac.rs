//! Role-based access control, evaluated on each request against the roles as they are then.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::{
    Cluster,
    access::User,
    json::{items, strings, text},
    kinds::Kind,
    request::Attributes,
    status::Failure,
    store::Store,
};

/// Everything that one user may do, gathered once for a request.
pub(crate) struct Review {
    /// `system:masters` passes before any rule is read.
    master: bool,
    /// Rules with the namespace in which they hold; `None` for the whole cluster.
    rules: Vec<(Option<String>, Arc<Value>)>,
}

impl Review {
    pub(crate) fn new(cluster: &Cluster, user: &User) -> Self {
        Self::of(&cluster.store, user)
    }

    fn of(store: &Store, user: &User) -> Self {
        let master = user.groups.iter().any(|group| group == "system:masters");
        let mut rules = Vec::new();
        if !master {
            for binding in store.list(Kind::named("clusterrolebindings"), None).1 {
                if names(&binding, user) {
                    rules.extend(role(store, &binding, "").map(|role| (None, role)));
                }
            }
            for binding in store.list(Kind::named("rolebindings"), None).1 {
                if names(&binding, user) {
                    let namespace = text(&binding, "/metadata/namespace").to_owned();
                    rules.extend(
                        role(store, &binding, &namespace).map(|role| (Some(namespace), role)),
                    );
                }
            }
        }
        Self { master, rules }
    }

    pub(crate) fn allows(&self, wanted: &Attributes) -> bool {
        self.master
            || self.rules.iter().any(|(namespace, role)| {
                namespace
                    .as_ref()
                    .is_none_or(|namespace| wanted.path.is_none() && *namespace == wanted.namespace)
                    && items(role, "/rules")
                        .iter()
                        .any(|rule| rule_allows(rule, wanted))
            })
    }

    /// The rules that hold in a namespace, as SelfSubjectRulesReview lists them.
    pub(crate) fn rules_in(&self, namespace: &str) -> Value {
        let mut resources = Vec::new();
        let mut paths = Vec::new();
        if self.master {
            resources.push(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}));
            paths.push(json!({"verbs": ["*"], "nonResourceURLs": ["*"]}));
        }
        for (scope, role) in &self.rules {
            if scope.as_ref().is_some_and(|scope| scope != namespace) {
                continue;
            }
            for rule in items(role, "/rules") {
                if rule.get("nonResourceURLs").is_some() {
                    &mut paths
                } else {
                    &mut resources
                }
                .push(rule.clone());
            }
        }
        json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
    }
}

/// 403 in the API server's words.
pub(crate) fn refusal(user: &User, wanted: &Attributes) -> Failure {
    if let Some(path) = &wanted.path {
        return Failure::forbidden(format!(
            "forbidden: User {:?} cannot {} path {path:?}",
            user.name, wanted.verb
        ))
        .details(json!({}));
    }
    let qualified = if wanted.group.is_empty() {
        wanted.resource.clone()
    } else {
        format!("{}.{}", wanted.resource, wanted.group)
    };
    let subject = if wanted.name.is_empty() {
        qualified
    } else {
        format!("{qualified} {:?}", wanted.name)
    };
    let resource = if wanted.subresource.is_empty() {
        wanted.resource.clone()
    } else {
        format!("{}/{}", wanted.resource, wanted.subresource)
    };
    let place = if wanted.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", wanted.namespace)
    };
    Failure::forbidden(format!(
        "{subject} is forbidden: User {:?} cannot {} resource {resource:?} in API group {:?} {place}",
        user.name, wanted.verb, wanted.group
    ))
    .details(json!({"name": wanted.name, "group": wanted.group, "kind": wanted.resource}))
}

fn names(binding: &Value, user: &User) -> bool {
    items(binding, "/subjects").iter().any(|subject| {
        let name = text(subject, "/name");
        match text(subject, "/kind") {
            "User" => name == user.name,
            "Group" => user.groups.iter().any(|group| group == name),
            "ServiceAccount" => {
                user.name
                    == format!(
                        "system:serviceaccount:{}:{name}",
                        text(subject, "/namespace")
                    )
            }
            _ => false,
        }
    })
}

fn role(store: &Store, binding: &Value, namespace: &str) -> Option<Arc<Value>> {
    let name = text(binding, "/roleRef/name");
    match text(binding, "/roleRef/kind") {
        "ClusterRole" => store.get(Kind::named("clusterroles"), "", name),
        "Role" if !namespace.is_empty() => store.get(Kind::named("roles"), namespace, name),
        _ => None,
    }
}

fn rule_allows(rule: &Value, wanted: &Attributes) -> bool {
    let has = |list: &str, value: &str| {
        strings(rule, list)
            .iter()
            .any(|one| *one == "*" || *one == value)
    };
    if !has("/verbs", &wanted.verb) {
        return false;
    }
    if let Some(path) = &wanted.path {
        return strings(rule, "/nonResourceURLs").iter().any(|pattern| {
            match pattern.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => pattern == path,
            }
        });
    }
    if !has("/apiGroups", &wanted.group) {
        return false;
    }
    let resource = if wanted.subresource.is_empty() {
        wanted.resource.clone()
    } else {
        format!("{}/{}", wanted.resource, wanted.subresource)
    };
    let any_of = format!("*/{}", wanted.subresource);
    let resource_fits = strings(rule, "/resources").iter().any(|one| {
        *one == "*" || *one == resource || (!wanted.subresource.is_empty() && *one == any_of)
    });
    let only = strings(rule, "/resourceNames");
    resource_fits && (only.is_empty() || only.contains(&wanted.name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(rules: Value, namespace: Option<&str>) -> Store {
        let store = Store::new(16);
        let subjects = json!([{"kind": "Group", "name": "devs"}]);
        let metadata = json!({"name": "r"});
        let role_ref = json!({"kind": "ClusterRole", "name": "r"});
        store
            .create(
                Kind::named("clusterroles"),
                json!({"metadata": metadata, "rules": rules}),
            )
            .unwrap();
        let (kind, metadata) = match namespace {
            Some(namespace) => ("rolebindings", json!({"name": "r", "namespace": namespace})),
            None => ("clusterrolebindings", metadata),
        };
        let binding = json!({"metadata": metadata, "roleRef": role_ref, "subjects": subjects});
        store.create(Kind::named(kind), binding).unwrap();
        store
    }

    fn may(store: &Store, group: &str, wanted: &Attributes) -> bool {
        Review::of(store, &User::named("ann", &[group.to_owned()])).allows(wanted)
    }

    fn on(verb: &str, resource: &str, sub: &str, namespace: &str, name: &str) -> Attributes {
        Attributes {
            subresource: sub.to_owned(),
            ..Attributes::resource(verb, "", resource, namespace, name)
        }
    }

    #[test]
    fn names_and_subresources_are_kept_apart() {
        let rules = json!([
            {"verbs": ["get"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["one"]},
            {"verbs": ["create"], "apiGroups": [""], "resources": ["pods/exec"]},
        ]);
        let store = store(rules, Some("a"));
        assert!(may(&store, "devs", &on("get", "pods", "", "a", "one")));
        assert!(!may(&store, "devs", &on("get", "pods", "", "a", "two")));
        assert!(!may(&store, "devs", &on("list", "pods", "", "a", "")));
        assert!(!may(&store, "devs", &on("get", "pods", "", "b", "one")));
        assert!(may(
            &store,
            "devs",
            &on("create", "pods", "exec", "a", "one")
        ));
        assert!(!may(&store, "devs", &on("create", "pods", "", "a", "")));
        assert!(!may(&store, "others", &on("get", "pods", "", "a", "one")));
        assert!(may(
            &store,
            "system:masters",
            &on("delete", "nodes", "", "", "n")
        ));
    }

    #[test]
    fn paths_need_a_cluster_wide_binding() {
        let rules = json!([{"verbs": ["get"], "nonResourceURLs": ["/version", "/healthz/*"]}]);
        let path = |path: &str| Attributes {
            path: Some(path.to_owned()),
            ..on("get", "", "", "", "")
        };
        let everywhere = store(rules.clone(), None);
        assert!(may(&everywhere, "devs", &path("/version")));
        assert!(may(&everywhere, "devs", &path("/healthz/etcd")));
        assert!(!may(&everywhere, "devs", &path("/metrics")));
        assert!(!may(&store(rules, Some("a")), "devs", &path("/version")));
    }

    #[test]
    fn a_refusal_reads_as_the_real_one() {
        let user = User::named("ann", &[]);
        let message = refusal(&user, &on("list", "pods", "", "default", "")).to_json();
        assert_eq!(
            message["message"],
            "pods is forbidden: User \"ann\" cannot list resource \"pods\" in API group \"\" in the namespace \"default\""
        );
    }
}
