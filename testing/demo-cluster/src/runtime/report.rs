//! Running pods in the API: their status, and events.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Pod;
use crate::{Cluster, api, json, json::text, kinds::Kind, store::Decision};

/// Events are kept this many at most, the oldest first out.
const MAX_EVENTS: usize = 200;

/// Writes the status of a pod from the states of its containers.
pub(super) fn status(cluster: &Cluster, pod: &Pod) {
    let statuses: Vec<Value> = pod
        .containers
        .iter()
        .map(|container| container.status())
        .collect();
    let has = |state: &str| {
        statuses
            .iter()
            .filter(|status| status.pointer(&format!("/state/{state}")).is_some())
            .count()
    };
    let failed = statuses.iter().any(|status| {
        json::number(status, "/state/terminated/exitCode").is_some_and(|code| code != 0)
    });
    let all_ended = has("terminated") == statuses.len();
    let started = has("running") + has("terminated") > 0
        || statuses
            .iter()
            .any(|status| json::number(status, "/restartCount").unwrap_or(0) > 0);
    let phase = match () {
        () if all_ended && failed => "Failed",
        () if all_ended => "Succeeded",
        () if started => "Running",
        () => "Pending",
    };
    let ready = statuses.iter().all(|status| json::flag(status, "/ready"));
    let word = |yes: bool| if yes { "True" } else { "False" };
    let _ = cluster.store.update(Kind::named("pods"), &pod.namespace, &pod.name, |old| {
        let mut new = old.clone();
        if text(old, "/metadata/uid") != pod.uid {
            return Ok(Decision::Put(new));
        }
        let condition = |kind: &str, is: &str| {
            let before = json::items(old, "/status/conditions").iter().find(|one| text(one, "/type") == kind);
            let since = before.filter(|one| text(one, "/status") == is).map(|one| text(one, "/lastTransitionTime").to_owned());
            json!({"type": kind, "status": is, "lastProbeTime": null, "lastTransitionTime": since.unwrap_or_else(json::now)})
        };
        let conditions = json!([
            condition("Initialized", "True"),
            condition("Ready", word(ready)),
            condition("ContainersReady", word(ready)),
            condition("PodScheduled", "True"),
        ]);
        for (field, value) in [
            ("phase", json!(phase)),
            ("conditions", conditions),
            ("containerStatuses", json!(statuses)),
            ("hostIP", json!("127.0.0.1")),
            ("podIP", json!("127.0.0.1")),
            ("podIPs", json!([{"ip": "127.0.0.1"}])),
        ] {
            json::set(&mut new, &["status", field], value);
        }
        json::default(&mut new, &["status", "startTime"], json::now());
        Ok(Decision::Put(new))
    });
}

/// Tells of something that happened to a pod.
pub(super) fn event(cluster: &Cluster, pod: &Pod, severity: &str, reason: &str, message: &str) {
    let kind = Kind::named("events");
    let name = format!("{}.{}", pod.name, uuid::Uuid::new_v4().simple());
    let now = json::now();
    let _ = cluster.store.create(
        kind,
        json!({
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": name, "namespace": pod.namespace},
            "involvedObject": {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "namespace": pod.namespace, "uid": pod.uid},
            "type": severity, "reason": reason, "message": message, "count": 1, "firstTimestamp": now, "lastTimestamp": now,
            "source": {"component": "kubelet", "host": crate::seed::NODE},
            "reportingComponent": "kubelet", "reportingInstance": crate::seed::NODE,
        }),
    );
    let events: Vec<Arc<Value>> = cluster.store.list(kind, None).1;
    if events.len() > MAX_EVENTS
        && let Some(oldest) = events.iter().min_by_key(|event| {
            text(event, "/metadata/resourceVersion")
                .parse::<u64>()
                .unwrap_or(0)
        })
    {
        api::remove_now(
            cluster,
            kind,
            text(oldest, "/metadata/namespace"),
            text(oldest, "/metadata/name"),
        );
    }
}
