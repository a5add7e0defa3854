//! exec, attach, cp and port-forward: one request on an upgrade session of its own, and after the
//! 101 a copy of bytes that nobody parses.

use crate::{
    body::{self, Body},
    error::Failure,
    forward::{Proxy, close, lost, target},
    headers::{Upgrade, remove_hop_by_hop, set_upgrade},
    last_words::{LastWords, Room},
    metrics::Held,
    route::Route,
    session::UpgradeSession,
};
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header};
use hyper::{
    body::{Body as _, Incoming},
    upgrade::OnUpgrade,
};
use hyper_util::rt::TokioIo;
use std::sync::{Arc, atomic::Ordering};
use throwline_tunnel::splice::{self, Meter};
use tokio::io::AsyncWriteExt as _;

pub(crate) async fn forward(
    proxy: &Arc<Proxy>,
    route: Route,
    mut request: Request<Incoming>,
    kind: Upgrade,
    in_flight: Held,
) -> Result<Response<Body>, Failure> {
    let cluster = route.cluster.clone();
    let path = route.path.clone();
    let client = hyper::upgrade::on(&mut request);
    remove_hop_by_hop(request.headers_mut());
    set_upgrade(request.headers_mut(), kind);
    let host =
        HeaderValue::from_str(&cluster).map_err(|error| Failure::Internal(error.to_string()))?;
    request.headers_mut().insert(header::HOST, host);
    // HTTP/1.1 sends the target as it is given: a path, not the absolute form.
    *request.uri_mut() = Uri::from(
        target(route)?
            .into_parts()
            .path_and_query
            .unwrap_or_else(|| http::uri::PathAndQuery::from_static("/")),
    );
    *request.version_mut() = Version::HTTP_11;

    let (mut response, session) = match send(proxy, &cluster, request).await {
        Ok(sent) => sent,
        Err(failure) => {
            say_goodbye(proxy, client);
            return Err(failure);
        }
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        say_goodbye(proxy, client);
        return Ok(refused(proxy, response, session, in_flight));
    }
    if Upgrade::of(response.headers()) != Some(kind) {
        say_goodbye(proxy, client);
        return Err(Failure::Lost {
            cluster,
            why: "the answer switches to a protocol that was not asked for".to_owned(),
        });
    }
    proxy.metrics().count("upgraded");
    let agent = hyper::upgrade::on(&mut response);
    let room = match kind {
        Upgrade::WebSocket => Room::of_websocket(path.as_str(), response.headers()),
        Upgrade::Spdy => Room::None,
    };
    let ends = Ends {
        client,
        agent,
        room,
    };
    copy(proxy, cluster, ends, session, in_flight);

    let (mut parts, _) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    set_upgrade(&mut parts.headers, kind);
    parts.extensions.clear();
    Ok(Response::from_parts(parts, body::full("")))
}

/// Sends on the spare, or, if that surely took nothing, once more on a fresh session.
///
/// An agent that leaves a carrier ends its spare sessions cleanly, which can meet a request on its
/// way: no answer and a clean end mean that nobody read it. Whatever else ends a session is an
/// error of its own, or no clean end.
async fn send(
    proxy: &Arc<Proxy>,
    cluster: &str,
    request: Request<Incoming>,
) -> Result<(Response<Incoming>, UpgradeSession), Failure> {
    let (head, body) = request.into_parts();
    let (again, body) = match body.is_end_stream() {
        true => (Some(head.clone()), body::full("")),
        false => (None, body::passing(body, ())),
    };
    let mut request = Request::from_parts(head, body);
    let mut session = proxy.sessions.upgrade(cluster, false).await?;
    let mut error = match session.sender.try_send_request(request).await {
        Ok(response) => return Ok((response, session)),
        Err(error) => error,
    };
    request = match (error.take_message(), again) {
        (Some(unsent), _) => unsent,
        (None, Some(head)) if error.error().is_incomplete_message() => {
            Request::from_parts(head, body::full(""))
        }
        _ => return Err(lost(cluster, &error.into_error())),
    };
    tracing::debug!(cluster, "upgrade retried on a fresh session");
    let mut session = proxy.sessions.upgrade(cluster, true).await?;
    let sent = session.sender.send_request(request).await;
    sent.map(|response| (response, session))
        .map_err(|error| lost(cluster, &error))
}

/// Any other answer is kubectl's to read, whole: its fallback to SPDY hangs on it. The connection
/// is closed after it, so that nothing pipelined behind the request is taken for another one.
fn refused(
    proxy: &Arc<Proxy>,
    response: Response<Incoming>,
    session: UpgradeSession,
    in_flight: Held,
) -> Response<Body> {
    proxy.metrics().count("forwarded");
    let (mut parts, incoming) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    let mut response = Response::from_parts(parts, body::passing(incoming, (session, in_flight)));
    close(&mut response);
    response
}

/// hyper gives up a connection whose upgrade was asked for, also when it was not granted, and
/// then leaves the end of TLS to whoever takes it.
fn say_goodbye(proxy: &Arc<Proxy>, client: OnUpgrade) {
    proxy.sessions.shared().spawn(async move {
        if let Ok(client) = client.await {
            let _ = TokioIo::new(client).shutdown().await;
        }
    });
}

/// What is copied between.
struct Ends {
    client: OnUpgrade,
    agent: OnUpgrade,
    /// For what kubectl is told if the agent's ends badly.
    room: Room,
}

fn copy(proxy: &Arc<Proxy>, cluster: String, ends: Ends, session: UpgradeSession, in_flight: Held) {
    let UpgradeSession { held, .. } = session;
    let upgraded = Held::one(&proxy.metrics().upgraded);
    let bytes = proxy.metrics().upgraded_bytes.clone();
    proxy.sessions.shared().spawn(async move {
        let _held = (held, upgraded, in_flight);
        let (client, agent) = match futures::future::try_join(ends.client, ends.agent).await {
            Ok(both) => both,
            Err(error) => {
                tracing::debug!(cluster, %error, "upgrade did not complete");
                return;
            }
        };
        let meter = Meter::default();
        let outcome = splice::splice(
            TokioIo::new(client),
            LastWords::new(TokioIo::new(agent), cluster.clone(), ends.room),
            &splice::Config::default(),
            &meter,
        )
        .await;
        let sent = meter.a_to_b.load(Ordering::Relaxed);
        let received = meter.b_to_a.load(Ordering::Relaxed);
        bytes.inc_by(sent.saturating_add(received));
        tracing::debug!(
            cluster,
            sent,
            received,
            ?outcome,
            "upgraded connection ended"
        );
    });
}
