//! Patches that know which lists are maps: strategic merge and server-side apply.

pub(crate) mod fields;
pub(crate) mod strategic;

use serde_json::Value;

/// How the items of a list are distinguished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListKind {
    /// One value as a whole.
    Atomic,
    /// By their own value.
    Set,
    /// By these keys; the first is the merge key of strategic patches.
    Map(&'static [&'static str]),
}

/// The lists of the served kinds that are not atomic, by the name of their field.
pub(crate) fn list_kind(field: &str, of_containers: bool) -> ListKind {
    match field {
        "containers"
        | "initContainers"
        | "ephemeralContainers"
        | "env"
        | "volumes"
        | "imagePullSecrets"
        | "secrets" => ListKind::Map(&["name"]),
        "volumeMounts" => ListKind::Map(&["mountPath"]),
        "volumeDevices" => ListKind::Map(&["devicePath"]),
        "ports" if of_containers => ListKind::Map(&["containerPort", "protocol"]),
        "ports" => ListKind::Map(&["port", "protocol"]),
        "conditions" | "addresses" => ListKind::Map(&["type"]),
        "ownerReferences" => ListKind::Map(&["uid"]),
        "hostAliases" | "podIPs" => ListKind::Map(&["ip"]),
        "topologySpreadConstraints" => ListKind::Map(&["topologyKey", "whenUnsatisfiable"]),
        "finalizers" => ListKind::Set,
        _ => ListKind::Atomic,
    }
}

/// The same, derived from the items themselves where the field's name is not enough.
fn list_kind_of(field: &str, items: &[Value]) -> ListKind {
    list_kind(
        field,
        items.iter().any(|item| item.get("containerPort").is_some()),
    )
}
