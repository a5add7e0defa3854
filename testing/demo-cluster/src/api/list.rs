//! Lists: selectors, pages, and the three forms in which objects are shown.

use std::sync::Arc;

use base64::Engine as _;
use http::Response;
use serde_json::{Value, json};

use super::{Call, negotiate::Form};
use crate::{
    Cluster,
    json::text,
    kinds::Kind,
    selectors::Selectors,
    status::{Body, Failure, answer},
    table,
};

pub(super) fn list(cluster: &Cluster, call: &Call) -> Result<Response<Body>, Failure> {
    let form = call.accept.form()?;
    let kind = call.target.kind;
    let selectors = Selectors::parse(kind, &call.query)?;
    let namespace = Some(call.target.namespace.as_str()).filter(|namespace| !namespace.is_empty());
    let limit: Option<usize> = call.query.number("limit")?.filter(|limit| *limit > 0);
    let (revision, after, objects) =
        match call.query.get("continue").filter(|token| !token.is_empty()) {
            Some(token) => {
                let (revision, after) = read_token(token)?;
                (
                    revision,
                    Some(after),
                    cluster.store.list_at(kind, namespace, revision)?,
                )
            }
            None => match (
                call.query.get("resourceVersionMatch"),
                call.query.number("resourceVersion")?,
            ) {
                (Some("Exact"), Some(revision)) => (
                    revision,
                    None,
                    cluster.store.list_at(kind, namespace, revision)?,
                ),
                _ => {
                    let (revision, objects) = cluster.store.list(kind, namespace);
                    (revision, None, objects)
                }
            },
        };
    let mut matching: Vec<Arc<Value>> = objects
        .into_iter()
        .filter(|object| {
            after.as_ref().is_none_or(|after| key(object) > *after)
                && selectors.match_object(object)
        })
        .collect();
    let mut metadata = json!({"resourceVersion": revision.to_string()});
    if let Some(limit) = limit
        && matching.len() > limit
    {
        metadata["remainingItemCount"] = json!(matching.len() - limit);
        matching.truncate(limit);
        if let Some(last) = matching.last() {
            metadata["continue"] = json!(token(revision, last));
        }
    }
    Ok(answer(
        200,
        &shape_list(kind, form, &matching, metadata, call),
    ))
}

fn shape_list(
    kind: &Kind,
    form: Form,
    objects: &[Arc<Value>],
    metadata: Value,
    call: &Call,
) -> Value {
    match form {
        Form::Object => json!({
            "kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(), "metadata": metadata,
            "items": objects.iter().map(|object| bare(object)).collect::<Vec<_>>(),
        }),
        Form::Metadata => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
            "items": objects.iter().map(|object| table::metadata_of(object)).collect::<Vec<_>>(),
        }),
        Form::Table => table::render(kind, objects, metadata, include(call), true),
    }
}

/// One object in the form that was asked for.
pub(super) fn shape(
    kind: &Kind,
    form: Form,
    object: &Arc<Value>,
    call: &Call,
    columns: bool,
) -> Value {
    match form {
        Form::Object => Value::clone(object),
        Form::Metadata => table::metadata_of(object),
        Form::Table => {
            let metadata = json!({"resourceVersion": text(object, "/metadata/resourceVersion")});
            table::render(
                kind,
                std::slice::from_ref(object),
                metadata,
                include(call),
                columns,
            )
        }
    }
}

fn include(call: &Call) -> table::Include {
    match call.query.get("includeObject") {
        Some("None") => table::Include::None,
        Some("Object") => table::Include::Object,
        _ => table::Include::Metadata,
    }
}

/// Items of a list carry no type of their own.
fn bare(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(map) = object.as_object_mut() {
        map.remove("kind");
        map.remove("apiVersion");
    }
    object
}

fn key(object: &Value) -> (String, String) {
    (
        text(object, "/metadata/namespace").to_owned(),
        text(object, "/metadata/name").to_owned(),
    )
}

fn token(revision: u64, last: &Value) -> String {
    let (namespace, name) = key(last);
    let token =
        json!({"v": "meta.k8s.io/v1", "rv": revision, "start": [namespace, name]}).to_string();
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(token)
}

fn read_token(token: &str) -> Result<(u64, (String, String)), Failure> {
    let bad = || Failure::bad_request("continue key is not valid");
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD
        .decode(token)
        .map_err(|_| bad())?;
    let value: Value = serde_json::from_slice(&bytes).map_err(|_| bad())?;
    let part = |pointer| {
        value
            .pointer(pointer)
            .and_then(Value::as_str)
            .map(str::to_owned)
    };
    match (value["rv"].as_u64(), part("/start/0"), part("/start/1")) {
        (Some(revision), Some(namespace), Some(name)) => Ok((revision, (namespace, name))),
        _ => Err(bad()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_come_back_and_bad_ones_are_refused() {
        let last = json!({"metadata": {"namespace": "a", "name": "b"}});
        assert_eq!(
            read_token(&token(7, &last)).unwrap(),
            (7, ("a".to_owned(), "b".to_owned()))
        );
        for bad in ["", "%", "e30", "bnVsbA"] {
            assert_eq!(read_token(bad).unwrap_err().code, 400);
        }
    }
}
