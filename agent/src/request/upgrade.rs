//! Upgraded requests: exec, attach, port-forward. Only after the API server's 101 do bytes flow, and
//! the connection they flow on is never used for anything else (CVE-2018-1002105).

use std::sync::Arc;

use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use throwline_kube_wire::headers::remove_hop_by_hop_of_answer;
use throwline_kube_wire::http1::interim::Interim;
use throwline_kube_wire::http1::request_line::RequestLine;
use throwline_kube_wire::http1::target::Target;
use throwline_ops::GaugeGuard;
use throwline_tunnel::splice::{self, splice};
use tokio_util::task::AbortOnDropHandle;

use super::Lifetime;
use super::answer::{Failure, Reply};
use super::api_server::ApiServer;
use super::output_first::{HoldPolicy, OutputFirst};
use super::read_ahead::{self, ReadAheadBudget};
use crate::audit::{Record, Subject};
use crate::live::Permission;
use crate::metrics::Metrics;
use crate::upstream::{Error, ExchangeError, INTERIM, OutBody};

/// The refusal of an upgrade is a short text; more than this is cut.
const REFUSAL_MAX: usize = 1024 * 1024;

pub(super) struct Upgrades {
    api_server: Arc<ApiServer>,
    read_ahead: ReadAheadBudget,
    metrics: Metrics,
}

/// An upgrade that the rules allow.
pub(super) struct Upgrade {
    pub(super) method: Method,
    pub(super) target: Target,
    pub(super) headers: HeaderMap,
    pub(super) protocol: HeaderValue,
    pub(super) permission: Permission,
}

impl Upgrades {
    pub(super) fn new(
        api_server: Arc<ApiServer>,
        limits: read_ahead::Limits,
        metrics: Metrics,
    ) -> Self {
        let read_ahead = ReadAheadBudget::new(limits, metrics.read_ahead_bytes.clone());
        Self {
            api_server,
            read_ahead,
            metrics,
        }
    }

    /// Sends the request to the API server; answers 101 only if it does.
    pub(super) async fn run(
        &self,
        life: Lifetime,
        mut record: Record,
        upgrade: Upgrade,
        client: OnUpgrade,
        subject: &Subject,
    ) -> Result<Reply, Failure> {
        let Upgrade {
            method,
            target,
            headers,
            protocol,
            permission,
        } = upgrade;
        let hold_policy = HoldPolicy::of(&target, life.detached);
        let sending = self.send(method, &target, headers);
        let answer_limit = self.api_server.upstream().limits().answer;
        // On a deadline, although an exec lasts: it begins with an answer's head like any request.
        let sent = tokio::time::timeout(answer_limit, sending).await;
        let (mut response, driver) = match sent.unwrap_or(Err(Error::Timeout)) {
            Ok(answer) => answer,
            Err(error) => {
                tracing::warn!(%error, audit_id = record.id(), "an upgrade has no answer");
                self.api_server.on_no_answer(&error);
                return Err(Failure::new(&mut record, &error));
            }
        };
        let status = response.status();
        // kubectl falls back from WebSocket to SPDY by this status, so it is passed on as it is.
        if status.as_u16() >= 400 {
            return self.refused(record, response, subject).await;
        }
        // Another protocol than the requested one would be read by the client with the wrong
        // framing.
        let switched = status == StatusCode::SWITCHING_PROTOCOLS
            && response
                .headers()
                .get(UPGRADE)
                .is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(protocol.as_bytes()));
        if !switched {
            // After a 2xx or 3xx the client would take its next bytes for a request.
            let error = Error::Broken("an upgrade answered neither by 101 nor by an error");
            return Err(Failure::new(&mut record, &error));
        }

        record.answered(status);
        let server = hyper::upgrade::on(&mut response);
        let (mut head, _) = response.into_parts();
        // RFC 9110 section 7.6.1: they concern the connection to the API server; those of the
        // upgrade are set again.
        remove_hop_by_hop_of_answer(&mut head.headers);
        head.headers
            .insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        head.headers.insert(UPGRADE, protocol);
        head.extensions.clear();
        let held = GaugeGuard::new(&self.metrics.upgrades);
        let read_ahead = self.read_ahead.clone();
        tokio::spawn(async move {
            // Held for as long as the bytes flow.
            let (_held, _driver, mut record) = (held, driver, record);
            let copying = async {
                let (client, server) = tokio::try_join!(client, server)?;
                let mut config = splice::Config::default();
                // The last output of the API server is for a line that may have lost its stream.
                config.drain += life.detached;
                let meter = splice::Meter::default();
                let (server, pump, slow_reader) =
                    read_ahead::split(TokioIo::new(server), &read_ahead);
                let client = TokioIo::new(client);
                let user = OutputFirst::new(client, hold_policy, life.phases.clone(), slow_reader);
                let copied = tokio::select! {
                    copied = splice(user, server, &config, &meter) => copied,
                    never = pump.run() => match never {},
                };
                Ok::<_, hyper::Error>(copied)
            };
            tokio::select! {
                copied = copying => match copied {
                    Ok(outcome) => {
                        tracing::debug!(?outcome, "an upgraded connection has ended");
                        note_cut(&mut record, &outcome);
                    }
                    Err(error) => {
                        record.cut("handshake");
                        tracing::debug!(%error, "an upgrade was not completed");
                    }
                },
                reason = life.ended() => record.cut(reason.label()),
                reason = permission.ended() => record.cut(reason.label()),
            }
        });
        Ok(Response::from_parts(head, Either::Left(Full::default())).into())
    }

    /// Sends the request on a fresh connection, which ends with the handle.
    async fn send(
        &self,
        method: Method,
        target: &Target,
        headers: HeaderMap,
    ) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), Error> {
        let upstream = self.api_server.upstream();
        let (request, long) = upstream.upgrade_request(method, target, headers).await?;
        let (io, slot) = RequestLine::new(upstream.fresh().await?);
        if let Some(target) = long {
            slot.set(target);
        }
        let broken = |error: hyper::Error| Error::Exchange(ExchangeError::Http(error));
        // HTTP/1.1, since HTTP/2 has no `Upgrade` (RFC 9113 section 8.6).
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(64 * 1024)
            .handshake::<_, OutBody>(TokioIo::new(io))
            .await
            .map_err(broken)?;
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection for an upgrade has ended");
            }
        }));
        let mut request = request;
        let interim = Interim::of(&mut request);
        let response = tokio::select! {
            response = sender.send_request(request) => response.map_err(broken)?,
            () = interim.exceeded() => return Err(Error::Broken(INTERIM)),
        };
        Ok((response, driver))
    }

    /// Copies the API server's refusal, whole and with a deadline; both connections end after it.
    async fn refused(
        &self,
        mut record: Record,
        response: Response<Incoming>,
        subject: &Subject,
    ) -> Result<Reply, Failure> {
        let own_account = self
            .api_server
            .own_account_error(&record, response.status());
        if let Some(status) = own_account.await {
            return Err(Failure::new(&mut record, status));
        }
        let (mut head, body) = response.into_parts();
        let whole = tokio::time::timeout(
            self.api_server.refusal_timeout,
            Limited::new(body, REFUSAL_MAX).collect(),
        )
        .await;
        let Ok(Ok(whole)) = whole else {
            let error = Error::Broken("a refusal that does not end");
            return Err(Failure::new(&mut record, &error));
        };
        record.answered(head.status);
        remove_hop_by_hop_of_answer(&mut head.headers);
        head.extensions.clear();
        let mut whole = whole.to_bytes();
        if head.status == StatusCode::FORBIDDEN
            && self.api_server.may_explain(&record, &head.headers)
            && let Some(explained) =
                self.api_server
                    .explain(&mut record, &mut head.headers, &whole, subject)
        {
            whole = explained.body;
        }
        Ok(Response::from_parts(head, Either::Left(Full::new(whole))).into())
    }
}

fn note_cut(record: &mut Record, outcome: &splice::Outcome) {
    let is_clean = |direction: &splice::Direction| matches!(direction.end, splice::End::Clean);
    match (is_clean(&outcome.a_to_b), is_clean(&outcome.b_to_a)) {
        (_, true) => {}
        (true, false) => record.cut("api-server"),
        (false, false) => record.cut("client"),
    }
}
