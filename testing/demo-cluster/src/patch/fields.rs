//! Who owns which field (`managedFields`), and server-side apply on top of it.
//!
//! Sets of fields are kept in the wire's own form, `FieldsV1`: an object whose keys are `f:NAME`,
//! `k:{KEYS}` and `v:VALUE`, and whose empty members are leaves.

use serde_json::{Map, Value, json};

use super::{ListKind, list_kind_of};
use crate::{
    json,
    json::{as_map, items, text},
    status::Failure,
};

type Set = Map<String, Value>;

/// Notes in `new` that `manager` wrote what differs from `old`.
pub(crate) fn record(old: &Value, new: &mut Value, manager: &str, sub: &str) {
    // Sent as an empty list, the ownership is asked to be forgotten.
    let mut entries = items(new, "/metadata/managedFields").to_vec();
    if entries.is_empty() || entries == [json!({})] {
        entries = items(old, "/metadata/managedFields").to_vec();
    }
    let written = changed(&owned(old), &owned(new), old, new);
    let present = owned(new);
    for entry in &mut entries {
        let fields = intersection(&difference(&fields_of(entry), &written), &present);
        entry["fieldsV1"] = Value::Object(fields);
    }
    if !written.is_empty() {
        put(
            &mut entries,
            manager,
            "Update",
            sub,
            text(new, "/apiVersion"),
            |fields| union(&fields, &written),
        );
    }
    entries.retain(|entry| !fields_of(entry).is_empty());
    json::set(new, &["metadata", "managedFields"], json!(entries));
}

/// Server-side apply: `config` is all that `manager` wants to say about the object.
pub(crate) fn apply(
    live: &Value,
    config: &Value,
    manager: &str,
    force: bool,
    sub: &str,
) -> Result<Value, Failure> {
    let applied = owned(config);
    let mut entries = items(live, "/metadata/managedFields").to_vec();
    let mut conflicts = Vec::new();
    let mut others = Set::new();
    let mut prior = Set::new();
    for entry in &mut entries {
        let fields = fields_of(entry);
        if is(entry, manager, "Apply", sub) {
            prior = fields;
            continue;
        }
        let contested = differing(
            &intersection(&applied, &fields),
            Some(live),
            Some(config),
            "",
        );
        if contested.is_empty() {
            others = union(&others, &fields);
        } else if force {
            let left = difference(&fields, &contested);
            others = union(&others, &left);
            entry["fieldsV1"] = Value::Object(left);
        } else {
            paths(&contested, String::new(), &mut |path| {
                conflicts.push((text(entry, "/manager").to_owned(), path));
            });
        }
    }
    if !conflicts.is_empty() {
        return Err(conflict(&conflicts));
    }
    let mut new = live.clone();
    lay_over(&mut new, config, "");
    cut(
        &mut new,
        &difference(&difference(&prior, &applied), &others),
        "",
    );
    let version = text(config, "/apiVersion").to_owned();
    put(&mut entries, manager, "Apply", sub, &version, |_| applied);
    entries.retain(|entry| !fields_of(entry).is_empty());
    json::set(&mut new, &["metadata", "managedFields"], json!(entries));
    Ok(new)
}

fn conflict(conflicts: &[(String, String)]) -> Failure {
    let causes: Vec<Value> = conflicts
        .iter()
        .map(|(manager, path)| {
            json!({"reason": "FieldManagerConflict", "message": format!("conflict with {manager:?}"), "field": path})
        })
        .collect();
    let said: Vec<String> = conflicts
        .iter()
        .map(|(manager, path)| format!("conflict with {manager:?}: {path}"))
        .collect();
    let (count, plural) = (conflicts.len(), if conflicts.len() == 1 { "" } else { "s" });
    Failure::new(
        409,
        "Conflict",
        format!(
            "Apply failed with {count} conflict{plural}: {}",
            said.join(", ")
        ),
    )
    .details(json!({"causes": causes}))
}

/// The fields of an object that can be owned.
fn owned(object: &Value) -> Set {
    let mut set = set_of(object, "");
    for field in ["f:apiVersion", "f:kind"] {
        set.remove(field);
    }
    if let Some(metadata) = set.get_mut("f:metadata").and_then(Value::as_object_mut) {
        metadata.retain(|field, _| {
            matches!(
                field.as_str(),
                "f:labels"
                    | "f:annotations"
                    | "f:finalizers"
                    | "f:ownerReferences"
                    | "f:generateName"
            )
        });
        if metadata.is_empty() {
            set.remove("f:metadata");
        }
    }
    set
}

fn set_of(value: &Value, field: &str) -> Set {
    let mut set = Set::new();
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                set.insert(format!("f:{key}"), Value::Object(set_of(value, key)));
            }
        }
        Value::Array(list) => {
            for item in list {
                match item_key(field, list, item) {
                    Some(key) if key.starts_with("k:") => {
                        let mut inner = set_of(item, "");
                        inner.insert(".".to_owned(), json!({}));
                        set.insert(key, Value::Object(inner));
                    }
                    Some(key) => {
                        set.insert(key, json!({}));
                    }
                    None => {}
                }
            }
        }
        _ => {}
    }
    set
}

/// How an item of a list is named in a set; `None` in atomic lists.
fn item_key(field: &str, list: &[Value], item: &Value) -> Option<String> {
    match list_kind_of(field, list) {
        ListKind::Atomic => None,
        ListKind::Set => Some(format!("v:{item}")),
        ListKind::Map(keys) => {
            let mut id = Map::new();
            for key in keys {
                let missing = if *key == "protocol" {
                    json!("TCP")
                } else {
                    Value::Null
                };
                id.insert(
                    (*key).to_owned(),
                    item.get(*key).cloned().unwrap_or(missing),
                );
            }
            Some(format!("k:{}", Value::Object(id)))
        }
    }
}

/// The value that a key of a set names inside of `value`.
fn child<'a>(value: Option<&'a Value>, field: &str, key: &str) -> Option<&'a Value> {
    match (value?, key.strip_prefix("f:")) {
        (Value::Object(map), Some(name)) => map.get(name),
        (Value::Array(list), None) => list
            .iter()
            .find(|item| item_key(field, list, item).as_deref() == Some(key)),
        _ => None,
    }
}

/// The leaves of the new set that are new or whose value is another.
fn changed(before: &Set, after: &Set, old: &Value, new: &Value) -> Set {
    union(
        &difference(after, before),
        &differing(&intersection(after, before), Some(old), Some(new), ""),
    )
}

/// The leaves of a set at which two values differ.
fn differing(set: &Set, one: Option<&Value>, other: Option<&Value>, field: &str) -> Set {
    let mut out = Set::new();
    for (key, inner) in set.iter().filter(|(key, _)| *key != ".") {
        let (left, right) = (child(one, field, key), child(other, field, key));
        let below = inner.as_object().filter(|inner| !inner.is_empty());
        let name = key.strip_prefix("f:").unwrap_or("");
        match below {
            Some(below) => {
                let below = differing(below, left, right, name);
                if !below.is_empty() {
                    out.insert(key.clone(), Value::Object(below));
                }
            }
            None if left != right => {
                out.insert(key.clone(), json!({}));
            }
            None => {}
        }
    }
    out
}

fn union(one: &Set, other: &Set) -> Set {
    let mut out = one.clone();
    for (key, value) in other {
        let entry = out.entry(key.clone()).or_insert_with(|| json!({}));
        if let (Some(left), Some(right)) = (entry.as_object(), value.as_object()) {
            *entry = Value::Object(union(left, right));
        }
    }
    out
}

fn difference(one: &Set, other: &Set) -> Set {
    let mut out = Set::new();
    for (key, value) in one {
        let left = value.as_object().cloned().unwrap_or_default();
        match other.get(key).and_then(Value::as_object) {
            None => {
                out.insert(key.clone(), value.clone());
            }
            Some(right) if !left.is_empty() && !right.is_empty() => {
                let rest = difference(&left, right);
                if !rest.is_empty() {
                    out.insert(key.clone(), Value::Object(rest));
                }
            }
            Some(_) => {}
        }
    }
    out
}

fn intersection(one: &Set, other: &Set) -> Set {
    let mut out = Set::new();
    for (key, value) in one {
        let left = value.as_object().cloned().unwrap_or_default();
        let Some(right) = other.get(key).and_then(Value::as_object) else {
            continue;
        };
        if left.is_empty() || right.is_empty() {
            out.insert(key.clone(), json!({}));
        } else {
            let both = intersection(&left, right);
            if !both.is_empty() {
                out.insert(key.clone(), Value::Object(both));
            }
        }
    }
    out
}

fn paths(set: &Set, prefix: String, tell: &mut dyn FnMut(String)) {
    for (key, inner) in set.iter().filter(|(key, _)| *key != ".") {
        let path = match key.split_once(':') {
            Some(("f", name)) => format!("{prefix}.{name}"),
            Some(("k", keys)) => {
                let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let said: Vec<String> = keys
                    .iter()
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect();
                format!("{prefix}[{}]", said.join(","))
            }
            _ => format!("{prefix}[{key}]"),
        };
        match inner.as_object().filter(|inner| !inner.is_empty()) {
            Some(inner) => paths(inner, path, tell),
            None => tell(path),
        }
    }
}

/// Merges an applied configuration into the live object.
fn lay_over(live: &mut Value, config: &Value, field: &str) {
    match config {
        Value::Object(map) => {
            let live = as_map(live);
            for (key, value) in map {
                lay_over(live.entry(key.clone()).or_insert(Value::Null), value, key);
            }
        }
        Value::Array(list) if list_kind_of(field, list) != ListKind::Atomic => {
            if !live.is_array() {
                *live = json!([]);
            }
            let Some(target) = live.as_array_mut() else {
                return;
            };
            for item in list {
                let key = item_key(field, list, item);
                let found = target
                    .iter()
                    .position(|one| item_key(field, list, one) == key);
                match found {
                    Some(at) => lay_over(&mut target[at], item, ""),
                    None => target.push(item.clone()),
                }
            }
        }
        other => *live = other.clone(),
    }
}

/// Takes away the fields of a set.
fn cut(value: &mut Value, set: &Set, field: &str) {
    for (key, inner) in set.iter().filter(|(key, _)| *key != ".") {
        let below = inner
            .as_object()
            .filter(|inner| !inner.is_empty() && !inner.contains_key("."));
        match value {
            Value::Object(map) => {
                let Some(name) = key.strip_prefix("f:") else {
                    continue;
                };
                match below {
                    Some(below) => {
                        if let Some(child) = map.get_mut(name) {
                            cut(child, below, name);
                        }
                    }
                    None => {
                        map.remove(name);
                    }
                }
            }
            Value::Array(list) => {
                let at = list
                    .iter()
                    .position(|item| item_key(field, list, item).as_deref() == Some(key));
                match (at, below) {
                    (Some(at), Some(below)) => cut(&mut list[at], below, ""),
                    (Some(at), None) => {
                        list.remove(at);
                    }
                    (None, _) => {}
                }
            }
            _ => {}
        }
    }
}

fn fields_of(entry: &Value) -> Set {
    entry
        .get("fieldsV1")
        .and_then(Value::as_object)
        .cloned()
        .unwrap_or_default()
}

fn is(entry: &Value, manager: &str, operation: &str, sub: &str) -> bool {
    text(entry, "/manager") == manager
        && text(entry, "/operation") == operation
        && text(entry, "/subresource") == sub
}

fn put(
    entries: &mut Vec<Value>,
    manager: &str,
    operation: &str,
    sub: &str,
    version: &str,
    change: impl FnOnce(Set) -> Set,
) {
    let at = entries
        .iter()
        .position(|entry| is(entry, manager, operation, sub));
    let before = at
        .map(|at| entries.remove(at))
        .map(|entry| fields_of(&entry))
        .unwrap_or_default();
    let mut entry = json!({
        "manager": manager, "operation": operation, "apiVersion": version, "time": json::now(),
        "fieldsType": "FieldsV1", "fieldsV1": change(before),
    });
    if !sub.is_empty() {
        entry["subresource"] = json!(sub);
    }
    entries.insert(at.unwrap_or(entries.len()), entry);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(data: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": data})
    }

    #[test]
    fn a_field_no_longer_applied_goes_away() {
        let one = apply(
            &config(json!({"theirs": "1"})),
            &config(json!({"a": "1", "b": "2"})),
            "me",
            false,
            "",
        )
        .unwrap();
        let two = apply(&one, &config(json!({"a": "1"})), "me", false, "").unwrap();
        assert_eq!(two["data"], json!({"a": "1", "theirs": "1"}));
    }

    #[test]
    fn another_managers_value_is_a_conflict_until_forced() {
        let one = apply(
            &config(json!({})),
            &config(json!({"a": "1"})),
            "me",
            false,
            "",
        )
        .unwrap();
        let refused = apply(&one, &config(json!({"a": "2"})), "you", false, "")
            .unwrap_err()
            .to_json();
        assert_eq!(
            refused["message"],
            "Apply failed with 1 conflict: conflict with \"me\": .data.a"
        );
        let agreed = apply(&one, &config(json!({"a": "1"})), "you", false, "").unwrap();
        assert_eq!(items(&agreed, "/metadata/managedFields").len(), 2);
        let forced = apply(&one, &config(json!({"a": "2"})), "you", true, "").unwrap();
        assert_eq!(forced["data"]["a"], "2");
        let managers: Vec<&str> = items(&forced, "/metadata/managedFields")
            .iter()
            .map(|entry| text(entry, "/manager"))
            .collect();
        assert_eq!(managers, ["you"]);
    }

    #[test]
    fn an_update_takes_over_what_it_changes() {
        let old = apply(
            &config(json!({})),
            &config(json!({"a": "1", "b": "1"})),
            "me",
            false,
            "",
        )
        .unwrap();
        let mut new = old.clone();
        new["data"]["a"] = json!("2");
        record(&old, &mut new, "edit", "");
        let entries = items(&new, "/metadata/managedFields");
        assert_eq!(entries[0]["fieldsV1"], json!({"f:data": {"f:b": {}}}));
        assert_eq!(entries[1]["fieldsV1"], json!({"f:data": {"f:a": {}}}));
    }

    #[test]
    fn list_items_are_owned_by_key() {
        let pod = |containers: Value| json!({"apiVersion": "v1", "kind": "Pod", "spec": {"containers": containers}});
        let one = apply(
            &json!({}),
            &pod(json!([{"name": "a", "image": "x"}, {"name": "b", "image": "y"}])),
            "me",
            false,
            "",
        )
        .unwrap();
        let two = apply(
            &one,
            &pod(json!([{"name": "a", "image": "z"}])),
            "me",
            false,
            "",
        )
        .unwrap();
        assert_eq!(
            two["spec"]["containers"],
            json!([{"name": "a", "image": "z"}])
        );
    }
}
