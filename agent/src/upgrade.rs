//! Upgraded requests: exec, attach, port-forward. Only after the API server's 101 do bytes flow, and
//! the connection they flow on is never used for anything else (CVE-2018-1002105).

use std::sync::Arc;

use http::header::{CONNECTION, UPGRADE};
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode};
use http_body_util::{BodyExt, Either, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use throwline_tunnel::splice::{self, splice};
use tokio_util::task::AbortOnDropHandle;

use crate::audit::Record;
use crate::catch_up::{CatchUp, When};
use crate::gateway::{AnswerBody, Gateway, failed, strip_connection};
use crate::metrics::Held;
use crate::session::Lifetime;
use crate::status::Failure;
use crate::upstream::{Error, OutBody};

/// The refusal of an upgrade is a short text; more than this is cut.
const REFUSAL_MAX: usize = 1024 * 1024;

/// An upgrade that the rules let pass.
pub(crate) struct Attempt {
    pub(crate) method: Method,
    pub(crate) target: PathAndQuery,
    pub(crate) headers: HeaderMap,
    pub(crate) protocol: HeaderValue,
}

/// Asks the API server; answers 101 only if it does.
pub(crate) async fn run(
    gateway: &Arc<Gateway>,
    life: Lifetime,
    mut record: Record,
    attempt: Attempt,
    client: OnUpgrade,
) -> Response<AnswerBody> {
    let protocol = attempt.protocol.clone();
    let when = When::of(&attempt.target, life.detached);
    let asking = ask(gateway, attempt);
    let asked = tokio::time::timeout(gateway.upstream().limits().answer, asking).await;
    let (mut response, driver) = match asked.unwrap_or(Err(Error::Timeout)) {
        Ok(answer) => answer,
        Err(error) => {
            tracing::warn!(%error, audit_id = record.id(), "an upgrade found no answer");
            return failed(&mut record, Failure::from(&error));
        }
    };
    let status = response.status();
    if status.as_u16() >= 400 {
        return refused(gateway, record, response).await;
    }
    let switched = status == StatusCode::SWITCHING_PROTOCOLS
        && response
            .headers()
            .get(UPGRADE)
            .is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(protocol.as_bytes()));
    if !switched {
        // A 2xx or 3xx would leave the user's side believing that its next bytes are still a request.
        return failed(
            &mut record,
            Failure::from(&Error::Broken(
                "an upgrade answered neither by 101 nor by an error",
            )),
        );
    }

    record.answered(status);
    let server = hyper::upgrade::on(&mut response);
    let (mut head, _) = response.into_parts();
    strip_connection(&mut head.headers);
    head.headers
        .insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    head.headers.insert(UPGRADE, protocol);
    head.extensions.clear();
    let held = Held::new(&gateway.metrics().upgrades);
    tokio::spawn(async move {
        // All that must last as long as the bytes flow.
        let (_held, _driver, mut record) = (held, driver, record);
        let copying = async {
            let (client, server) = tokio::try_join!(client, server)?;
            let mut config = splice::Config::default();
            // The API server's last bytes wait for a line that has lost its stream.
            config.drain += life.detached;
            let meter = splice::Meter::default();
            let user = CatchUp::new(TokioIo::new(client), when, life.phases.clone());
            Ok::<_, hyper::Error>(splice(user, TokioIo::new(server), &config, &meter).await)
        };
        tokio::select! {
            copied = copying => match copied {
                Ok(outcome) => {
                    tracing::debug!(?outcome, "an upgraded connection has ended");
                    note_cut(&mut record, &outcome);
                }
                Err(error) => {
                    record.cut("handshake");
                    tracing::debug!(%error, "an upgrade was not taken up");
                }
            },
            () = life.over() => record.cut("agent"),
        }
    });
    Response::from_parts(head, Either::Left(Full::default()))
}

/// Sends the request on a connection of its own; the handle keeps that connection going.
async fn ask(
    gateway: &Arc<Gateway>,
    attempt: Attempt,
) -> Result<(Response<Incoming>, AbortOnDropHandle<()>), Error> {
    let upstream = gateway.upstream();
    let request = upstream
        .upgrade_request(attempt.method, &attempt.target, attempt.headers)
        .await?;
    let io = upstream.fresh().await?;
    let broken = |error: hyper::Error| Error::Exchange(error.to_string());
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
    let response = sender.send_request(request).await.map_err(broken)?;
    Ok((response, driver))
}

/// Copies the API server's refusal, whole and with a deadline; both connections end after it.
async fn refused(
    gateway: &Arc<Gateway>,
    mut record: Record,
    response: Response<Incoming>,
) -> Response<AnswerBody> {
    if let Some(failure) = gateway.judge(&record, response.status()).await {
        return failed(&mut record, failure);
    }
    let (mut head, body) = response.into_parts();
    let whole = tokio::time::timeout(
        gateway.limits().refusal,
        Limited::new(body, REFUSAL_MAX).collect(),
    )
    .await;
    let Ok(Ok(whole)) = whole else {
        return failed(
            &mut record,
            Failure::from(&Error::Broken("a refusal that does not end")),
        );
    };
    record.answered(head.status);
    strip_connection(&mut head.headers);
    head.extensions.clear();
    Response::from_parts(head, Either::Left(Full::new(whole.to_bytes())))
}

fn note_cut(record: &mut Record, outcome: &splice::Outcome) {
    let is_clean = |direction: &splice::Direction| matches!(direction.end, splice::End::Clean);
    match (is_clean(&outcome.a_to_b), is_clean(&outcome.b_to_a)) {
        (_, true) => {}
        (true, false) => record.cut("api-server"),
        (false, false) => record.cut("client"),
    }
}
