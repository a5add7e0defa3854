//! Deletion: preconditions, grace for running pods, finalizers, dependents, whole namespaces.

use std::sync::Arc;

use http::Response;
use serde_json::{Value, json};

use super::{Call, dry_run, negotiate::Form};
use crate::{
    Cluster, json,
    json::{items, number, text},
    kinds::{KINDS, Kind},
    selectors::Selectors,
    status::{Body, Failure, answer},
    store::Decision,
};

pub(super) fn delete(
    cluster: &Cluster,
    call: &Call,
    options: Value,
) -> Result<Response<Body>, Failure> {
    let target = &call.target;
    let dry = dry_run(&call.query)? || !items(&options, "/dryRun").is_empty();
    // An eviction carries its options inside.
    let options = options.get("deleteOptions").cloned().unwrap_or(options);
    let mut options = if options.is_object() {
        options
    } else {
        json!({})
    };
    if let Some(seconds) = call.query.number::<i64>("gracePeriodSeconds")? {
        options["gracePeriodSeconds"] = json!(seconds);
    }
    if let Some(policy) = call.query.get("propagationPolicy") {
        options["propagationPolicy"] = json!(policy);
    }
    let object = remove(
        cluster,
        target.kind,
        &target.namespace,
        &target.name,
        &options,
        dry,
    )?;
    if object.pointer("/metadata/deletionTimestamp").is_some() || target.kind.plural == "pods" {
        let form = call.accept.form()?;
        let form = if form == Form::Table {
            Form::Object
        } else {
            form
        };
        return Ok(answer(
            200,
            &super::list::shape(target.kind, form, &object, call, true),
        ));
    }
    Ok(answer(
        200,
        &json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
            "details": {
                "name": target.name, "group": target.kind.group, "kind": target.kind.plural,
                "uid": text(&object, "/metadata/uid"),
            },
        }),
    ))
}

pub(super) fn delete_collection(cluster: &Cluster, call: &Call) -> Result<Response<Body>, Failure> {
    let kind = call.target.kind;
    let selectors = Selectors::parse(kind, &call.query)?;
    let namespace = Some(call.target.namespace.as_str()).filter(|namespace| !namespace.is_empty());
    let dry = dry_run(&call.query)?;
    let mut deleted = Vec::new();
    for object in cluster.store.list(kind, namespace).1 {
        if selectors.match_object(&object) {
            let (namespace, name) = (
                text(&object, "/metadata/namespace"),
                text(&object, "/metadata/name"),
            );
            // One that has gone meanwhile is deleted as well.
            if let Ok(object) = remove(cluster, kind, namespace, name, &json!({}), dry) {
                deleted.push(Value::clone(&object));
            }
        }
    }
    Ok(answer(
        200,
        &json!({"kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(), "metadata": {}, "items": deleted}),
    ))
}

fn remove(
    cluster: &Cluster,
    kind: &'static Kind,
    namespace: &str,
    name: &str,
    options: &Value,
    dry: bool,
) -> Result<Arc<Value>, Failure> {
    // The dependents lose their owner before the collector can see that it is gone.
    if !dry
        && text(options, "/propagationPolicy") == "Orphan"
        && let Some(owner) = cluster.store.get(kind, namespace, name)
    {
        orphan(cluster, text(&owner, "/metadata/uid"), namespace);
    }
    cluster.store.update(kind, namespace, name, |old| {
        for (field, what) in [("uid", "UID"), ("resourceVersion", "ResourceVersion")] {
            let wanted = text(options, &format!("/preconditions/{field}"));
            let found = text(old, &format!("/metadata/{field}"));
            if !wanted.is_empty() && wanted != found {
                let why = format!("Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}");
                return Err(Failure::conflict(kind, name, &why));
            }
        }
        if dry {
            return Ok(Decision::Put(old.clone()));
        }
        let mut object = old.clone();
        if kind.plural == "namespaces" {
            if matches!(name, "default" | "kube-system") {
                return Err(Failure::forbidden(format!("namespaces {name:?} is forbidden: this namespace may not be deleted")));
            }
            json::set(&mut object, &["status", "phase"], json!("Terminating"));
            json::default(&mut object, &["metadata", "deletionTimestamp"], json::now());
            return Ok(Decision::Put(object));
        }
        let grace = match number(options, "/gracePeriodSeconds") {
            Some(seconds) => seconds.max(0),
            None => number(old, "/spec/terminationGracePeriodSeconds").unwrap_or(30),
        };
        let runs = kind.plural == "pods" && !matches!(text(old, "/status/phase"), "Succeeded" | "Failed");
        if runs && grace > 0 {
            let until = time::OffsetDateTime::now_utc() + time::Duration::seconds(grace.min(1 << 20));
            // Asked twice, the shorter grace holds.
            if number(old, "/metadata/deletionGracePeriodSeconds").is_none_or(|before| grace < before) {
                json::set(&mut object, &["metadata", "deletionTimestamp"], json!(json::stamp(until)));
                json::set(&mut object, &["metadata", "deletionGracePeriodSeconds"], json!(grace));
            }
            return Ok(Decision::Put(object));
        }
        if !items(old, "/metadata/finalizers").is_empty() {
            json::default(&mut object, &["metadata", "deletionTimestamp"], json::now());
            json::default(&mut object, &["metadata", "deletionGracePeriodSeconds"], 0);
            return Ok(Decision::Put(object));
        }
        Ok(Decision::Remove(object))
    })
}

/// Takes an object away without asking: for the controllers.
pub(crate) fn remove_now(cluster: &Cluster, kind: &'static Kind, namespace: &str, name: &str) {
    // Another request has deleted it first.
    let _ = cluster.store.update(kind, namespace, name, |old| {
        Ok(Decision::Remove(old.clone()))
    });
}

fn orphan(cluster: &Cluster, owner: &str, namespace: &str) {
    for kind in KINDS.iter().filter(|kind| kind.namespaced && !kind.review) {
        for object in cluster.store.list(kind, Some(namespace)).1 {
            let owned = items(&object, "/metadata/ownerReferences")
                .iter()
                .any(|one| text(one, "/uid") == owner);
            if owned {
                let _ =
                    cluster
                        .store
                        .update(kind, namespace, text(&object, "/metadata/name"), |old| {
                            let mut new = old.clone();
                            let kept: Vec<Value> = items(old, "/metadata/ownerReferences")
                                .iter()
                                .filter(|one| text(one, "/uid") != owner)
                                .cloned()
                                .collect();
                            json::set(&mut new, &["metadata", "ownerReferences"], json!(kept));
                            Ok(Decision::Put(new))
                        });
            }
        }
    }
}
