//! OpenAPI, versions 2 and 3: as much as `kubectl apply`, `diff` and `explain` ask for.

mod protobuf;

use std::{
    collections::BTreeSet,
    sync::{LazyLock, PoisonError, RwLock},
};

use bytes::Bytes;
use http::Response;
use serde_json::{Map, Value, json};

use crate::{
    kinds::{KINDS, Kind, group_version, groups, in_group},
    patch::{ListKind, list_kind},
    status::{Body, Failure, answer, bytes_response},
};

const PREFIX: &str = "#/definitions/";

/// The definitions of the served kinds, with what Kubernetes adds to plain schemas.
static DEFINITIONS: LazyLock<Map<String, Value>> = LazyLock::new(definitions);
/// The protobuf form of version 2, made when an old kubectl first asks for it.
static PROTOBUF: RwLock<Option<Bytes>> = RwLock::new(None);

pub(crate) fn serve(path: &str, accept: &str) -> Result<Response<Body>, Failure> {
    let parts: Vec<&str> = path.trim_start_matches("/openapi/").split('/').collect();
    match parts.as_slice() {
        ["v2"] if accept.contains("proto-openapi.spec.v2") => {
            let made = PROTOBUF
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            let bytes = made.unwrap_or_else(|| {
                let bytes = Bytes::from(protobuf::document(&version_2()));
                *PROTOBUF.write().unwrap_or_else(PoisonError::into_inner) = Some(bytes.clone());
                bytes
            });
            Ok(bytes_response(
                200,
                "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
                bytes,
            ))
        }
        ["v2"] => Ok(answer(200, &version_2())),
        _ if accept.contains("protobuf") => Err(Failure::new(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json",
        )),
        ["v3"] => {
            let mut paths = Map::new();
            paths.insert(
                "api/v1".to_owned(),
                json!({"serverRelativeURL": "/openapi/v3/api/v1"}),
            );
            for group in groups() {
                let path = format!("apis/{group}/v1");
                paths.insert(
                    path.clone(),
                    json!({"serverRelativeURL": format!("/openapi/v3/{path}")}),
                );
            }
            Ok(answer(200, &json!({"paths": paths})))
        }
        ["v3", "api", "v1"] => Ok(answer(200, &version_3(""))),
        ["v3", "apis", group, "v1"] if groups().contains(group) => {
            Ok(answer(200, &version_3(group)))
        }
        _ => Err(Failure::no_such_path()),
    }
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": "v1.36.0"})
}

fn version_2() -> Value {
    let mut paths = Map::new();
    for kind in KINDS {
        add_paths(&mut paths, kind);
    }
    json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": &*DEFINITIONS})
}

fn version_3(group: &str) -> Value {
    let mut paths = Map::new();
    let mut wanted = BTreeSet::new();
    for kind in in_group(group) {
        add_paths(&mut paths, kind);
        reach(&definition_of(kind), &mut wanted);
    }
    let mut schemas = Map::new();
    for name in wanted {
        if let Some(definition) = DEFINITIONS.get(&name) {
            let mut definition = definition.clone();
            redirect(&mut definition);
            schemas.insert(name, definition);
        }
    }
    json!({"openapi": "3.0.0", "info": info(), "paths": paths, "components": {"schemas": schemas}})
}

/// The name of a kind's definition.
fn definition_of(kind: &Kind) -> String {
    let group = match kind.group {
        "" => "core",
        group => group.split('.').next().unwrap_or(group),
    };
    format!("io.k8s.api.{group}.{}.{}", kind.version, kind.kind)
}

/// All that a definition refers to, itself included.
fn reach(name: &str, found: &mut BTreeSet<String>) {
    if found.insert(name.to_owned())
        && let Some(definition) = DEFINITIONS.get(name)
    {
        references(definition, &mut |name| reach(name, found));
    }
}

fn references(schema: &Value, tell: &mut dyn FnMut(&str)) {
    match schema {
        Value::Object(map) => {
            for (key, value) in map {
                match (key.as_str(), value) {
                    ("$ref", Value::String(reference)) => {
                        tell(reference.trim_start_matches(PREFIX))
                    }
                    (_, value) => references(value, tell),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, tell)),
        _ => {}
    }
}

/// Version 3 keeps its schemas elsewhere, and lets no reference have neighbours.
fn redirect(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.values_mut().for_each(redirect);
            if let Some(Value::String(reference)) = map.get("$ref") {
                let target = json!({"$ref": reference.replace(PREFIX, "#/components/schemas/")});
                if map.len() == 1 {
                    map.insert("$ref".to_owned(), target["$ref"].clone());
                } else {
                    map.remove("$ref");
                    map.insert("allOf".to_owned(), json!([target]));
                    map.insert("default".to_owned(), json!({}));
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(redirect),
        _ => {}
    }
}

fn add_paths(paths: &mut Map<String, Value>, kind: &Kind) {
    let base = if kind.group.is_empty() {
        "/api/v1".to_owned()
    } else {
        format!("/apis/{}", group_version(kind.group, kind.version))
    };
    let collection = if kind.namespaced {
        format!("{base}/namespaces/{{namespace}}/{}", kind.plural)
    } else {
        format!("{base}/{}", kind.plural)
    };
    let operation = |action: &str, parameters: &[&str]| {
        let parameters: Vec<Value> = parameters
            .iter()
            .map(|name| json!({"name": name, "in": "query", "type": "string", "uniqueItems": true, "schema": {"type": "string", "uniqueItems": true}}))
            .collect();
        json!({
            "operationId": format!("{action}{}{}", kind.group.replace('.', ""), kind.kind),
            "parameters": parameters, "responses": {"200": {"description": "OK"}}, "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": {"group": kind.group, "version": kind.version, "kind": kind.kind},
        })
    };
    let write = ["dryRun", "fieldManager", "fieldValidation"];
    let create = operation("post", &write);
    if kind.review {
        paths.insert(collection, json!({"post": create}));
        return;
    }
    let item = format!("{collection}/{{name}}");
    paths.insert(collection, json!({"get": operation("list", &["labelSelector", "fieldSelector", "limit", "continue"]), "post": create}));
    paths.insert(
        item,
        json!({
            "get": operation("get", &[]), "put": operation("put", &write), "delete": operation("delete", &["dryRun"]),
            "patch": operation("patch", &["dryRun", "fieldManager", "fieldValidation", "force"]),
        }),
    );
}

fn definitions() -> Map<String, Value> {
    let text = include_str!("../assets/definitions.json");
    let mut definitions: Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
    for (name, definition) in &mut definitions {
        normalise(definition);
        let container = name.ends_with("Container");
        if let Some(properties) = definition
            .get_mut("properties")
            .and_then(Value::as_object_mut)
        {
            for (field, schema) in properties {
                if schema.get("type").and_then(Value::as_str) == Some("array") {
                    list_extensions(schema, list_kind(field, container));
                }
            }
        }
    }
    for kind in KINDS {
        if let Some(definition) = definitions.get_mut(&definition_of(kind)) {
            definition["x-kubernetes-group-version-kind"] =
                json!([{"group": kind.group, "version": kind.version, "kind": kind.kind}]);
        }
    }
    definitions
}

/// A reference that is described is written flat, as Kubernetes' own version 2 has it.
fn normalise(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            map.values_mut().for_each(normalise);
            if let Some(Value::Array(all)) = map.get("allOf")
                && let [only] = all.as_slice()
                && let Some(reference) = only.get("$ref").cloned()
            {
                map.remove("allOf");
                map.insert("$ref".to_owned(), reference);
            }
            if map.remove("x-kubernetes-int-or-string").is_some() {
                map.insert("type".to_owned(), json!("string"));
                map.insert("format".to_owned(), json!("int-or-string"));
            }
        }
        Value::Array(list) => list.iter_mut().for_each(normalise),
        _ => {}
    }
}

fn list_extensions(schema: &mut Value, kind: ListKind) {
    match kind {
        ListKind::Atomic => schema["x-kubernetes-list-type"] = json!("atomic"),
        ListKind::Set => {
            schema["x-kubernetes-list-type"] = json!("set");
            schema["x-kubernetes-patch-strategy"] = json!("merge");
        }
        ListKind::Map(keys) => {
            schema["x-kubernetes-list-type"] = json!("map");
            schema["x-kubernetes-list-map-keys"] = json!(keys);
            schema["x-kubernetes-patch-strategy"] = json!("merge");
            schema["x-kubernetes-patch-merge-key"] = json!(keys[0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_a_definition_and_every_reference_leads_somewhere() {
        for kind in KINDS {
            assert!(
                DEFINITIONS.contains_key(&definition_of(kind)),
                "{}",
                definition_of(kind)
            );
        }
        for definition in DEFINITIONS.values() {
            references(definition, &mut |name| {
                assert!(DEFINITIONS.contains_key(name), "{name}")
            });
        }
    }

    #[test]
    fn merge_keys_are_told() {
        let containers = &DEFINITIONS["io.k8s.api.core.v1.PodSpec"]["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        let core = version_3("");
        let pod =
            &core["components"]["schemas"]["io.k8s.api.core.v1.Pod"]["properties"]["metadata"];
        assert_eq!(
            pod["allOf"][0]["$ref"],
            "#/components/schemas/io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
        );
    }
}
