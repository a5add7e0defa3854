//! Single objects: get, create, update and the four kinds of patch.

use std::sync::Arc;

use http::Response;
use rand::Rng as _;
use serde_json::{Value, json};

use super::{Call, dry_run, list::shape};
use crate::{
    Cluster, json,
    json::text,
    kinds::Kind,
    patch,
    status::{Body, Failure, answer},
    store::Decision,
    validate,
};

pub(super) fn get(cluster: &Cluster, call: &Call) -> Result<Response<Body>, Failure> {
    let form = call.accept.form()?;
    let target = &call.target;
    let object = cluster
        .store
        .get(target.kind, &target.namespace, &target.name)
        .ok_or_else(|| Failure::not_found(target.kind, &target.name))?;
    match target.subresource() {
        "" | "status" => Ok(answer(200, &shape(target.kind, form, &object, call, true))),
        "scale" => Ok(answer(200, &scale_of(&object))),
        _ => Err(Failure::method_not_allowed()),
    }
}

pub(super) fn create(
    cluster: &Cluster,
    call: &Call,
    object: Value,
) -> Result<Response<Body>, Failure> {
    let form = call.accept.form()?;
    let object = make(cluster, call, object, "Update")?;
    Ok(answer(
        201,
        &shape(call.target.kind, form, &object, call, true),
    ))
}

fn make(
    cluster: &Cluster,
    call: &Call,
    mut object: Value,
    operation: &str,
) -> Result<Arc<Value>, Failure> {
    let target = &call.target;
    let kind = target.kind;
    check_type(kind, &target.namespace, "", &mut object)?;
    if kind.namespaced && target.namespace.is_empty() {
        return Err(Failure::bad_request(
            "an empty namespace may not be set during creation",
        ));
    }
    let prefix = text(&object, "/metadata/generateName").to_owned();
    if text(&object, "/metadata/name").is_empty() && !prefix.is_empty() {
        let name = format!(
            "{}{}",
            &prefix[..prefix.floor_char_boundary(58)],
            random_suffix(5)
        );
        json::set(&mut object, &["metadata", "name"], json!(name));
    }
    if kind.namespaced {
        let namespace = cluster
            .store
            .get(Kind::named("namespaces"), "", &target.namespace)
            .ok_or_else(|| Failure::not_found(Kind::named("namespaces"), &target.namespace))?;
        if text(&namespace, "/status/phase") == "Terminating" {
            return Err(Failure::forbidden(format!(
                "{} {:?} is forbidden: unable to create new content in namespace {} because it is being terminated",
                kind.qualified(),
                text(&object, "/metadata/name"),
                target.namespace
            )));
        }
    }
    let metadata = json::object(&mut object, "metadata");
    for field in [
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "selfLink",
        "generation",
    ] {
        metadata.remove(field);
    }
    if operation == "Update" {
        metadata.remove("managedFields");
    }
    validate::defaults(kind, &mut object);
    validate::check(kind, &object, None)?;
    if operation == "Update" {
        patch::fields::record(&Value::Null, &mut object, &call.manager, "");
    }
    if dry_run(&call.query)? {
        let name = text(&object, "/metadata/name").to_owned();
        if cluster.store.get(kind, &target.namespace, &name).is_some() {
            return Err(Failure::exists(kind, &name));
        }
        json::set(
            &mut object,
            &["metadata", "uid"],
            json!(uuid::Uuid::new_v4().to_string()),
        );
        json::set(
            &mut object,
            &["metadata", "creationTimestamp"],
            json!(json::now()),
        );
        return Ok(Arc::new(object));
    }
    cluster.store.create(kind, object)
}

pub(super) fn update(
    cluster: &Cluster,
    call: &Call,
    mut body: Value,
) -> Result<Response<Body>, Failure> {
    let target = &call.target;
    if target.subresource() == "scale" {
        return write(cluster, call, |_| Ok(body));
    }
    check_type(target.kind, &target.namespace, &target.name, &mut body)?;
    write(cluster, call, |_| Ok(body))
}

pub(super) fn patch(
    cluster: &Cluster,
    call: &Call,
    content_type: &str,
    body: &[u8],
) -> Result<Response<Body>, Failure> {
    let broken = |error: &dyn std::fmt::Display| {
        Failure::bad_request(format!("error decoding patch: {error}"))
    };
    match content_type {
        "application/json-patch+json" => {
            let steps: json_patch::Patch =
                serde_json::from_slice(body).map_err(|error| broken(&error))?;
            write(cluster, call, |view| {
                let mut view = view.clone();
                json_patch::patch(&mut view, &steps)
                    .map_err(|error| Failure::new(422, "Invalid", format!("the server rejected our request due to an error in our request: {error}")))?;
                Ok(view)
            })
        }
        "application/merge-patch+json" => {
            let patch = super::parse(body, "application/json")
                .map_err(|error| broken(&error.to_json()["message"]))?;
            write(cluster, call, |view| {
                let mut view = view.clone();
                json_patch::merge(&mut view, &patch);
                Ok(view)
            })
        }
        "application/strategic-merge-patch+json" => {
            let patch = super::parse(body, "application/json")?;
            write(cluster, call, |view| {
                let mut view = view.clone();
                patch::strategic::merge(&mut view, &patch)?;
                Ok(view)
            })
        }
        "application/apply-patch+yaml" => {
            let config = super::parse(body, "application/yaml")?;
            apply(cluster, call, config)
        }
        other => Err(Failure::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: \
                 application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, \
                 application/apply-patch+yaml, not {other:?}"
            ),
        )),
    }
}

fn apply(cluster: &Cluster, call: &Call, mut config: Value) -> Result<Response<Body>, Failure> {
    let target = &call.target;
    if call.query.get("fieldManager").is_none_or(str::is_empty) {
        return Err(Failure::bad_request(
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
        ));
    }
    check_type(target.kind, &target.namespace, &target.name, &mut config)?;
    if config
        .pointer("/metadata/managedFields")
        .is_some_and(|fields| !fields.is_null())
    {
        return Err(Failure::bad_request("metadata.managedFields must be nil"));
    }
    let force = call.query.flag("force");
    let sub = target.subresource();
    let exists = cluster
        .store
        .get(target.kind, &target.namespace, &target.name)
        .is_some();
    if !exists {
        if !sub.is_empty() {
            return Err(Failure::not_found(target.kind, &target.name));
        }
        let form = call.accept.form()?;
        let live =
            json!({"apiVersion": config["apiVersion"], "kind": config["kind"], "metadata": {}});
        let made = patch::fields::apply(&live, &config, &call.manager, force, sub)?;
        let object = make(cluster, call, made, "Apply")?;
        return Ok(answer(201, &shape(target.kind, form, &object, call, true)));
    }
    write_with(cluster, call, false, |view| {
        patch::fields::apply(view, &config, &call.manager, force, sub)
    })
}

fn write(
    cluster: &Cluster,
    call: &Call,
    change: impl FnOnce(&Value) -> Result<Value, Failure>,
) -> Result<Response<Body>, Failure> {
    write_with(cluster, call, true, change)
}

/// Reads the object, lets `change` make the new one, checks that and keeps it, all in one step.
fn write_with(
    cluster: &Cluster,
    call: &Call,
    record: bool,
    change: impl FnOnce(&Value) -> Result<Value, Failure>,
) -> Result<Response<Body>, Failure> {
    let form = call.accept.form()?;
    let dry = dry_run(&call.query)?;
    let target = &call.target;
    let kind = target.kind;
    let sub = target.subresource();
    let mut shown = None;
    let written = cluster
        .store
        .update(kind, &target.namespace, &target.name, |old| {
            let view = if sub == "scale" {
                scale_of(old)
            } else {
                old.clone()
            };
            let changed = change(&view)?;
            let version = text(&changed, "/metadata/resourceVersion");
            if !version.is_empty() && version != text(old, "/metadata/resourceVersion") {
                return Err(Failure::modified(kind, &target.name));
            }
            let uid = text(&changed, "/metadata/uid");
            if !uid.is_empty() && uid != text(old, "/metadata/uid") {
                return Err(Failure::conflict(
                    kind,
                    &target.name,
                    "Precondition failed: UID in precondition does not match",
                ));
            }
            let mut new = settle(kind, sub, old, changed)?;
            if record {
                patch::fields::record(old, &mut new, &call.manager, sub);
            }
            if dry {
                shown = Some(Arc::new(new));
                return Ok(Decision::Put(old.clone()));
            }
            let done = new
                .pointer("/metadata/deletionTimestamp")
                .is_some_and(|time| !time.is_null())
                && json::items(&new, "/metadata/finalizers").is_empty()
                && !json::items(old, "/metadata/finalizers").is_empty();
            Ok(if done {
                Decision::Remove(new)
            } else {
                Decision::Put(new)
            })
        })?;
    let object = shown.unwrap_or(written);
    if sub == "scale" {
        return Ok(answer(200, &scale_of(&object)));
    }
    Ok(answer(200, &shape(kind, form, &object, call, true)))
}

/// What of a written object counts: its status or all but its status, never the server's own fields.
fn settle(kind: &'static Kind, sub: &str, old: &Value, changed: Value) -> Result<Value, Failure> {
    if sub == "scale" {
        let replicas = json::number(&changed, "/spec/replicas").unwrap_or(0);
        if replicas < 0 {
            return Err(Failure::invalid(
                kind,
                text(old, "/metadata/name"),
                &[(
                    "spec.replicas".to_owned(),
                    "FieldValueInvalid",
                    format!("Invalid value: {replicas}: must be greater than or equal to 0"),
                )],
            ));
        }
        let mut new = old.clone();
        json::set(&mut new, &["spec", "replicas"], json!(replicas));
        bump(old, &mut new);
        return Ok(new);
    }
    let mut new = changed;
    for field in ["apiVersion", "kind"] {
        json::set(&mut new, &[field], old[field].clone());
    }
    let keep = [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "resourceVersion",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ];
    for field in keep {
        match old["metadata"].get(field) {
            Some(value) => json::set(&mut new, &["metadata", field], value.clone()),
            None => {
                json::remove(&mut new, &["metadata", field]);
            }
        }
    }
    if sub == "status" {
        let mut with_status = old.clone();
        if let Some(status) = new.get("status") {
            json::set(&mut with_status, &["status"], status.clone());
        }
        if let Some(fields) = new.pointer("/metadata/managedFields") {
            json::set(
                &mut with_status,
                &["metadata", "managedFields"],
                fields.clone(),
            );
        }
        return Ok(with_status);
    }
    if kind.subresource("status").is_some() {
        match old.get("status") {
            Some(status) => json::set(&mut new, &["status"], status.clone()),
            None => {
                json::remove(&mut new, &["status"]);
            }
        }
    }
    validate::defaults(kind, &mut new);
    validate::check(kind, &new, Some(old))?;
    bump(old, &mut new);
    Ok(new)
}

/// The generation counts changes of the spec.
fn bump(old: &Value, new: &mut Value) {
    if let Some(generation) = json::number(old, "/metadata/generation")
        && old.get("spec") != new.get("spec")
    {
        json::set(new, &["metadata", "generation"], json!(generation + 1));
    }
}

fn check_type(kind: &Kind, namespace: &str, name: &str, object: &mut Value) -> Result<(), Failure> {
    let expected = kind.api_version();
    let given = text(object, "/apiVersion").to_owned();
    if !given.is_empty() && given != expected {
        return Err(Failure::bad_request(format!(
            "the API version in the data ({given}) does not match the expected API version ({expected})"
        )));
    }
    let given = text(object, "/kind").to_owned();
    if !given.is_empty() && given != kind.kind {
        return Err(Failure::bad_request(format!(
            "{given} in version {:?} cannot be handled as a {}: the kind in the data does not match the expected kind",
            kind.version, kind.kind
        )));
    }
    json::set(object, &["apiVersion"], json!(expected));
    json::set(object, &["kind"], json!(kind.kind));
    let given = text(object, "/metadata/namespace").to_owned();
    if kind.namespaced {
        if !given.is_empty() && given != namespace {
            return Err(Failure::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        json::set(object, &["metadata", "namespace"], json!(namespace));
    } else if !given.is_empty() {
        return Err(Failure::bad_request(
            "namespace is not allowed on this type",
        ));
    } else {
        json::remove(object, &["metadata", "namespace"]);
    }
    let given = text(object, "/metadata/name").to_owned();
    if !name.is_empty() {
        if given.is_empty() {
            json::set(object, &["metadata", "name"], json!(name));
        } else if given != name {
            return Err(Failure::bad_request(format!(
                "the name of the object ({given}) does not match the name on the URL ({name})"
            )));
        }
    }
    Ok(())
}

fn scale_of(object: &Value) -> Value {
    let selector: Vec<String> = json::members(object, "/spec/selector/matchLabels")
        .into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
        .collect();
    let mut metadata = json!({});
    for field in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
    ] {
        metadata[field] = object["metadata"][field].clone();
    }
    json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata,
        "spec": {"replicas": json::number(object, "/spec/replicas").unwrap_or(1)},
        "status": {"replicas": json::number(object, "/status/replicas").unwrap_or(0), "selector": selector.join(",")},
    })
}

/// A suffix of the letters that Kubernetes uses: none that make a word.
pub(crate) fn random_suffix(length: usize) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut rng = rand::rng();
    (0..length)
        .map(|_| char::from(LETTERS[rng.random_range(0..LETTERS.len())]))
        .collect()
}
