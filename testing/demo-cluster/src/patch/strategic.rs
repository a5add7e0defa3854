//! Strategic merge patch: merge patch whose lists merge by key, with its directives.

use serde_json::{Map, Value};

use super::{ListKind, list_kind_of};
use crate::{json::as_map, status::Failure};

/// Deeper patches are refused: real objects stay far below.
const MAX_DEPTH: usize = 64;

pub(crate) fn merge(target: &mut Value, patch: &Value) -> Result<(), Failure> {
    merge_map(target, patch, 0)
}

fn merge_map(target: &mut Value, patch: &Value, depth: usize) -> Result<(), Failure> {
    let Some(patch) = patch.as_object() else {
        return Err(Failure::bad_request(
            "a strategic merge patch must be an object",
        ));
    };
    if depth > MAX_DEPTH {
        return Err(Failure::bad_request("the patch is nested too deeply"));
    }
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *target = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            *target = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => {
            return Err(Failure::bad_request(format!(
                "unknown patch directive {other:?}"
            )));
        }
    }
    let target = as_map(target);
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().map_or(&[][..], Vec::as_slice);
            if let Some(list) = target.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|item| !gone.contains(item));
            }
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        match value {
            Value::Null => {
                target.remove(key);
            }
            Value::Object(_) => merge_map(
                target.entry(key.clone()).or_insert(Value::Null),
                value,
                depth + 1,
            )?,
            Value::Array(items) => {
                let entry = target
                    .entry(key.clone())
                    .or_insert_with(|| Value::Array(Vec::new()));
                merge_list(key, entry, items, depth + 1)?;
            }
            scalar => {
                target.insert(key.clone(), scalar.clone());
            }
        }
    }
    if let Some(retained) = patch.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|key, _| retained.iter().any(|one| one.as_str() == Some(key)));
    }
    for (key, order) in patch {
        if let (Some(field), Some(order)) =
            (key.strip_prefix("$setElementOrder/"), order.as_array())
        {
            reorder(field, target, order);
        }
    }
    Ok(())
}

fn merge_list(
    field: &str,
    target: &mut Value,
    patch: &[Value],
    depth: usize,
) -> Result<(), Failure> {
    let replace = patch
        .iter()
        .any(|item| item.get("$patch").and_then(Value::as_str) == Some("replace"));
    let kind = list_kind_of(field, patch);
    let Value::Array(list) = target else {
        *target = Value::Array(patch.to_vec());
        return Ok(());
    };
    match kind {
        _ if replace => {
            *list = patch
                .iter()
                .filter(|item| item.get("$patch").is_none())
                .cloned()
                .collect();
        }
        ListKind::Atomic => *list = patch.to_vec(),
        ListKind::Set => {
            for item in patch {
                if !list.contains(item) {
                    list.push(item.clone());
                }
            }
        }
        ListKind::Map(keys) => {
            let key = if field == "ports"
                && list
                    .iter()
                    .chain(patch)
                    .any(|item| item.get("containerPort").is_some())
            {
                "containerPort"
            } else {
                keys[0]
            };
            for item in patch {
                let Some(id) = item.get(key) else {
                    return Err(Failure::bad_request(format!(
                        "map: {item} does not contain declared merge key: {key}"
                    )));
                };
                let found = list.iter().position(|one| one.get(key) == Some(id));
                match (item.get("$patch").and_then(Value::as_str), found) {
                    (Some("delete"), Some(at)) => {
                        list.remove(at);
                    }
                    (Some("delete"), None) => {}
                    (_, Some(at)) => merge_map(&mut list[at], item, depth + 1)?,
                    (_, None) => {
                        let mut made = Value::Null;
                        merge_map(&mut made, item, depth + 1)?;
                        list.push(made);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Items named by the order come in that order; the others keep their places behind.
fn reorder(field: &str, target: &mut Map<String, Value>, order: &[Value]) {
    let Some(list) = target.get_mut(field).and_then(Value::as_array_mut) else {
        return;
    };
    let place = |item: &Value| {
        order.iter().position(|wanted| match wanted.as_object() {
            Some(keys) => keys.iter().all(|(key, value)| item.get(key) == Some(value)),
            None => wanted == item,
        })
    };
    list.sort_by_key(|item| place(item).unwrap_or(usize::MAX));
}

fn without_directives(patch: &Map<String, Value>) -> Value {
    Value::Object(
        patch
            .iter()
            .filter(|(key, _)| !key.starts_with('$'))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn merged(mut target: Value, patch: Value) -> Value {
        merge(&mut target, &patch).unwrap();
        target
    }

    #[test]
    fn containers_merge_by_name_and_null_removes() {
        let old = json!({"containers": [{"name": "a", "image": "x", "args": ["1", "2"]}, {"name": "b"}], "gone": 1});
        let patch =
            json!({"containers": [{"name": "a", "args": ["3"]}, {"name": "c"}], "gone": null});
        let new = json!({"containers": [{"name": "a", "image": "x", "args": ["3"]}, {"name": "b"}, {"name": "c"}]});
        assert_eq!(merged(old, patch), new);
    }

    #[test]
    fn directives_delete_replace_and_order() {
        let old = json!({"env": [{"name": "a"}, {"name": "b"}, {"name": "c"}], "labels": {"x": "1"}, "finalizers": ["p", "q"]});
        let patch = json!({
            "$setElementOrder/env": [{"name": "c"}, {"name": "a"}],
            "env": [{"name": "b", "$patch": "delete"}],
            "labels": {"$patch": "replace", "y": "2"},
            "$deleteFromPrimitiveList/finalizers": ["p"],
        });
        let new = json!({"env": [{"name": "c"}, {"name": "a"}], "labels": {"y": "2"}, "finalizers": ["q"]});
        assert_eq!(merged(old, patch), new);
        let kept = merged(
            json!({"a": 1, "b": 2}),
            json!({"$retainKeys": ["b"], "b": 3}),
        );
        assert_eq!(kept, json!({"b": 3}));
    }

    #[test]
    fn broken_patches_are_refused() {
        for patch in [
            json!({"env": [{"value": "no name"}]}),
            json!({"$patch": "explode"}),
            json!([]),
        ] {
            assert_eq!(
                merge(&mut json!({"env": []}), &patch).unwrap_err().code,
                400,
                "{patch}"
            );
        }
        let deep = (0..100).fold(json!(1), |inner, _| json!({"a": inner}));
        assert_eq!(merge(&mut json!({}), &deep).unwrap_err().code, 400);
    }
}
