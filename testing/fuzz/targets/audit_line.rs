//! Audit events of any request: one event is one line of JSON, whatever a client put into it.
#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use throwline_kube_wire::audit::{AuditUser, Event, ResponseStatus, Stage};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data).into_owned();
    let event = Event {
        kind: "Event",
        api_version: "audit.k8s.io/v1",
        level: "Metadata",
        audit_id: "id".to_owned(),
        stage: Stage::ResponseComplete,
        request_uri: text.clone(),
        verb: "get".to_owned(),
        user: AuditUser {
            username: text.clone(),
            groups: vec![text.clone()],
            extra: BTreeMap::new(),
        },
        source_ips: vec![text.clone()],
        user_agent: text.clone(),
        object_ref: None,
        response_status: Some(ResponseStatus {
            message: Some(text.clone()),
            code: 200,
            ..Default::default()
        }),
        request_received_timestamp: String::new(),
        stage_timestamp: String::new(),
        annotations: BTreeMap::new(),
    };
    let line = event.to_line().expect("an event is JSON");
    let body = line.strip_suffix('\n').expect("a line has an end");
    let breaks = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    assert!(
        !body.contains(breaks),
        "one event is several lines: {body:?}"
    );
    let read: serde_json::Value = serde_json::from_str(body).expect("an event is JSON");
    assert_eq!(read["user"]["username"], text);
    assert_eq!(read["requestURI"], text);
});
