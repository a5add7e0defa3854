//! Requests that are not upgrades: over the connections that requests share, or one apart.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, Method, Response, StatusCode, Version};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::Incoming;
use throwline_kube_wire::Status;
use throwline_kube_wire::headers::remove_hop_by_hop_of_answer;
use throwline_kube_wire::http1::target::Target;

use super::answer::{Failure, Reply};
use super::api_server::ApiServer;
use super::download::{Download, Held};
use super::explanation;
use crate::audit::{Record, Subject};
use crate::live::Permission;
use crate::metrics::Metrics;
use crate::quotas::{Quotas, SendQuota};
use crate::upstream::{self, Answer, ExchangeError, OutBody, Outgoing, Upload};

/// What is added to the time that a client asks the API server to work on an answer.
const ASKED_MARGIN: Duration = Duration::from_secs(10);
const ASKED_MAX: Duration = Duration::from_secs(60 * 60);
/// Bytes of a head that goes over the connections that requests share. The API server ends a connection
/// that carries a head larger by some factor than the 1 MiB that it accepts.
const LARGE: usize = 48 * 1024;

pub(super) struct PlainRequests {
    api_server: Arc<ApiServer>,
    quotas: Quotas,
    metrics: Metrics,
    upload_idle: Duration,
}

/// A request that the rules allow.
pub(super) struct PlainRequest {
    pub(super) method: Method,
    pub(super) target: Target,
    pub(super) headers: HeaderMap,
    pub(super) body: Incoming,
    pub(super) permission: Permission,
    pub(super) started: Instant,
}

impl PlainRequests {
    pub(super) fn new(
        api_server: Arc<ApiServer>,
        quotas: Quotas,
        metrics: Metrics,
        upload_idle: Duration,
    ) -> Self {
        Self {
            api_server,
            quotas,
            metrics,
            upload_idle,
        }
    }

    pub(super) async fn run(
        &self,
        mut record: Record,
        request: PlainRequest,
        subject: &Subject,
    ) -> Result<Reply, Failure> {
        let PlainRequest {
            method,
            target,
            headers,
            body,
            permission,
            started,
        } = request;
        // Held until the last byte of the answer: one user's requests must not use all of the pool.
        let share = match self.quotas.request(&subject.user.name) {
            Ok(share) => share,
            Err(limit) => return Err(Failure::new(&mut record, limit)),
        };
        let (upload, watch) = Upload::new(body, self.upload_idle);
        let outgoing = Outgoing {
            is_apart: target.is_workload() || is_large(&target, &headers),
            method,
            target,
            headers,
            body: OutBody::Right(upload),
        };
        let deadline = async {
            // A watch may be silent for as long as it lasts; only its client ends it.
            if record.is_long_running() {
                std::future::pending::<()>().await;
            }
            // The API server's time begins with the end of the body, which has a limit on idleness
            // instead.
            watch.sent().await;
            tokio::time::sleep(self.answer_limit(&record)).await;
        };
        let sent = tokio::select! {
            sent = self.api_server.upstream().send(outgoing) => sent,
            () = deadline => Err(upstream::Error::Timeout),
            reason = permission.ended() => {
                return Err(Failure::new(&mut record, Status::forbidden(reason.text())));
            }
        };
        match sent {
            Ok(answer) => {
                self.metrics.took(started.elapsed());
                let held = Held {
                    share,
                    quota: SendQuota::new(self.quotas.memory(&subject.user.name)),
                    permission,
                };
                self.pass_on(record, answer, subject, held).await
            }
            // Before the other errors: the client stopped, and the API server only reports the
            // reset.
            Err(_) if watch.stalled() => {
                let status =
                    Status::request_timeout("the request's body did not arrive and was broken off");
                Err(Failure::new(&mut record, status))
            }
            Err(error) => {
                tracing::warn!(%error, audit_id = record.id(), "a request has no answer");
                self.api_server.on_no_answer(&error);
                Err(Failure::new(&mut record, &error))
            }
        }
    }

    /// How long the API server may work on an answer. It bounds by itself what clients ask for.
    fn answer_limit(&self, record: &Record) -> Duration {
        let limit = self.api_server.upstream().limits().answer;
        match record.asked() {
            Duration::ZERO => limit,
            asked => limit.max(asked.saturating_add(ASKED_MARGIN).min(ASKED_MAX)),
        }
    }

    /// Passes an answer on, whatever its status: a redirect is the client's to follow.
    async fn pass_on(
        &self,
        mut record: Record,
        answer: Answer,
        subject: &Subject,
        held: Held,
    ) -> Result<Reply, Failure> {
        let Answer { response, lease } = answer;
        let (mut head, mut body) = response.into_parts();
        if head.status == StatusCode::SWITCHING_PROTOCOLS {
            // It was not requested. The connection ends with the lease that is dropped here.
            drop((lease, body));
            let error = upstream::Error::Broken("a switch of protocols that was not requested");
            return Err(Failure::new(&mut record, &error));
        }
        let own_account = self.api_server.own_account_error(&record, head.status);
        if let Some(status) = own_account.await {
            return Err(Failure::new(&mut record, status));
        }
        record.answered(head.status);
        remove_hop_by_hop_of_answer(&mut head.headers);
        head.version = Version::HTTP_11;
        head.extensions.clear();
        let mut first = Vec::new();
        if head.status == StatusCode::FORBIDDEN
            && self.api_server.may_explain(&record, &head.headers)
        {
            let reading = read_whole(&mut body, &mut first);
            match tokio::time::timeout(self.api_server.refusal_timeout, reading).await {
                Ok(Ok(true)) => {
                    // The body was read to its end, so the connection is free while the answer is
                    // written.
                    lease.give_back();
                    let headers = &mut head.headers;
                    let explained = self
                        .api_server
                        .explain(&mut record, headers, &first, subject);
                    let (whole, message) = match explained {
                        Some(explained) => (explained.body, Some(explained.message)),
                        None => (first.into(), None),
                    };
                    return Ok(Reply {
                        response: Response::from_parts(head, Either::Left(Full::new(whole))),
                        explained: message,
                    });
                }
                Ok(Err(error)) => {
                    let error = upstream::Error::Exchange(ExchangeError::Http(error));
                    return Err(Failure::new(&mut record, &error));
                }
                // Too long, or too slow: passed on as it arrives.
                Ok(Ok(false)) | Err(_) => {}
            }
        }
        let body = Download::new(body, Some(lease), record, held, self.metrics.clone())
            .after(first.into());
        Ok(Response::from_parts(head, Either::Right(body)).into())
    }
}

/// Reads a body to its end; false if it has more than [`explanation::MAX`] bytes.
async fn read_whole(body: &mut Incoming, read: &mut Vec<u8>) -> Result<bool, hyper::Error> {
    loop {
        let frame = match body.frame().await {
            None => return Ok(true),
            Some(frame) => frame?,
        };
        if let Ok(data) = frame.into_data() {
            read.extend_from_slice(&data);
        }
        if read.len() > explanation::MAX {
            return Ok(false);
        }
    }
}

/// Whether the head is too large for shared connections.
fn is_large(target: &Target, headers: &HeaderMap) -> bool {
    let size: usize = headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum();
    target.as_str().len() + size > LARGE
}
