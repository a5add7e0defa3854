//! JSON with a secret in it, wiped from memory when it is freed.

use std::io;
use std::ops::{Deref, DerefMut};

use bytes::Bytes;
use serde_json::{Map, Value};
use zeroize::{Zeroize, Zeroizing};

/// Its strings are wiped when it is dropped; the keys of objects are not.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Wiped(Value);

impl Wiped {
    /// For a caller that wipes the value.
    pub(crate) fn take(mut self) -> Value {
        self.0.take()
    }
}

impl From<Value> for Wiped {
    fn from(value: Value) -> Self {
        Self(value)
    }
}

impl Deref for Wiped {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.0
    }
}

impl DerefMut for Wiped {
    fn deref_mut(&mut self) -> &mut Value {
        &mut self.0
    }
}

impl Drop for Wiped {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(items) => items.iter_mut().for_each(wipe),
        Value::Object(object) => wipe_object(object),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

pub(crate) fn wipe_object(object: &mut Map<String, Value>) {
    object.values_mut().for_each(wipe);
}

/// As text that is wiped when its last owner drops it.
pub(crate) fn to_bytes(value: &Value) -> Bytes {
    // Measured first, because a buffer that grows leaves copies.
    let mut length = Count(0);
    let _ = serde_json::to_writer(&mut length, value);
    let mut text = Zeroizing::new(Vec::with_capacity(length.0));
    let _ = serde_json::to_writer(&mut *text, value);
    Bytes::from_owner(text)
}

/// Wipes bytes that have no other owner. Those in the shared buffer of a connection remain.
pub(crate) fn wipe_bytes(bytes: Bytes) {
    if let Ok(mut bytes) = bytes.try_into_mut() {
        bytes[..].zeroize();
    }
}

struct Count(usize);

impl io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_string_is_wiped_and_the_text_is_the_same() {
        let mut value = json!({"data": {"key": "secret"}, "list": ["a", {"b": "c"}], "n": 1});
        assert_eq!(to_bytes(&value), value.to_string());
        wipe(&mut value);
        assert_eq!(
            value,
            json!({"data": {"key": ""}, "list": ["", {"b": ""}], "n": 1})
        );
    }
}
