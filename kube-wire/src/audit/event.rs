//! One event of `audit.k8s.io/v1`, so that whatever reads a cluster's own audit reads this too.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::SystemTime;

use serde::Serialize;

use crate::request_info::ObjectRef;

/// As the API server cuts it, so that one header cannot fill the audit.
const USER_AGENT_MAX: usize = 1024;
/// A target may have 1 MiB, and thousands of events may wait for a slow file.
const REQUEST_URI_MAX: usize = 8 * 1024;

/// The event of one request. The fields are those of Kubernetes, in its order.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Event {
    /// `Event`.
    pub kind: &'static str,
    /// `audit.k8s.io/v1`.
    pub api_version: &'static str,
    /// `Metadata`: no bodies are recorded.
    pub level: &'static str,
    /// Unique for each request, and the same in the API server's own audit.
    #[serde(rename = "auditID")]
    pub audit_id: String,
    /// The stage of the request at which the event was made.
    pub stage: Stage,
    /// The target as the client sent it; see [`request_uri`].
    #[serde(rename = "requestURI")]
    pub request_uri: String,
    /// The verb of Kubernetes, or the method in lower case.
    pub verb: String,
    /// The user as whom the request is made.
    pub user: AuditUser,
    /// The client's address first, then those of proxies.
    #[serde(rename = "sourceIPs", skip_serializing_if = "Vec::is_empty")]
    pub source_ips: Vec<String>,
    /// See [`user_agent`].
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_agent: String,
    /// The object that the request is about, if it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object_ref: Option<ObjectRef>,
    /// The answer's status; `None` before there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_status: Option<ResponseStatus>,
    /// When the head of the request had arrived; see [`timestamp`].
    pub request_received_timestamp: String,
    /// When the request reached the stage.
    pub stage_timestamp: String,
    /// Facts that have no field.
    pub annotations: BTreeMap<&'static str, String>,
}

/// The stage of a request at which an event is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Stage {
    /// The headers of a long answer have been sent.
    ResponseStarted,
    /// The answer has ended, well or not.
    ResponseComplete,
}

/// `authentication/v1.UserInfo`, without a UID.
#[derive(Debug, Clone, Serialize)]
pub struct AuditUser {
    /// The name.
    pub username: String,
    /// The groups.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<String>,
    /// The extras.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub extra: BTreeMap<&'static str, Vec<String>>,
}

/// `meta/v1.Status` as audits have it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ResponseStatus {
    /// Always there, and empty.
    pub metadata: Empty,
    /// `Failure`, for an error of the agent's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<&'static str>,
    /// The text of that error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// The `StatusReason` of that error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The HTTP status of the answer.
    pub code: u16,
}

/// An object without members.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Empty {}

impl Event {
    /// The event as one line with its end, whatever a client has put into it.
    ///
    /// JSON escapes control characters below U+0020; terminals and log shippers also break lines or
    /// change state at DEL, C1 controls, U+2028 and U+2029, which are escaped here. All of them can
    /// occur within strings only, so the text stays the same JSON.
    pub fn to_line(&self) -> Option<String> {
        let json = serde_json::to_string(self).ok()?;
        let mut line = String::with_capacity(json.len() + 1);
        for character in json.chars() {
            match character {
                '\u{7f}'..='\u{9f}'
                | '\u{2028}'
                | '\u{2029}'
                | '\u{202a}'..='\u{202e}'
                | '\u{2066}'..='\u{2069}' => {
                    line.push_str(&format!("\\u{:04x}", u32::from(character)));
                }
                _ => line.push(character),
            }
        }
        line.push('\n');
        Some(line)
    }
}

/// RFC 3339 with microseconds, as Kubernetes' `MicroTime`; two of them a request. A clock that
/// stands before 1970 is taken to stand there, one after 9999 gives nothing.
pub fn timestamp(at: SystemTime) -> String {
    let mut text = String::with_capacity("1970-01-01T00:00:00.000000Z".len());
    let at = at.max(SystemTime::UNIX_EPOCH);
    let _ = write!(text, "{}", humantime::format_rfc3339_micros(at));
    text
}

/// The header as text, cut where the API server cuts it.
pub fn user_agent(bytes: &[u8]) -> String {
    cut(&String::from_utf8_lossy(bytes), USER_AGENT_MAX)
}

/// The target, cut after 8 KiB.
pub fn request_uri(target: &str) -> String {
    cut(target, REQUEST_URI_MAX)
}

fn cut(text: &str, most: usize) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let mut end = most;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}...TRUNCATED", &text[..end])
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn event(text: &str) -> Event {
        Event {
            kind: "Event",
            api_version: "audit.k8s.io/v1",
            level: "Metadata",
            audit_id: "id".into(),
            stage: Stage::ResponseComplete,
            request_uri: text.into(),
            verb: text.into(),
            user: AuditUser {
                username: text.into(),
                groups: vec![text.into()],
                extra: BTreeMap::new(),
            },
            source_ips: vec![text.into()],
            user_agent: user_agent(text.as_bytes()),
            object_ref: None,
            response_status: Some(ResponseStatus {
                code: 200,
                message: Some(text.into()),
                ..Default::default()
            }),
            request_received_timestamp: timestamp(SystemTime::UNIX_EPOCH),
            stage_timestamp: timestamp(SystemTime::UNIX_EPOCH + Duration::from_micros(1_500_000)),
            annotations: BTreeMap::from([("throwline.dev/cluster", text.to_owned())]),
        }
    }

    #[test]
    fn a_clock_that_is_wrong_costs_no_event() {
        let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
        assert_eq!(timestamp(before), timestamp(SystemTime::UNIX_EPOCH));
        let after = SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_800);
        assert_eq!(timestamp(after), "");
    }

    #[test]
    fn has_the_field_names_of_kubernetes() {
        let value: serde_json::Value =
            serde_json::from_str(&event("x").to_line().unwrap()).unwrap();
        assert_eq!(value["kind"], "Event");
        assert_eq!(value["apiVersion"], "audit.k8s.io/v1");
        assert_eq!(value["auditID"], "id");
        assert_eq!(value["requestURI"], "x");
        assert_eq!(value["sourceIPs"][0], "x");
        assert_eq!(value["stage"], "ResponseComplete");
        assert_eq!(value["responseStatus"]["code"], 200);
        assert_eq!(
            value["requestReceivedTimestamp"],
            "1970-01-01T00:00:00.000000Z"
        );
        assert_eq!(value["stageTimestamp"], "1970-01-01T00:00:01.500000Z");
    }

    #[test]
    fn a_long_user_agent_is_cut_between_characters() {
        let cut = user_agent("é".repeat(2000).as_bytes());
        assert!(
            cut.len() < 1100 && cut.ends_with("...TRUNCATED"),
            "{}",
            cut.len()
        );
    }

    proptest! {
        #[test]
        fn one_event_is_one_line_and_reads_back(text in any::<String>(), nasty in "[\r\n\u{1b}\u{85}\u{7f}\u{2028}\u{2029}\u{202e}]{0,8}") {
            let text = format!("{text}{nasty}");
            let line = event(&text).to_line().unwrap();
            let body = line.strip_suffix('\n').unwrap();
            let breaks = body.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'));
            prop_assert!(!breaks);
            let value: serde_json::Value = serde_json::from_str(body).unwrap();
            prop_assert_eq!(value["requestURI"].as_str().unwrap(), text.as_str());
        }
    }
}
