//! Where each request enters: it is recorded, checked by the rules, decided on, and forwarded.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::header::CONNECTION;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use throwline_kube_wire::discovery::keeps_text_only;
use throwline_kube_wire::http1::gate::Note;
use throwline_kube_wire::http1::target::Target;
use throwline_kube_wire::{RequestInfo, Status};
use throwline_policy::rules::{self, AUDIT_ID, Forward, Kind};
use throwline_policy::{self as policy, Denial, Permit, PolicySet};

use super::answer::{AnswerBody, Failure, Reply, render};
use super::api_server::ApiServer;
use super::plain::{PlainRequest, PlainRequests};
use super::upgrade::{Upgrade, Upgrades};
use super::{Lifetime, Limits};
use crate::audit::{Record, Sink, Subject};
use crate::metrics::Metrics;
use crate::quotas::Quotas;
use crate::upstream::Upstream;

/// Answers the requests of all sessions.
pub struct Gateway {
    sink: Sink,
    policy: PolicySet,
    metrics: Metrics,
    api_server: Arc<ApiServer>,
    plain: PlainRequests,
    upgrades: Upgrades,
}

impl Gateway {
    pub fn new(
        upstream: Upstream,
        sink: Sink,
        quotas: Quotas,
        metrics: Metrics,
        limits: Limits,
    ) -> Self {
        let api_server = Arc::new(ApiServer::new(upstream, limits.refusal));
        Self {
            sink,
            policy: PolicySet::default(),
            plain: PlainRequests::new(
                api_server.clone(),
                quotas,
                metrics.clone(),
                limits.upload_idle,
            ),
            upgrades: Upgrades::new(api_server.clone(), limits.read_ahead, metrics.clone()),
            api_server,
            metrics,
        }
    }

    /// Decides on requests by these rules, instead of the default ones.
    #[must_use]
    pub fn with_policy(mut self, policy: PolicySet) -> Self {
        self.policy = policy;
        self
    }

    pub(crate) fn api_server(&self) -> &Arc<ApiServer> {
        &self.api_server
    }

    /// Answers one request; every refusal and failure is an answer too.
    pub(crate) async fn answer(
        self: Arc<Self>,
        subject: Arc<Subject>,
        life: Lifetime,
        request: Request<Incoming>,
        note: Note,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let is_http1 = request.version() != Version::HTTP_2;
        let is_text_only = keeps_text_only(request.uri().path(), request.headers());
        let result = self.forward(&subject, life, request, note).await;
        let mut response = render(result, is_text_only);
        self.metrics.answered(response.status());
        if is_http1 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    /// A request that the parser has answered with 400 by itself: recorded and logged like the others.
    pub(crate) async fn record_malformed(&self, subject: &Arc<Subject>, error: &hyper::Error) {
        let (head, ()) = Request::new(()).into_parts();
        let begun = Record::begin(&self.sink, subject, &head).await;
        let (Ok(mut record) | Err((_, mut record))) = begun.map(Box::new);
        let refusal = Status::bad_request(format!("the request cannot be read: {error}"));
        self.refuse(subject, &mut record, refusal);
    }

    async fn forward(
        &self,
        subject: &Arc<Subject>,
        life: Lifetime,
        mut request: Request<Incoming>,
        note: Note,
    ) -> Result<Reply, Failure> {
        let started = Instant::now();
        // Taken while the request is whole: the head alone no longer has the connection.
        let client = hyper::upgrade::on(&mut request);
        let (mut head, body) = request.into_parts();
        let Note {
            refused,
            target,
            permit: _permit,
        } = note;
        if let Some(long) = target {
            head.extensions.insert(long);
        }
        // Before any decision, so that refusals are audited as well.
        let mut record = match Record::begin(&self.sink, subject, &head).await {
            Ok(record) => record,
            Err((unavailable, mut record)) => return Err(Failure::new(&mut record, unavailable)),
        };
        // After the record: a head that the gate refused is an event of the audit too.
        if let Some(error) = refused {
            let refusal = Status::new(error.status(), error.reason(), error.to_string());
            return Err(self.refuse(subject, &mut record, refusal));
        }
        let Forward {
            kind,
            method,
            target,
            mut headers,
        } = match rules::apply(&head, &subject.user) {
            Ok(forward) => forward,
            Err(refusal) => return Err(self.refuse(subject, &mut record, refusal)),
        };
        // On the method and target as the API server receives them, so after the rules.
        let permit = match self.decide(subject, &method, &target) {
            Ok(permit) => permit,
            Err(denial) => return Err(self.refuse(subject, &mut record, denial.into())),
        };
        let permission = life.live.permit(permit.until);
        // The API server's events of this request then carry the same ID.
        if let Ok(id) = HeaderValue::from_str(record.id()) {
            headers.insert(AUDIT_ID, id);
        }
        match kind {
            Kind::Upgrade(protocol) => {
                let upgrade = Upgrade {
                    method,
                    target,
                    headers,
                    protocol,
                    permission,
                };
                // Boxed, because it is rare and would make the future of every request as large.
                Box::pin(self.upgrades.run(life, record, upgrade, client, subject)).await
            }
            Kind::Plain => {
                let plain = PlainRequest {
                    method,
                    target,
                    headers,
                    body,
                    permission,
                    started,
                };
                self.plain.run(record, plain, subject).await
            }
        }
    }

    /// Whether the rules allow the request. No obligation is fulfilled here yet, so one is a denial.
    fn decide(
        &self,
        subject: &Subject,
        method: &Method,
        target: &Target,
    ) -> Result<Permit, Denial> {
        let info = RequestInfo::parse(method, target.path(), target.query());
        let user = policy::Subject {
            name: &subject.user.name,
            groups: &subject.user.groups,
        };
        let request = policy::Request::Api {
            cluster: &subject.cluster,
            info: info.as_ref().map_err(|error| *error),
        };
        let now = SystemTime::now();
        policy::decide(&user, &request, now, &self.policy).enforced_by(&[], now)
    }

    /// Counts, logs and answers what is not forwarded.
    fn refuse(&self, subject: &Subject, record: &mut Record, refusal: Status) -> Failure {
        self.metrics.refused.inc();
        tracing::info!(
            user = subject.user.name,
            source = subject.source,
            code = refusal.code.as_u16(),
            reason = refusal.message,
            audit_id = record.id(),
            "a request was refused"
        );
        Failure::new(record, refusal)
    }
}
