//! Server-side tables: the columns of each kind, as `kubectl get` prints them.

use std::sync::Arc;

use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::{
    json::{flag, items, members, number, parse_time, text},
    kinds::Kind,
};

/// How much of the object goes into each row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Include {
    None,
    Metadata,
    Object,
}

/// A column: name, type, and whether it is shown only with `-o wide`.
type Column = (&'static str, &'static str, bool);

pub(crate) fn render(
    kind: &Kind,
    objects: &[Arc<Value>],
    metadata: Value,
    include: Include,
    columns: bool,
) -> Value {
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut row = json!({"cells": cells(kind, object)});
            match include {
                Include::None => {}
                Include::Metadata => row["object"] = metadata_of(object),
                Include::Object => row["object"] = Value::clone(object),
            }
            row
        })
        .collect();
    let definitions: Vec<Value> = columns_of(kind)
        .iter()
        .filter(|_| columns)
        .map(|(name, of, wide)| {
            let format = if *name == "Name" { "name" } else { "" };
            json!({"name": name, "type": of, "format": format, "description": "", "priority": u8::from(*wide)})
        })
        .collect();
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "columnDefinitions": definitions,
        "rows": rows,
    })
}

pub(crate) fn metadata_of(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

fn columns_of(kind: &Kind) -> &'static [Column] {
    const NAME: Column = ("Name", "string", false);
    const AGE: Column = ("Age", "string", false);
    match kind.plural {
        "pods" => &[
            NAME,
            ("Ready", "string", false),
            ("Status", "string", false),
            ("Restarts", "string", false),
            AGE,
            ("IP", "string", true),
            ("Node", "string", true),
            ("Nominated Node", "string", true),
            ("Readiness Gates", "string", true),
        ],
        "configmaps" => &[NAME, ("Data", "integer", false), AGE],
        "secrets" => &[
            NAME,
            ("Type", "string", false),
            ("Data", "integer", false),
            AGE,
        ],
        "namespaces" => &[NAME, ("Status", "string", false), AGE],
        "nodes" => &[
            NAME,
            ("Status", "string", false),
            ("Roles", "string", false),
            AGE,
            ("Version", "string", false),
            ("Internal-IP", "string", true),
            ("OS-Image", "string", true),
        ],
        "serviceaccounts" => &[NAME, AGE],
        "services" => &[
            NAME,
            ("Type", "string", false),
            ("Cluster-IP", "string", false),
            ("External-IP", "string", false),
            ("Port(s)", "string", false),
            AGE,
            ("Selector", "string", true),
        ],
        "events" => &[
            ("Last Seen", "string", false),
            ("Type", "string", false),
            ("Reason", "string", false),
            ("Object", "string", false),
            ("Message", "string", false),
            ("Name", "string", true),
        ],
        "deployments" => &[
            NAME,
            ("Ready", "string", false),
            ("Up-to-date", "integer", false),
            ("Available", "integer", false),
            AGE,
            ("Containers", "string", true),
            ("Images", "string", true),
            ("Selector", "string", true),
        ],
        "replicasets" => &[
            NAME,
            ("Desired", "integer", false),
            ("Current", "integer", false),
            ("Ready", "integer", false),
            AGE,
            ("Containers", "string", true),
            ("Images", "string", true),
            ("Selector", "string", true),
        ],
        "clusterrolebindings" | "rolebindings" => &[NAME, ("Role", "string", false), AGE],
        "clusterroles" | "roles" => &[NAME, ("Created At", "date", false)],
        "leases" => &[NAME, ("Holder", "string", false), AGE],
        _ => &[NAME, ("Created At", "date", false)],
    }
}

fn cells(kind: &Kind, object: &Value) -> Vec<Value> {
    let name = text(object, "/metadata/name");
    let age = since(text(object, "/metadata/creationTimestamp"));
    let count = |pointer: &str| members(object, pointer).map_or(0, serde_json::Map::len);
    let replicas = |pointer: &str| number(object, pointer).unwrap_or(0);
    let containers = items(object, "/spec/template/spec/containers");
    let join = |field: &str| {
        containers
            .iter()
            .map(|one| text(one, field))
            .collect::<Vec<_>>()
            .join(",")
    };
    match kind.plural {
        "pods" => {
            let all = items(object, "/spec/containers").len();
            let statuses = items(object, "/status/containerStatuses");
            let ready = statuses
                .iter()
                .filter(|status| flag(status, "/ready"))
                .count();
            let restarts = statuses
                .iter()
                .filter_map(|status| number(status, "/restartCount"))
                .sum::<i64>();
            let last = statuses
                .iter()
                .map(|status| text(status, "/lastState/terminated/finishedAt"))
                .max();
            let restarts = match last {
                Some(last) if restarts > 0 && !last.is_empty() => {
                    format!("{restarts} ({} ago)", since(last))
                }
                _ => restarts.to_string(),
            };
            let or_none = |value: &str| {
                if value.is_empty() {
                    "<none>".to_owned()
                } else {
                    value.to_owned()
                }
            };
            vec![
                json!(name),
                json!(format!("{ready}/{all}")),
                json!(pod_status(object)),
                json!(restarts),
                json!(age),
                json!(or_none(text(object, "/status/podIP"))),
                json!(or_none(text(object, "/spec/nodeName"))),
                json!("<none>"),
                json!("<none>"),
            ]
        }
        "configmaps" => vec![
            json!(name),
            json!(count("/data") + count("/binaryData")),
            json!(age),
        ],
        "secrets" => vec![
            json!(name),
            json!(text(object, "/type")),
            json!(count("/data")),
            json!(age),
        ],
        "namespaces" => vec![
            json!(name),
            json!(text(object, "/status/phase")),
            json!(age),
        ],
        "nodes" => vec![
            json!(name),
            json!("Ready"),
            json!("control-plane"),
            json!(age),
            json!(text(object, "/status/nodeInfo/kubeletVersion")),
            json!(text(object, "/status/addresses/0/address")),
            json!(text(object, "/status/nodeInfo/osImage")),
        ],
        "serviceaccounts" => vec![json!(name), json!(age)],
        "services" => {
            let ports: Vec<String> = items(object, "/spec/ports")
                .iter()
                .map(|port| {
                    let node = number(port, "/nodePort")
                        .map(|port| format!(":{port}"))
                        .unwrap_or_default();
                    format!(
                        "{}{node}/{}",
                        number(port, "/port").unwrap_or(0),
                        text(port, "/protocol")
                    )
                })
                .collect();
            let ports = if ports.is_empty() {
                "<none>".to_owned()
            } else {
                ports.join(",")
            };
            let ip = text(object, "/spec/clusterIP");
            vec![
                json!(name),
                json!(text(object, "/spec/type")),
                json!(if ip.is_empty() { "<none>" } else { ip }),
                json!("<none>"),
                json!(ports),
                json!(age),
                json!(selector(object, "/spec/selector")),
            ]
        }
        "events" => {
            let of = format!(
                "{}/{}",
                text(object, "/involvedObject/kind").to_lowercase(),
                text(object, "/involvedObject/name")
            );
            let last = text(object, "/lastTimestamp");
            vec![
                json!(since(if last.is_empty() {
                    text(object, "/metadata/creationTimestamp")
                } else {
                    last
                })),
                json!(text(object, "/type")),
                json!(text(object, "/reason")),
                json!(of),
                json!(text(object, "/message").trim()),
                json!(name),
            ]
        }
        "deployments" => vec![
            json!(name),
            json!(format!(
                "{}/{}",
                replicas("/status/readyReplicas"),
                replicas("/spec/replicas")
            )),
            json!(replicas("/status/updatedReplicas")),
            json!(replicas("/status/availableReplicas")),
            json!(age),
            json!(join("/name")),
            json!(join("/image")),
            json!(selector(object, "/spec/selector/matchLabels")),
        ],
        "replicasets" => vec![
            json!(name),
            json!(replicas("/spec/replicas")),
            json!(replicas("/status/replicas")),
            json!(replicas("/status/readyReplicas")),
            json!(age),
            json!(join("/name")),
            json!(join("/image")),
            json!(selector(object, "/spec/selector/matchLabels")),
        ],
        "clusterrolebindings" | "rolebindings" => vec![
            json!(name),
            json!(format!(
                "{}/{}",
                text(object, "/roleRef/kind"),
                text(object, "/roleRef/name")
            )),
            json!(age),
        ],
        "leases" => vec![
            json!(name),
            json!(text(object, "/spec/holderIdentity")),
            json!(age),
        ],
        _ => vec![
            json!(name),
            json!(text(object, "/metadata/creationTimestamp")),
        ],
    }
}

/// The word in the STATUS column, which is the phase only when there is nothing better to say.
fn pod_status(pod: &Value) -> String {
    if pod.pointer("/metadata/deletionTimestamp").is_some() {
        return "Terminating".to_owned();
    }
    for status in items(pod, "/status/containerStatuses").iter().rev() {
        for reason in [
            text(status, "/state/waiting/reason"),
            text(status, "/state/terminated/reason"),
        ] {
            if !reason.is_empty() {
                return reason.to_owned();
            }
        }
    }
    let phase = text(pod, "/status/phase");
    if phase.is_empty() {
        "Unknown".to_owned()
    } else {
        phase.to_owned()
    }
}

fn selector(object: &Value, pointer: &str) -> String {
    let pairs: Vec<String> = members(object, pointer)
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    if pairs.is_empty() {
        "<none>".to_owned()
    } else {
        pairs.join(",")
    }
}

fn since(time: &str) -> String {
    let Some(then) = parse_time(time) else {
        return "<unknown>".to_owned();
    };
    human((OffsetDateTime::now_utc() - then).whole_seconds().max(0))
}

/// A duration in the two units that matter, as kubectl writes ages.
fn human(seconds: i64) -> String {
    let pair = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{big}{unit}")
        } else {
            format!("{big}{unit}{small}{small_unit}")
        }
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        ..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        _ => format!("{days}d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_kubectl_writes_them() {
        for (seconds, said) in [
            (5, "5s"),
            (119, "119s"),
            (120, "2m"),
            (150, "2m30s"),
            (7200, "120m"),
            (90_000, "25h"),
        ] {
            assert_eq!(human(seconds), said);
        }
    }

    #[test]
    fn every_kind_has_a_cell_for_each_column() {
        for kind in crate::kinds::KINDS {
            assert_eq!(
                cells(kind, &json!({"metadata": {"name": "x"}})).len(),
                columns_of(kind).len(),
                "{}",
                kind.plural
            );
        }
    }
}
