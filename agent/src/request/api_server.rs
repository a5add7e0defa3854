//! The API server as requests use it, with what its answers show about the agent's own account.

use std::time::Duration;

use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use throwline_kube_wire::Status;

use super::explanation::{self, Explained, Refused};
use super::probe_trigger::{ProbeReason, ProbeTrigger};
use crate::audit::{Record, Subject};
use crate::upstream::{self, Upstream};

pub(crate) struct ApiServer {
    upstream: Upstream,
    probes: ProbeTrigger,
    /// For reading a refusal as a whole.
    pub(super) refusal_timeout: Duration,
}

impl ApiServer {
    pub(super) fn new(upstream: Upstream, refusal_timeout: Duration) -> Self {
        Self {
            upstream,
            probes: ProbeTrigger::default(),
            refusal_timeout,
        }
    }

    pub(crate) fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// Waits until a request has shown a reason to look at the API server before the next look is due.
    pub(crate) async fn probe_triggered(&self) -> ProbeReason {
        self.probes.triggered().await
    }

    /// A request has no answer: triggers a look at whether the API server is there.
    pub(super) fn on_no_answer(&self, error: &upstream::Error) {
        // All but our own bound.
        if !matches!(error, upstream::Error::Busy) {
            self.probes.trigger(ProbeReason::Server);
        }
    }

    /// The error in place of an answer that is about the agent's own account rather than the user.
    pub(super) async fn own_account_error(
        &self,
        record: &Record,
        status: StatusCode,
    ) -> Option<Status> {
        // The user is known by impersonation, so a 401 is about the agent's credentials. Behind a
        // `proxy` subresource it may be the workload's.
        if status != StatusCode::UNAUTHORIZED || record.is_workload() {
            return None;
        }
        tracing::warn!("the API server does not accept the agent's own credentials");
        self.probes.trigger(ProbeReason::Server);
        Box::pin(self.upstream.reload()).await;
        Some(Status::bad_gateway(
            "the cluster's API server does not accept the agent's own credentials (401); the agent's administrator has \
             to renew its kubeconfig or service account",
        ))
    }

    /// Whether a refusal may be one of the agent's own account, in a form that can be read.
    pub(super) fn may_explain(&self, record: &Record, headers: &HeaderMap) -> bool {
        let content_type = headers.get(CONTENT_TYPE).and_then(|it| it.to_str().ok());
        !record.is_workload()
            && !headers.contains_key(CONTENT_ENCODING)
            && content_type.is_some_and(explanation::is_readable)
    }

    /// The same refusal with one more sentence, if it is about the agent's account.
    pub(super) fn explain(
        &self,
        record: &mut Record,
        headers: &mut HeaderMap,
        body: &[u8],
        subject: &Subject,
    ) -> Option<Explained> {
        let content_type = headers.get(CONTENT_TYPE)?.to_str().ok()?;
        let user = &subject.user.name;
        let explained = explanation::explain(content_type, body, user, &subject.cluster)?;
        record.refused_by(explained.why.as_str());
        if explained.why == Refused::User {
            self.probes.trigger(ProbeReason::Rights);
        }
        headers.remove(CONTENT_LENGTH);
        Some(explained)
    }
}
