//! One request from a user to the API server and back.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{CONNECTION, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use throwline_tunnel::http1::discovery::keeps_text_only;

use crate::audit::{Record, Sink, Subject};
use crate::body::{Download, Upload};
use crate::metrics::Metrics;
use crate::rules::{self, Forward, Kind};
use crate::session::{Lifetime, Limits};
use crate::status::Failure;
use crate::upgrade;
use crate::upstream::rights::Rights;
use crate::upstream::{self, Answer, OutBody, Outgoing, Upstream};

/// What a user gets: the agent's own words, or the API server's as they come.
pub(crate) type AnswerBody = Either<Full<Bytes>, Download>;

/// Everything that requests share.
pub struct Gateway {
    upstream: Upstream,
    rights: Rights,
    sink: Sink,
    metrics: Metrics,
    limits: Limits,
}

impl Gateway {
    pub fn new(upstream: Upstream, sink: Sink, metrics: Metrics, limits: Limits) -> Self {
        Self {
            upstream,
            rights: Rights::default(),
            sink,
            metrics,
            limits,
        }
    }

    pub(crate) fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Answers one request; every refusal and failure is an answer too.
    pub(crate) async fn answer(
        self: Arc<Self>,
        subject: Arc<Subject>,
        life: Lifetime,
        request: Request<Incoming>,
    ) -> Result<Response<AnswerBody>, Infallible> {
        let http1 = request.version() != Version::HTTP_2;
        let text_only = keeps_text_only(request.uri().path(), request.headers());
        let mut response = self.pass(&subject, life, request).await;
        // 401 to 431 say enough by their number.
        if let Some(failure) = response.extensions_mut().remove::<Failure>()
            && text_only
            && failure.status.is_server_error()
        {
            response = failure.text().map(Either::Left);
        }
        self.metrics.answered(response.status());
        if http1 && response.status() != StatusCode::SWITCHING_PROTOCOLS {
            response
                .headers_mut()
                .insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Ok(response)
    }

    async fn pass(
        self: &Arc<Self>,
        subject: &Arc<Subject>,
        life: Lifetime,
        mut request: Request<Incoming>,
    ) -> Response<AnswerBody> {
        let started = Instant::now();
        let client = hyper::upgrade::on(&mut request);
        let (head, body) = request.into_parts();
        let mut record = match Record::begin(&self.sink, subject, &head) {
            Ok(record) => record,
            Err((unavailable, mut record)) => return failed(&mut record, unavailable.into()),
        };
        let Forward {
            kind,
            method,
            target,
            headers,
        } = match rules::decide(&head, &subject.user) {
            Ok(forward) => forward,
            Err(refusal) => {
                self.metrics.refused.inc();
                tracing::info!(
                    user = subject.user.name,
                    code = refusal.status.as_u16(),
                    message = refusal.message,
                    audit_id = record.id(),
                    "a request was refused"
                );
                return failed(&mut record, refusal.into());
            }
        };
        if let Kind::Upgrade(protocol) = kind {
            let attempt = upgrade::Attempt {
                method,
                target,
                headers,
                protocol,
            };
            // Boxed, like what is rare: it would make every request as large.
            return Box::pin(upgrade::run(self, life, record, attempt, client)).await;
        }

        let (upload, watch) = Upload::new(body, self.limits.upload_idle);
        let outgoing = Outgoing {
            method,
            target,
            headers,
            body: OutBody::Right(upload),
        };
        let waiting = async {
            if record.is_long_running() {
                std::future::pending::<()>().await;
            }
            watch.sent().await;
            tokio::time::sleep(self.upstream.limits().answer).await;
        };
        let sent = tokio::select! {
            sent = self.upstream.send(outgoing) => sent,
            () = waiting => Err(upstream::Error::Timeout),
        };
        match sent {
            Ok(answer) => {
                self.metrics.took(started.elapsed());
                self.relay(record, answer).await
            }
            Err(_) if watch.stalled() => failed(
                &mut record,
                Failure {
                    status: StatusCode::REQUEST_TIMEOUT,
                    reason: "Timeout",
                    message: "the request's body did not come; it was broken off".to_owned(),
                },
            ),
            Err(error) => {
                tracing::warn!(%error, audit_id = record.id(), "a request found no answer");
                failed(&mut record, Failure::from(&error))
            }
        }
    }

    /// Passes an answer on, whatever its status: a redirect is the user's to see, not ours to follow.
    async fn relay(self: &Arc<Self>, mut record: Record, answer: Answer) -> Response<AnswerBody> {
        let Answer { response, lease } = answer;
        let (mut head, body) = response.into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            // Nobody asked for it. The connection goes with the lease that is dropped here.
            drop((lease, body));
            return failed(
                &mut record,
                Failure::from(&upstream::Error::Broken(
                    "a switch of protocols unasked for",
                )),
            );
        }
        if let Some(failure) = self.judge(&record, head.status).await {
            return failed(&mut record, failure);
        }
        record.answered(head.status);
        strip_connection(&mut head.headers);
        head.version = Version::HTTP_11;
        head.extensions.clear();
        let body = Download::new(body, Some(lease), record, self.metrics.clone());
        Response::from_parts(head, Either::Right(body))
    }

    /// What a status says about the agent's own account rather than about the user.
    pub(crate) async fn judge(
        self: &Arc<Self>,
        record: &Record,
        status: StatusCode,
    ) -> Option<Failure> {
        match status {
            // The user is known by impersonation, so it is the agent whom the API server does not
            // know. Behind a `proxy` subresource it may be the workload that wants a password.
            StatusCode::UNAUTHORIZED if !record.is_workload() => {
                tracing::warn!("the API server does not accept the agent's own credentials");
                Box::pin(self.upstream.reload()).await;
                Some(Failure::bad_gateway(
                    "the cluster's API server does not accept the agent's own credentials (401); its kubeconfig or \
                     service account needs the attention of whoever runs the agent",
                ))
            }
            StatusCode::FORBIDDEN => {
                self.rights.check_in_background(self);
                None
            }
            _ => None,
        }
    }
}

/// The agent's own answer, written into the record.
pub(crate) fn failed(record: &mut Record, failure: Failure) -> Response<AnswerBody> {
    record.refused(failure.status, failure.reason, &failure.message);
    let mut response = failure.response().map(Either::Left);
    response.extensions_mut().insert(failure);
    response
}

/// Takes away what belongs to the connection to the API server.
pub(crate) fn strip_connection(headers: &mut HeaderMap) {
    let named: Vec<String> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|name| name.trim().to_ascii_lowercase())
        .collect();
    for name in named {
        // A server cannot take away by which its own answer is read.
        if !matches!(name.as_str(), "content-length" | "content-type") {
            headers.remove(&name);
        }
    }
    for name in ["keep-alive", "proxy-connection", "trailer", "te"] {
        headers.remove(name);
    }
    for name in [CONNECTION, UPGRADE, TRANSFER_ENCODING] {
        headers.remove(name);
    }
}
