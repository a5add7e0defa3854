//! The controllers: deployments make replica sets, replica sets make pods, namespaces that end
//! take what is in them along, and what has lost its owner goes.

use std::{collections::BTreeMap, sync::Arc};

use serde_json::{Value, json};

use crate::{
    Cluster, api, json,
    json::{flag, items, number, text},
    kinds::{KINDS, Kind},
    seed,
    store::Decision,
    validate,
};

const HASH: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

pub(crate) async fn run(cluster: Arc<Cluster>) {
    let mut changed = cluster.store.subscribe();
    loop {
        changed.borrow_and_update();
        namespaces(&cluster);
        collect(&cluster);
        for deployment in cluster.store.list(Kind::named("deployments"), None).1 {
            reconcile_deployment(&cluster, &deployment);
        }
        for set in cluster.store.list(Kind::named("replicasets"), None).1 {
            reconcile_set(&cluster, &set);
        }
        tokio::select! {
            () = cluster.stop.cancelled() => return,
            changed = changed.changed() => if changed.is_err() { return },
        }
    }
}

/// New namespaces get what every namespace has; terminating ones are emptied, then removed.
fn namespaces(cluster: &Cluster) {
    for namespace in cluster.store.list(Kind::named("namespaces"), None).1 {
        let name = text(&namespace, "/metadata/name");
        if text(&namespace, "/status/phase") != "Terminating" {
            if cluster
                .store
                .get(Kind::named("serviceaccounts"), name, "default")
                .is_none()
            {
                seed::put(cluster, "serviceaccounts", name, "default", json!({}));
                seed::put(
                    cluster,
                    "configmaps",
                    name,
                    "kube-root-ca.crt",
                    json!({"data": {"ca.crt": cluster.pki.ca_pem()}}),
                );
            }
            continue;
        }
        let mut left = 0;
        for kind in KINDS.iter().filter(|kind| kind.namespaced && !kind.review) {
            for object in cluster.store.list(kind, Some(name)).1 {
                left += 1;
                if kind.plural == "pods" {
                    terminate(cluster, &object, 1);
                } else {
                    api::remove_now(cluster, kind, name, text(&object, "/metadata/name"));
                }
            }
        }
        if left == 0 {
            api::remove_now(cluster, Kind::named("namespaces"), "", name);
        }
    }
}

/// What names an owner that is no more is removed.
fn collect(cluster: &Cluster) {
    for (kind, owners) in [("replicasets", "deployments"), ("pods", "replicasets")] {
        let owners = cluster.store.list(Kind::named(owners), None).1;
        for object in cluster.store.list(Kind::named(kind), None).1 {
            let Some(owner) = controller_of(&object) else {
                continue;
            };
            if owners
                .iter()
                .any(|one| text(one, "/metadata/uid") == text(owner, "/uid"))
            {
                continue;
            }
            if kind == "pods" {
                terminate(cluster, &object, 30);
            } else {
                api::remove_now(
                    cluster,
                    Kind::named(kind),
                    text(&object, "/metadata/namespace"),
                    text(&object, "/metadata/name"),
                );
            }
        }
    }
}

fn controller_of(object: &Value) -> Option<&Value> {
    items(object, "/metadata/ownerReferences")
        .iter()
        .find(|owner| {
            flag(owner, "/controller")
                && matches!(text(owner, "/kind"), "Deployment" | "ReplicaSet")
        })
}

fn owned_by<'a>(
    objects: &'a [Arc<Value>],
    owner: &'a Value,
) -> impl Iterator<Item = &'a Arc<Value>> {
    objects.iter().filter(move |object| {
        controller_of(object).is_some_and(|one| text(one, "/uid") == text(owner, "/metadata/uid"))
    })
}

fn terminate(cluster: &Cluster, pod: &Value, grace: i64) {
    if pod.pointer("/metadata/deletionTimestamp").is_some() {
        return;
    }
    let (namespace, name) = (
        text(pod, "/metadata/namespace"),
        text(pod, "/metadata/name"),
    );
    let _ = cluster
        .store
        .update(Kind::named("pods"), namespace, name, |old| {
            let mut new = old.clone();
            let grace = number(old, "/spec/terminationGracePeriodSeconds")
                .unwrap_or(30)
                .min(grace);
            let until = time::OffsetDateTime::now_utc() + time::Duration::seconds(grace);
            json::set(
                &mut new,
                &["metadata", "deletionTimestamp"],
                json!(json::stamp(until)),
            );
            json::set(
                &mut new,
                &["metadata", "deletionGracePeriodSeconds"],
                json!(grace),
            );
            Ok(Decision::Put(new))
        });
}

/// One replica set a template; the newest gets the replicas as its pods become ready.
fn reconcile_deployment(cluster: &Cluster, deployment: &Arc<Value>) {
    let kind = Kind::named("replicasets");
    let (namespace, name) = (
        text(deployment, "/metadata/namespace"),
        text(deployment, "/metadata/name"),
    );
    let hash = hash(&deployment["spec"]["template"]);
    let sets = cluster.store.list(kind, Some(namespace)).1;
    let owned: Vec<&Arc<Value>> = owned_by(&sets, deployment).collect();
    let wanted = number(deployment, "/spec/replicas").unwrap_or(1);
    let current = owned
        .iter()
        .find(|set| text(set, &format!("/metadata/labels/{HASH}")) == hash);
    let revision_of = |set: &Value| -> u64 {
        set.pointer("/metadata/annotations")
            .and_then(|all| all.get(REVISION))
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    };
    let newest = owned.iter().map(|set| revision_of(set)).max().unwrap_or(0);
    let others: Vec<&&Arc<Value>> = owned
        .iter()
        .filter(|set| text(set, &format!("/metadata/labels/{HASH}")) != hash)
        .collect();
    let others_have: i64 = others
        .iter()
        .map(|set| number(set, "/spec/replicas").unwrap_or(0))
        .sum();
    let revision = match current {
        None => {
            let mut template = deployment["spec"]["template"].clone();
            json::set(&mut template, &["metadata", "labels", HASH], json!(hash));
            let mut selector = deployment["spec"]["selector"].clone();
            json::set(&mut selector, &["matchLabels", HASH], json!(hash));
            let object = json!({
                "metadata": {
                    "labels": template["metadata"]["labels"], "annotations": {REVISION: (newest + 1).to_string()},
                    "ownerReferences": [owner("apps/v1", "Deployment", deployment)],
                },
                "spec": {"replicas": wanted, "selector": selector, "template": template},
            });
            seed::put(
                cluster,
                "replicasets",
                namespace,
                &format!("{name}-{hash}"),
                object,
            );
            newest + 1
        }
        Some(set) => {
            let revision = revision_of(set);
            let revision = if revision < newest {
                newest + 1
            } else {
                revision
            };
            let set_name = text(set, "/metadata/name");
            let _ = cluster.store.update(kind, namespace, set_name, |old| {
                let mut new = old.clone();
                json::set(&mut new, &["spec", "replicas"], json!(wanted));
                json::set(
                    &mut new,
                    &["metadata", "annotations", REVISION],
                    json!(revision.to_string()),
                );
                Ok(Decision::Put(new))
            });
            // The old ones go once the new ones stand.
            if number(set, "/status/readyReplicas").unwrap_or(0) >= wanted && others_have > 0 {
                for other in &others {
                    let _ = cluster.store.update(
                        kind,
                        namespace,
                        text(other, "/metadata/name"),
                        |old| {
                            let mut new = old.clone();
                            json::set(&mut new, &["spec", "replicas"], json!(0));
                            Ok(Decision::Put(new))
                        },
                    );
                }
            }
            revision
        }
    };
    let sum = |field: &str| {
        owned
            .iter()
            .map(|set| number(set, field).unwrap_or(0))
            .sum::<i64>()
    };
    let (replicas, ready) = (sum("/status/replicas"), sum("/status/readyReplicas"));
    let updated = current.map_or(0, |set| number(set, "/status/replicas").unwrap_or(0));
    let available = ready >= wanted;
    let done = available && updated >= wanted && replicas == updated;
    let _ = cluster.store.update(Kind::named("deployments"), namespace, name, |old| {
        let mut new = old.clone();
        let condition = |kind: &str, yes: bool, reason: &str, message: &str| {
            let status = if yes { "True" } else { "False" };
            let before = items(old, "/status/conditions").iter().find(|one| text(one, "/type") == kind);
            let same = before.filter(|one| text(one, "/status") == status && text(one, "/reason") == reason);
            let since = same.map_or_else(json::now, |one| text(one, "/lastUpdateTime").to_owned());
            json!({"type": kind, "status": status, "reason": reason, "message": message, "lastUpdateTime": since, "lastTransitionTime": since})
        };
        let mut status = json!({
            "observedGeneration": number(old, "/metadata/generation").unwrap_or(1),
            "conditions": [
                if available { condition("Available", true, "MinimumReplicasAvailable", "Deployment has minimum availability.") }
                else { condition("Available", false, "MinimumReplicasUnavailable", "Deployment does not have minimum availability.") },
                if done { condition("Progressing", true, "NewReplicaSetAvailable", "ReplicaSet has successfully progressed.") }
                else { condition("Progressing", true, "ReplicaSetUpdated", "ReplicaSet is progressing.") },
            ],
        });
        for (field, value) in [
            ("replicas", replicas),
            ("updatedReplicas", updated),
            ("readyReplicas", ready),
            ("availableReplicas", ready),
            ("unavailableReplicas", (wanted.max(replicas) - ready).max(0)),
        ] {
            if value > 0 {
                status[field] = json!(value);
            }
        }
        json::set(&mut new, &["status"], status);
        json::set(&mut new, &["metadata", "annotations", REVISION], json!(revision.to_string()));
        Ok(Decision::Put(new))
    });
}

fn reconcile_set(cluster: &Cluster, set: &Arc<Value>) {
    let kind = Kind::named("pods");
    let (namespace, name) = (
        text(set, "/metadata/namespace"),
        text(set, "/metadata/name"),
    );
    let pods = cluster.store.list(kind, Some(namespace)).1;
    let mut live: Vec<&Arc<Value>> = owned_by(&pods, set)
        .filter(|pod| {
            pod.pointer("/metadata/deletionTimestamp").is_none()
                && !matches!(text(pod, "/status/phase"), "Failed" | "Succeeded")
        })
        .collect();
    let wanted = usize::try_from(number(set, "/spec/replicas").unwrap_or(1))
        .unwrap_or(0)
        .min(100);
    for _ in live.len()..wanted {
        let template = &set["spec"]["template"];
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("{name}-{}", api::random_suffix(5)), "generateName": format!("{name}-"), "namespace": namespace,
                "labels": template["metadata"]["labels"], "ownerReferences": [owner("apps/v1", "ReplicaSet", set)],
            },
            "spec": template["spec"],
        });
        if let Some(annotations) = template.pointer("/metadata/annotations") {
            json::set(&mut pod, &["metadata", "annotations"], annotations.clone());
        }
        validate::defaults(kind, &mut pod);
        let _ = cluster.store.create(kind, pod);
    }
    // Those that are not ready go first.
    let ready = |pod: &Value| {
        items(pod, "/status/conditions")
            .iter()
            .any(|one| text(one, "/type") == "Ready" && text(one, "/status") == "True")
    };
    live.sort_by_key(|pod| ready(pod));
    for pod in live.iter().take(live.len().saturating_sub(wanted)) {
        terminate(cluster, pod, 30);
    }
    let ready = live.iter().filter(|pod| ready(pod)).count();
    let _ = cluster.store.update(Kind::named("replicasets"), namespace, name, |old| {
        let mut new = old.clone();
        let mut status = json!({"replicas": live.len(), "observedGeneration": number(old, "/metadata/generation").unwrap_or(1)});
        for field in ["fullyLabeledReplicas", "readyReplicas", "availableReplicas"] {
            if ready > 0 {
                status[field] = json!(ready);
            }
        }
        json::set(&mut new, &["status"], status);
        Ok(Decision::Put(new))
    });
}

fn owner(api_version: &str, kind: &str, object: &Value) -> Value {
    json!({
        "apiVersion": api_version, "kind": kind, "name": object["metadata"]["name"], "uid": object["metadata"]["uid"],
        "controller": true, "blockOwnerDeletion": true,
    })
}

/// Names a pod template: the same template has the same name (FNV-1a of its sorted JSON).
fn hash(template: &Value) -> String {
    let sorted: BTreeMap<&String, &Value> = template.as_object().into_iter().flatten().collect();
    let text = json!(sorted).to_string();
    let hash = text.bytes().fold(0x811c_9dc5_u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    });
    format!("{hash:08x}")
}
