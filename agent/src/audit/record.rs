//! The life of one request in the audit: begun with its head, ended when dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use http::header::USER_AGENT;
use http::request::Parts;
use throwline_kube_wire::audit::{
    AuditAttributes, AuditUser, Event, ResponseStatus, Stage, request_uri, timestamp, user_agent,
};
use throwline_policy::rules::{CREDENTIAL_EXTRA, User, target_of};

use super::{Sink, Unavailable};

/// What all requests of one session have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    pub cluster: String,
    pub user: User,
    /// The user's address as the relay saw it; reported by the relay, so for the audit only.
    pub source: String,
}

/// One request. Its end is written when it is dropped, so on each path through the code.
pub struct Record {
    sink: Sink,
    event: Event,
    long_running: bool,
    is_admitted: bool,
    asked: Duration,
}

impl Record {
    /// Waits for room in the audit, for a bounded time.
    ///
    /// # Errors
    /// [`Unavailable`] when the audit is required and cannot be written.
    pub async fn begin(
        sink: &Sink,
        subject: &Arc<Subject>,
        head: &Parts,
    ) -> Result<Self, (Unavailable, Box<Self>)> {
        let target = target_of(head);
        let attributes = AuditAttributes::of(&head.method, target);
        let header = |name: &str| {
            head.headers
                .get(name)
                .map(|value| String::from_utf8_lossy(value.as_bytes()).into())
        };
        let mut annotations = BTreeMap::from([("throwline.dev/cluster", subject.cluster.clone())]);
        for (key, name) in [
            ("throwline.dev/kubectl-command", "kubectl-command"),
            ("throwline.dev/kubectl-session", "kubectl-session"),
        ] {
            if let Some(value) = header(name) {
                annotations.insert(key, value);
            }
        }
        if attributes.effective_verb() != attributes.verb {
            annotations.insert(
                "throwline.dev/effective-verb",
                attributes.effective_verb().to_owned(),
            );
        }
        let credential = subject.user.credential.clone();
        let event = Event {
            kind: "Event",
            api_version: "audit.k8s.io/v1",
            level: "Metadata",
            audit_id: uuid::Uuid::new_v4().to_string(),
            stage: Stage::ResponseComplete,
            request_uri: request_uri(target),
            verb: attributes.verb,
            user: AuditUser {
                username: subject.user.name.clone(),
                groups: subject.user.groups.clone(),
                extra: credential
                    .map(|it| BTreeMap::from([(CREDENTIAL_EXTRA, vec![it])]))
                    .unwrap_or_default(),
            },
            source_ips: Some(subject.source.clone())
                .filter(|source| !source.is_empty())
                .into_iter()
                .collect(),
            user_agent: head
                .headers
                .get(USER_AGENT)
                .map(|it| user_agent(it.as_bytes()))
                .unwrap_or_default(),
            object_ref: attributes.object,
            response_status: None,
            request_received_timestamp: timestamp(SystemTime::now()),
            stage_timestamp: String::new(),
            annotations,
        };
        let mut record = Self {
            sink: sink.clone(),
            event,
            long_running: attributes.long_running,
            is_admitted: false,
            asked: attributes.asked,
        };
        match sink.admit().await {
            Ok(()) => {
                record.is_admitted = true;
                Ok(record)
            }
            Err(unavailable) => Err((unavailable, Box::new(record))),
        }
    }

    /// The `auditID`, a UUID. The API server receives it as `Audit-ID`, so that its events of this
    /// request carry the same.
    pub fn id(&self) -> &str {
        &self.event.audit_id
    }

    /// Whether the answer may be a workload's, behind the `proxy` subresource.
    pub fn is_workload(&self) -> bool {
        self.event
            .object_ref
            .as_ref()
            .is_some_and(|object| object.subresource == "proxy" || self.event.verb == "proxy")
    }

    pub fn is_long_running(&self) -> bool {
        self.long_running
    }

    /// How long the client asks the API server to work on it; zero: without a limit.
    pub fn asked(&self) -> Duration {
        self.asked
    }

    /// The answer's head is on its way to the user.
    pub fn answered(&mut self, code: StatusCode) {
        self.event.response_status = Some(ResponseStatus {
            code: code.as_u16(),
            ..ResponseStatus::default()
        });
        if self.long_running {
            self.emit(Stage::ResponseStarted);
        }
    }

    /// The agent answers itself.
    pub fn refused(&mut self, code: StatusCode, reason: &'static str, message: &str) {
        self.event.response_status = Some(ResponseStatus {
            status: Some("Failure"),
            message: Some(message.to_owned()),
            reason: Some(reason),
            code: code.as_u16(),
            ..ResponseStatus::default()
        });
    }

    /// The API server refused it, and not for the user's own rights.
    pub fn refused_by(&mut self, what: &'static str) {
        self.event
            .annotations
            .insert("throwline.dev/refused-by", what.to_owned());
    }

    /// The answer did not reach its own end.
    pub fn cut(&mut self, by: &'static str) {
        self.event
            .annotations
            .insert("throwline.dev/cut", by.to_owned());
    }

    fn emit(&mut self, stage: Stage) {
        self.event.stage = stage;
        self.event.stage_timestamp = timestamp(SystemTime::now());
        self.sink.write(&self.event, self.is_admitted);
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.event.response_status.is_none() {
            // As proxies write it: the client was gone before there was an answer.
            self.refused(
                StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
                "Gone",
                "the client went away",
            );
        }
        self.emit(Stage::ResponseComplete);
    }
}
