//! The kinds that are served, once, for routing, discovery, OpenAPI and RBAC alike.

/// One resource as discovery describes it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) plural: &'static str,
    pub(crate) singular: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) short: &'static [&'static str],
    pub(crate) namespaced: bool,
    pub(crate) categories: &'static [&'static str],
    pub(crate) subresources: &'static [Sub],
    /// A review: it can be created, and is answered, but never kept.
    pub(crate) review: bool,
}

/// A subresource: its name, the group, version and kind of what it takes, and its verbs.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sub {
    pub(crate) name: &'static str,
    pub(crate) group: &'static str,
    pub(crate) version: &'static str,
    pub(crate) kind: &'static str,
    pub(crate) verbs: &'static [&'static str],
}

pub(crate) const VERBS: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
const WRITE: &[&str] = &["get", "patch", "update"];

const fn sub(name: &'static str, kind: &'static str, verbs: &'static [&'static str]) -> Sub {
    Sub {
        name,
        group: "",
        version: "",
        kind,
        verbs,
    }
}

const fn foreign(
    name: &'static str,
    group: &'static str,
    kind: &'static str,
    verbs: &'static [&'static str],
) -> Sub {
    Sub {
        name,
        group,
        version: "v1",
        kind,
        verbs,
    }
}

const BASE: Kind = Kind {
    group: "",
    version: "v1",
    plural: "",
    singular: "",
    kind: "",
    short: &[],
    namespaced: true,
    categories: &[],
    subresources: &[],
    review: false,
};
const RBAC: &str = "rbac.authorization.k8s.io";
const AUTHZ: &str = "authorization.k8s.io";

pub(crate) static KINDS: &[Kind] = &[
    Kind {
        plural: "configmaps",
        singular: "configmap",
        kind: "ConfigMap",
        short: &["cm"],
        ..BASE
    },
    Kind {
        plural: "events",
        singular: "event",
        kind: "Event",
        short: &["ev"],
        ..BASE
    },
    Kind {
        plural: "namespaces",
        singular: "namespace",
        kind: "Namespace",
        short: &["ns"],
        namespaced: false,
        subresources: &[
            sub("status", "Namespace", WRITE),
            sub("finalize", "Namespace", &["update"]),
        ],
        ..BASE
    },
    Kind {
        plural: "nodes",
        singular: "node",
        kind: "Node",
        short: &["no"],
        namespaced: false,
        subresources: &[sub("status", "Node", WRITE)],
        ..BASE
    },
    Kind {
        plural: "pods",
        singular: "pod",
        kind: "Pod",
        short: &["po"],
        categories: &["all"],
        subresources: &[
            sub("attach", "PodAttachOptions", &["create", "get"]),
            foreign("eviction", "policy", "Eviction", &["create"]),
            sub("exec", "PodExecOptions", &["create", "get"]),
            sub("log", "Pod", &["get"]),
            sub("portforward", "PodPortForwardOptions", &["create", "get"]),
            sub("status", "Pod", WRITE),
        ],
        ..BASE
    },
    Kind {
        plural: "secrets",
        singular: "secret",
        kind: "Secret",
        ..BASE
    },
    Kind {
        plural: "serviceaccounts",
        singular: "serviceaccount",
        kind: "ServiceAccount",
        short: &["sa"],
        subresources: &[foreign(
            "token",
            "authentication.k8s.io",
            "TokenRequest",
            &["create"],
        )],
        ..BASE
    },
    Kind {
        plural: "services",
        singular: "service",
        kind: "Service",
        short: &["svc"],
        categories: &["all"],
        subresources: &[sub("status", "Service", WRITE)],
        ..BASE
    },
    Kind {
        group: "apps",
        plural: "deployments",
        singular: "deployment",
        kind: "Deployment",
        short: &["deploy"],
        categories: &["all"],
        subresources: &[
            foreign("scale", "autoscaling", "Scale", WRITE),
            sub("status", "Deployment", WRITE),
        ],
        ..BASE
    },
    Kind {
        group: "apps",
        plural: "replicasets",
        singular: "replicaset",
        kind: "ReplicaSet",
        short: &["rs"],
        categories: &["all"],
        subresources: &[
            foreign("scale", "autoscaling", "Scale", WRITE),
            sub("status", "ReplicaSet", WRITE),
        ],
        ..BASE
    },
    Kind {
        group: "authentication.k8s.io",
        plural: "selfsubjectreviews",
        singular: "selfsubjectreview",
        kind: "SelfSubjectReview",
        namespaced: false,
        review: true,
        ..BASE
    },
    Kind {
        group: AUTHZ,
        plural: "localsubjectaccessreviews",
        singular: "localsubjectaccessreview",
        kind: "LocalSubjectAccessReview",
        review: true,
        ..BASE
    },
    Kind {
        group: AUTHZ,
        plural: "selfsubjectaccessreviews",
        singular: "selfsubjectaccessreview",
        kind: "SelfSubjectAccessReview",
        namespaced: false,
        review: true,
        ..BASE
    },
    Kind {
        group: AUTHZ,
        plural: "selfsubjectrulesreviews",
        singular: "selfsubjectrulesreview",
        kind: "SelfSubjectRulesReview",
        namespaced: false,
        review: true,
        ..BASE
    },
    Kind {
        group: AUTHZ,
        plural: "subjectaccessreviews",
        singular: "subjectaccessreview",
        kind: "SubjectAccessReview",
        namespaced: false,
        review: true,
        ..BASE
    },
    Kind {
        group: "coordination.k8s.io",
        plural: "leases",
        singular: "lease",
        kind: "Lease",
        ..BASE
    },
    Kind {
        group: RBAC,
        plural: "clusterrolebindings",
        singular: "clusterrolebinding",
        kind: "ClusterRoleBinding",
        namespaced: false,
        ..BASE
    },
    Kind {
        group: RBAC,
        plural: "clusterroles",
        singular: "clusterrole",
        kind: "ClusterRole",
        namespaced: false,
        ..BASE
    },
    Kind {
        group: RBAC,
        plural: "rolebindings",
        singular: "rolebinding",
        kind: "RoleBinding",
        ..BASE
    },
    Kind {
        group: RBAC,
        plural: "roles",
        singular: "role",
        kind: "Role",
        ..BASE
    },
];

impl Kind {
    pub(crate) fn find(group: &str, version: &str, plural: &str) -> Option<&'static Self> {
        KINDS
            .iter()
            .find(|kind| kind.group == group && kind.version == version && kind.plural == plural)
    }

    /// For kinds that this code itself names.
    pub(crate) fn named(plural: &str) -> &'static Self {
        KINDS
            .iter()
            .find(|kind| kind.plural == plural)
            .unwrap_or(&KINDS[0])
    }

    pub(crate) fn api_version(&self) -> String {
        group_version(self.group, self.version)
    }

    /// `deployments.apps`, as error messages name it.
    pub(crate) fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    pub(crate) fn verbs(&self) -> &'static [&'static str] {
        if self.review { &["create"] } else { VERBS }
    }

    pub(crate) fn subresource(&self, name: &str) -> Option<&'static Sub> {
        self.subresources.iter().find(|sub| sub.name == name)
    }
}

pub(crate) fn group_version(group: &str, version: &str) -> String {
    if group.is_empty() {
        version.to_owned()
    } else {
        format!("{group}/{version}")
    }
}

/// The groups other than the legacy one, in order.
pub(crate) fn groups() -> Vec<&'static str> {
    let mut groups: Vec<&str> = KINDS
        .iter()
        .map(|kind| kind.group)
        .filter(|group| !group.is_empty())
        .collect();
    groups.dedup();
    groups
}

pub(crate) fn in_group(group: &str) -> impl Iterator<Item = &'static Kind> {
    let group = group.to_owned();
    KINDS.iter().filter(move |kind| kind.group == group)
}
