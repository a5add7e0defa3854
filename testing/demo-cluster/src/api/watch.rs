//! Watches: what is there, then each change, then bookmarks, until the client or the time ends.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::stream;
use http::Response;
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};

use super::{Call, list::shape, negotiate::Form};
use crate::{
    Cluster,
    kinds::Kind,
    selectors::Selectors,
    status::{Body, Failure, bytes_response},
    store::Change,
};

struct Watch {
    cluster: Arc<Cluster>,
    call: Call,
    form: Form,
    selectors: Selectors,
    revision: u64,
    changed: watch::Receiver<u64>,
    pending: VecDeque<Bytes>,
    columns_sent: bool,
    bookmarks: Option<Duration>,
    next_bookmark: Instant,
    deadline: Instant,
    ended: bool,
}

pub(super) fn serve(cluster: &Arc<Cluster>, call: &Call) -> Result<Response<Body>, Failure> {
    let form = call.accept.form()?;
    let kind = call.target.kind;
    let selectors = Selectors::parse(kind, &call.query)?.and_name(&call.target.name);
    let from: Option<u64> = call.query.number("resourceVersion")?;
    let timeout: Option<u64> = call
        .query
        .number("timeoutSeconds")?
        .filter(|seconds| *seconds > 0);
    let timeout = timeout.unwrap_or_else(|| rand::rng().random_range(1800..3600));
    let wants_bookmarks = call.query.flag("allowWatchBookmarks");
    let initial = call.query.get("sendInitialEvents");
    let changed = cluster.store.subscribe();
    let mut watch = Watch {
        cluster: Arc::clone(cluster),
        call: Call {
            target: call.target.clone(),
            query: call.query.clone(),
            user: call.user.clone(),
            accept: call.accept.clone(),
            verb: call.verb.clone(),
            manager: call.manager.clone(),
        },
        form,
        selectors,
        revision: from.unwrap_or(0),
        changed,
        pending: VecDeque::new(),
        columns_sent: false,
        bookmarks: wants_bookmarks.then_some(cluster.options.bookmark_interval),
        next_bookmark: Instant::now() + cluster.options.bookmark_interval,
        deadline: Instant::now() + Duration::from_secs(timeout),
        ended: false,
    };
    let replay = match initial {
        Some("true" | "1") => true,
        Some(_) => false,
        None => matches!(from, None | Some(0)),
    };
    if replay {
        watch.replay();
        if initial.is_some() && wants_bookmarks {
            watch.bookmark(true);
        }
    } else if matches!(from, None | Some(0)) {
        watch.revision = *watch.changed.borrow();
    } else {
        // Too old is reported by the status of the response, as the API server does it.
        cluster.store.changes(kind, watch.revision)?;
    }
    let body = stream::unfold(watch, |mut watch| async move {
        let bytes = watch.next().await?;
        Some((Ok::<_, std::io::Error>(Frame::data(bytes)), watch))
    });
    let mut response = bytes_response(200, "application/json", Bytes::new());
    *response.body_mut() = StreamBody::new(body).boxed_unsync();
    Ok(response)
}

impl Watch {
    fn kind(&self) -> &'static Kind {
        self.call.target.kind
    }

    fn replay(&mut self) {
        let namespace =
            Some(self.call.target.namespace.as_str()).filter(|namespace| !namespace.is_empty());
        let (revision, objects) = self.cluster.store.list(self.kind(), namespace);
        self.revision = revision;
        for object in objects {
            if self.selectors.match_object(&object) {
                self.push("ADDED", &object);
            }
        }
    }

    /// The next lines, all that are ready in one piece; `None` ends the response.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(first) = self.pending.pop_front() {
                if self.pending.is_empty() {
                    return Some(first);
                }
                let mut joined = first.to_vec();
                while joined.len() < 64 << 10
                    && let Some(line) = self.pending.pop_front()
                {
                    joined.extend_from_slice(&line);
                }
                return Some(joined.into());
            }
            if self.ended {
                return None;
            }
            self.changed.borrow_and_update();
            match self.cluster.store.changes(self.kind(), self.revision) {
                Ok((revision, changes)) => {
                    self.revision = revision;
                    for change in changes {
                        self.tell(&change);
                    }
                }
                Err(gone) => {
                    self.line("ERROR", &gone.to_json());
                    self.ended = true;
                }
            }
            if !self.pending.is_empty() {
                continue;
            }
            let stop = self.cluster.stop.clone();
            tokio::select! {
                changed = self.changed.changed() => self.ended |= changed.is_err(),
                () = stop.cancelled() => return None,
                () = tokio::time::sleep_until(self.deadline) => {
                    if self.bookmarks.is_some() {
                        self.bookmark(false);
                    }
                    self.ended = true;
                }
                () = tokio::time::sleep_until(self.next_bookmark), if self.bookmarks.is_some() => self.bookmark(false),
            }
        }
    }

    /// A change as this watch sees it: an object may come and go by ceasing to match.
    fn tell(&mut self, change: &Change) {
        let namespace = self.call.target.namespace.as_str();
        if !namespace.is_empty()
            && crate::json::text(&change.last, "/metadata/namespace") != namespace
        {
            return;
        }
        let before = change
            .old
            .as_ref()
            .is_some_and(|old| self.selectors.match_object(old));
        let after = !change.deleted && self.selectors.match_object(&change.last);
        let kind = match (before, after) {
            (false, false) => return,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        self.push(kind, &change.last);
    }

    fn push(&mut self, kind: &str, object: &Arc<Value>) {
        let object = shape(
            self.kind(),
            self.form,
            object,
            &self.call,
            !self.columns_sent,
        );
        self.columns_sent = true;
        self.line(kind, &object);
    }

    fn bookmark(&mut self, initial: bool) {
        if let Some(interval) = self.bookmarks {
            self.next_bookmark = Instant::now() + interval;
        }
        let mut metadata =
            json!({"resourceVersion": self.revision.to_string(), "creationTimestamp": null});
        if initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.form {
            Form::Table => json!({
                "kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": [],
                "metadata": {"resourceVersion": self.revision.to_string()},
                "rows": [{"cells": [], "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata}}],
            }),
            Form::Metadata => {
                json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
            }
            Form::Object => {
                json!({"kind": self.kind().kind, "apiVersion": self.kind().api_version(), "metadata": metadata})
            }
        };
        self.line("BOOKMARK", &object);
    }

    fn line(&mut self, kind: &str, object: &Value) {
        self.pending
            .push_back(format!("{{\"type\":\"{kind}\",\"object\":{object}}}\n").into());
    }
}
