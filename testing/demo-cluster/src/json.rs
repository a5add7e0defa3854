//! Small helpers to read and write objects that are kept as JSON, unparsed.

use serde_json::{Map, Value};

/// The string at a JSON pointer, or the empty string.
pub(crate) fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

pub(crate) fn number(value: &Value, pointer: &str) -> Option<i64> {
    value.pointer(pointer).and_then(Value::as_i64)
}

pub(crate) fn flag(value: &Value, pointer: &str) -> bool {
    value
        .pointer(pointer)
        .and_then(Value::as_bool)
        .unwrap_or(false)
}

pub(crate) fn items<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// The strings of an array of strings.
pub(crate) fn strings<'a>(value: &'a Value, pointer: &str) -> Vec<&'a str> {
    items(value, pointer)
        .iter()
        .filter_map(Value::as_str)
        .collect()
}

pub(crate) fn members<'a>(value: &'a Value, pointer: &str) -> Option<&'a Map<String, Value>> {
    value.pointer(pointer).and_then(Value::as_object)
}

/// The object at that key, made when it is missing or not an object.
pub(crate) fn object<'a>(value: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    let entry = as_map(value)
        .entry(key.to_owned())
        .or_insert_with(|| Value::Object(Map::new()));
    as_map(entry)
}

/// Sets a member of the object, making `value` an object first if it is none.
pub(crate) fn set(value: &mut Value, path: &[&str], new: Value) {
    let Some((last, parents)) = path.split_last() else {
        return;
    };
    let mut here = value;
    for parent in parents {
        here = as_map(here)
            .entry((*parent).to_owned())
            .or_insert_with(|| Value::Object(Map::new()));
    }
    as_map(here).insert((*last).to_owned(), new);
}

/// Sets a member unless there is one already.
pub(crate) fn default(value: &mut Value, path: &[&str], new: impl Into<Value>) {
    let pointer: String = path.iter().flat_map(|part| ["/", part]).collect();
    if value.pointer(&pointer).is_none_or(Value::is_null) {
        set(value, path, new.into());
    }
}

pub(crate) fn remove(value: &mut Value, path: &[&str]) -> Option<Value> {
    let (last, parents) = path.split_last()?;
    let mut here = value;
    for parent in parents {
        here = here.get_mut(*parent)?;
    }
    here.as_object_mut()?.remove(*last)
}

pub(crate) fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object just above"),
    }
}

/// The time now as Kubernetes writes it: RFC 3339, seconds, UTC.
pub(crate) fn now() -> String {
    stamp(time::OffsetDateTime::now_utc())
}

pub(crate) fn stamp(time: time::OffsetDateTime) -> String {
    let format =
        time::macros::format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time.format(format).unwrap_or_default()
}

/// RFC 3339 with nanoseconds, as log lines carry it.
pub(crate) fn stamp_nanos(nanos: i128) -> String {
    let time = time::OffsetDateTime::from_unix_timestamp_nanos(nanos)
        .unwrap_or(time::OffsetDateTime::UNIX_EPOCH);
    let format = time::macros::format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:9]Z"
    );
    time.format(format).unwrap_or_default()
}

pub(crate) fn parse_time(text: &str) -> Option<time::OffsetDateTime> {
    time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
}
