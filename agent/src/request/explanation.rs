//! Explains refusals (403) that are about the agent's own account rather than the user, which it detects by
//! their text. Pure.
//!
//! kubectl shows `User "system:serviceaccount:…" cannot impersonate-on:user-info:list resource …`, which
//! does not name the ceiling as the cause. So one sentence is added to the message of the API server's
//! `Status`, in JSON and in protobuf; all else is unchanged.

use bytes::Bytes;
use serde_json::Value;

/// Largest answer that is looked at, bytes; a `Status` has some hundred.
pub(crate) const MAX: usize = 64 * 1024;
/// Before an object in Kubernetes' protobuf.
const MAGIC: &[u8] = b"k8s\0";

/// The right that the agent's account lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// The request, for any user.
    Ceiling,
    /// Impersonate this user, or one of its groups.
    User,
}

/// An answer with its explanation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Explained {
    pub(crate) why: Refused,
    pub(crate) message: String,
    pub(crate) body: Bytes,
}

impl Refused {
    /// By the API server's message. A user's own refusal names the user.
    fn of(message: &str, user: &str) -> Option<Self> {
        let named = message.match_indices("User \"").find_map(|(at, open)| {
            let (name, rest) = message[at + open.len()..].split_once('"')?;
            Some((name, rest.strip_prefix(" cannot ")?))
        });
        let (name, verb) = named?;
        if name == user {
            return None;
        }
        match verb {
            verb if verb.starts_with("impersonate-on:user-info:") => Some(Self::Ceiling),
            verb if verb.starts_with("impersonate:user-info ") => Some(Self::User),
            verb if verb.starts_with("impersonate resource ") => Some(Self::User),
            _ => None,
        }
    }

    /// In the audit.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Ceiling => "ceiling",
            Self::User => "agent-account",
        }
    }

    fn sentence(self, user: &str, cluster: &str) -> String {
        match self {
            Self::Ceiling => format!(
                " (throwline agent: this is the ceiling of the cluster \"{cluster}\", which applies to all access through \
                 Throwline; the rights of \"{user}\" were not asked)"
            ),
            Self::User => format!(
                " (throwline agent: the agent of the cluster \"{cluster}\" may not act for \"{user}\" or for one of \
                 its groups; the cluster's administrator can allow it)"
            ),
        }
    }
}

/// Whether a body of this type is worth reading.
pub(crate) fn is_readable(content_type: &str) -> bool {
    is_json(content_type) || is_protobuf(content_type)
}

/// The same answer with one sentence more, if it is about the agent's account. `None`: it is not.
pub(crate) fn explain(
    content_type: &str,
    body: &[u8],
    user: &str,
    cluster: &str,
) -> Option<Explained> {
    let explained = |message: &str| {
        let why = Refused::of(message, user)?;
        Some((why, format!("{message}{}", why.sentence(user, cluster))))
    };
    if is_json(content_type) {
        // Only a Status of the expected form is changed: a refusal that cannot be parsed is passed
        // on byte for byte.
        let mut status: Value = serde_json::from_slice(body).ok()?;
        if status.get("kind")?.as_str()? != "Status" {
            return None;
        }
        let (why, message) = explained(status.get("message")?.as_str()?)?;
        *status.get_mut("message")? = Value::String(message.clone());
        let body = serde_json::to_vec(&status).ok()?.into();
        return Some(Explained { why, message, body });
    }
    if is_protobuf(content_type) {
        // runtime.Unknown: 1 typeMeta{1 apiVersion, 2 kind}, 2 raw; Status: 3 message.
        let unknown = body.strip_prefix(MAGIC)?;
        let kind = text(field(field(unknown, 1)?, 2)?)?;
        let status = field(unknown, 2)?;
        let (why, message) = explained(text(field(status, 3)?)?)?;
        if kind != "Status" {
            return None;
        }
        // The other fields are copied as they are, also those that a newer API server adds.
        let status = with_field(status, 3, message.as_bytes())?;
        let body = [MAGIC, &with_field(unknown, 2, &status)?].concat().into();
        return Some(Explained { why, message, body });
    }
    None
}

fn is_json(content_type: &str) -> bool {
    media_type(content_type).eq_ignore_ascii_case("application/json")
}

fn is_protobuf(content_type: &str) -> bool {
    media_type(content_type).eq_ignore_ascii_case("application/vnd.kubernetes.protobuf")
}

fn media_type(content_type: &str) -> &str {
    content_type.split(';').next().unwrap_or_default().trim()
}

fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok()
}

/// One field of a protobuf message: its number, its contents if it is length-delimited, all its bytes.
struct Field<'a> {
    number: u64,
    contents: Option<&'a [u8]>,
    whole: &'a [u8],
}

/// The fields of a message; `None` in place of one that is damaged, then nothing more.
fn fields(message: &[u8]) -> impl Iterator<Item = Option<Field<'_>>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let before = std::mem::take(&mut rest);
        let Some((field, after)) = next_field(before) else {
            return Some(None);
        };
        rest = after;
        Some(Some(field))
    })
}

fn next_field(message: &[u8]) -> Option<(Field<'_>, &[u8])> {
    let (tag, after) = varint(message)?;
    let (contents, rest) = match tag & 7 {
        0 => (None, varint(after)?.1),
        1 => (None, after.get(8..)?),
        2 => {
            let (length, after) = varint(after)?;
            let (contents, rest) = after.split_at_checked(usize::try_from(length).ok()?)?;
            (Some(contents), rest)
        }
        5 => (None, after.get(4..)?),
        _ => return None,
    };
    let whole = &message[..message.len() - rest.len()];
    let number = tag >> 3;
    Some((
        Field {
            number,
            contents,
            whole,
        },
        rest,
    ))
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for (at, byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7f).checked_shl(7 * u32::try_from(at).ok()?)?;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

/// The last of that number counts, as protobuf has it.
fn field(message: &[u8], number: u64) -> Option<&[u8]> {
    let mut found = None;
    for field in fields(message) {
        let field = field?;
        if field.number == number {
            found = Some(field.contents?);
        }
    }
    found
}

/// The same message, with `contents` in the place of that field.
fn with_field(message: &[u8], number: u64, contents: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(message.len() + contents.len() + 8);
    let mut is_written = false;
    for field in fields(message) {
        let field = field?;
        if field.number != number {
            out.extend(field.whole);
        } else if !is_written {
            is_written = true;
            push_varint(&mut out, number << 3 | 2);
            push_varint(&mut out, u64::try_from(contents.len()).ok()?);
            out.extend(contents);
        }
    }
    Some(out)
}

fn push_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        // The low seven bits.
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const CEILING: &str = "secrets is forbidden: User \"system:serviceaccount:t:agent\" cannot \
        impersonate-on:user-info:list resource \"secrets\" in API group \"\" in the namespace \"a\"";

    fn status(message: &str) -> Vec<u8> {
        let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": message, "reason": "Forbidden", "details": {"kind": "secrets"}, "code": 403});
        status.to_string().into_bytes()
    }

    fn of_json(message: &str) -> Option<Explained> {
        explain("application/json", &status(message), "dana", "prod")
    }

    /// `k8s\0`, and a Status with a field that is unknown here.
    fn protobuf(kind: &str, message: &str) -> Vec<u8> {
        let delimited = |number: u64, contents: &[u8]| {
            let mut out = Vec::new();
            push_varint(&mut out, number << 3 | 2);
            push_varint(&mut out, contents.len() as u64);
            out.extend(contents);
            out
        };
        let meta = [delimited(1, b"v1"), delimited(2, kind.as_bytes())].concat();
        let status = [
            delimited(1, b""),
            delimited(2, b"Failure"),
            delimited(3, message.as_bytes()),
            delimited(4, b"Forbidden"),
            vec![6 << 3, 0x93, 3],
            // Number 99, four bytes.
            vec![0x9d, 6, 1, 2, 3, 4],
        ]
        .concat();
        [
            MAGIC.to_vec(),
            delimited(1, &meta),
            delimited(2, &status),
            delimited(3, b""),
            delimited(4, b""),
        ]
        .concat()
    }

    #[test]
    fn a_refusal_by_the_ceiling_says_so_and_is_else_the_same() {
        let explained = of_json(CEILING).unwrap();
        assert_eq!(explained.why, Refused::Ceiling);
        assert!(explained.message.starts_with(CEILING));
        assert!(
            explained
                .message
                .contains("ceiling of the cluster \"prod\""),
            "{}",
            explained.message
        );
        let mut now: Value = serde_json::from_slice(&explained.body).unwrap();
        assert_eq!(now["message"], explained.message.as_str());
        now["message"] = CEILING.into();
        assert_eq!(
            now,
            serde_json::from_slice::<Value>(&status(CEILING)).unwrap()
        );
    }

    #[test]
    fn protobuf_stays_protobuf_with_all_its_other_fields() {
        let body = protobuf("Status", CEILING);
        let kind = "application/vnd.kubernetes.protobuf";
        let explained = explain(kind, &body, "dana", "prod").unwrap();
        assert_eq!(explained.body, protobuf("Status", &explained.message));
        assert_eq!(
            explain(kind, &protobuf("Secret", CEILING), "dana", "prod"),
            None
        );
        // Cut anywhere, it is passed on as it is.
        for end in 0..body.len() - 4 {
            assert_eq!(explain(kind, &body[..end], "dana", "prod"), None, "{end}");
        }
    }

    #[test]
    fn who_is_refused_is_told_apart() {
        let who = "users.authentication.k8s.io \"dana\" is forbidden: User \"agent\" cannot impersonate:user-info \
                   resource \"users\" in API group \"authentication.k8s.io\" at the cluster scope";
        assert_eq!(of_json(who).unwrap().why, Refused::User);
        let legacy = "users \"dana\" is forbidden: User \"agent\" cannot impersonate resource \"users\" in API group \"\" at the cluster scope";
        assert_eq!(of_json(legacy).unwrap().why, Refused::User);
        let path =
            "forbidden: User \"agent\" cannot impersonate-on:user-info:get path \"/version\"";
        assert_eq!(of_json(path).unwrap().why, Refused::Ceiling);
        for own in [
            "secrets is forbidden: User \"dana\" cannot list resource \"secrets\" in API group \"\"",
            // What a user names cannot make it seem the agent's.
            "pods \"x\\\" User \\\"agent\\\" cannot impersonate-on:user-info:get\" is forbidden: User \"dana\" cannot get resource \"pods\"",
            "users \"eve\" is forbidden: User \"dana\" cannot impersonate resource \"users\" in API group \"\"",
            "quota exceeded",
            "",
        ] {
            assert_eq!(of_json(own), None, "{own}");
        }
    }

    #[test]
    fn what_is_no_status_is_passed_on() {
        for body in [
            &b"{}"[..],
            b"",
            b"[1]",
            b"{\"kind\":\"Status\"}",
            b"{\"kind\":\"Pod\",\"message\":\"x\"}",
        ] {
            assert_eq!(explain("application/json", body, "dana", "prod"), None);
        }
        assert_eq!(
            explain("text/plain", &status(CEILING), "dana", "prod"),
            None
        );
        assert!(
            explain(
                "application/json; charset=utf-8",
                &status(CEILING),
                "dana",
                "prod"
            )
            .is_some()
        );
    }

    proptest! {
        #[test]
        fn nothing_panics(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let body = [MAGIC, &body].concat();
            let _ = explain("application/vnd.kubernetes.protobuf", &body, "dana", "prod");
            let _ = explain("application/json", &body, "dana", "prod");
        }
    }
}
