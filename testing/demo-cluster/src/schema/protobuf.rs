//! The protobuf form of an OpenAPI 2 document, which kubectl before 1.26 insists on. Field numbers
//! are those of gnostic's `OpenAPIv2.proto`.

use serde_json::{Map, Value};

use crate::json::{flag, items, members, strings, text};

/// A message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.0.push((value & 0x7f) as u8);
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend_from_slice(bytes);
    }

    fn text(&mut self, field: u64, text: &str) {
        if !text.is_empty() {
            self.bytes(field, text.as_bytes());
        }
    }

    fn flag(&mut self, field: u64, value: bool) {
        if value {
            self.varint(field << 3);
            self.varint(1);
        }
    }

    fn message(&mut self, field: u64, message: &Self) {
        self.bytes(field, &message.0);
    }
}

pub(super) fn document(swagger: &Value) -> Vec<u8> {
    let mut document = Message::default();
    document.text(1, text(swagger, "/swagger"));
    let mut info = Message::default();
    info.text(1, text(swagger, "/info/title"));
    info.text(2, text(swagger, "/info/version"));
    document.message(2, &info);
    let mut paths = Message::default();
    for (path, item) in members(swagger, "/paths").into_iter().flatten() {
        let mut value = Message::default();
        for (field, method) in [
            (2, "get"),
            (3, "put"),
            (4, "post"),
            (5, "delete"),
            (8, "patch"),
        ] {
            if let Some(one) = item.get(method) {
                value.message(field, &operation(one));
            }
        }
        paths.message(2, &named(path, &value));
    }
    document.message(8, &paths);
    document.message(9, &schemas(members(swagger, "/definitions")));
    document.0
}

fn named(name: &str, value: &Message) -> Message {
    let mut pair = Message::default();
    pair.text(1, name);
    pair.message(2, value);
    pair
}

fn operation(from: &Value) -> Message {
    let mut to = Message::default();
    to.text(5, text(from, "/operationId"));
    for parameter in items(from, "/parameters") {
        let mut query = Message::default();
        query.text(2, "query");
        query.text(4, text(parameter, "/name"));
        query.text(6, "string");
        query.flag(20, true);
        // ParametersItem → Parameter → NonBodyParameter → QueryParameterSubSchema.
        let wrapped = [3, 2, 1].into_iter().fold(query, |inner, field| {
            let mut outer = Message::default();
            outer.message(field, &inner);
            outer
        });
        to.message(8, &wrapped);
    }
    let mut response = Message::default();
    response.text(1, "OK");
    let mut value = Message::default();
    value.message(1, &response);
    let mut responses = Message::default();
    responses.message(1, &named("200", &value));
    to.message(9, &responses);
    extensions(&mut to, 13, from);
    to
}

/// A map from names to schemas.
fn schemas(from: Option<&Map<String, Value>>) -> Message {
    let mut to = Message::default();
    for (name, one) in from.into_iter().flatten() {
        to.message(1, &named(name, &schema(one)));
    }
    to
}

fn schema(from: &Value) -> Message {
    let mut to = Message::default();
    to.text(1, text(from, "/$ref"));
    to.text(2, text(from, "/format"));
    to.text(4, text(from, "/description"));
    for name in strings(from, "/required") {
        to.text(19, name);
    }
    if let Some(values) = from
        .get("additionalProperties")
        .filter(|values| values.is_object())
    {
        let mut item = Message::default();
        item.message(1, &schema(values));
        to.message(21, &item);
    }
    if !text(from, "/type").is_empty() {
        let mut item = Message::default();
        item.text(1, text(from, "/type"));
        to.message(22, &item);
    }
    if let Some(values) = from.get("items") {
        let mut item = Message::default();
        item.message(1, &schema(values));
        to.message(23, &item);
    }
    if let Some(properties) = members(from, "/properties") {
        to.message(25, &schemas(Some(properties)));
    }
    to.flag(27, flag(from, "/readOnly"));
    extensions(&mut to, 31, from);
    to
}

/// Extensions carry YAML, of which JSON is a part.
fn extensions(to: &mut Message, field: u64, from: &Value) {
    for (name, value) in from
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| name.starts_with("x-"))
    {
        let mut any = Message::default();
        any.text(2, &format!("{value}\n"));
        to.message(field, &named(name, &any));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn golden_bytes_of_a_small_document() {
        let swagger = json!({"swagger": "2.0", "definitions": {"a": {"type": "string"}}});
        let golden = b"\x0a\x032.0\x12\x00\x42\x00\x4a\x12\x0a\x10\x0a\x01a\x12\x0b\xb2\x01\x08\x0a\x06string";
        assert_eq!(document(&swagger), golden);
    }
}
