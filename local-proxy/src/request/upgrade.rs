//! exec, attach, cp and port-forward: one request on a separate upgrade session, and after the 101 a
//! copy of bytes without parsing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header};
use http_body_util::{Either, Full};
use hyper::body::{Body as _, Incoming};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use throwline_kube_wire::headers::{Upgrade, remove_hop_by_hop, set_upgrade};
use throwline_kube_wire::http1::interim::Interim;
use throwline_kube_wire::http1::request_line::PLACEHOLDER;
use throwline_kube_wire::http1::target::Target;
use throwline_ops::GaugeGuard;
use throwline_tunnel::splice::{self, Meter};
use tokio::io::AsyncWriteExt as _;

use crate::failure::{Cause, Failure};
use crate::request::body::{self, Body};
use crate::request::proxy::{InFlight, Proxy, close};
use crate::request::route::Route;
use crate::request::stream_error::{ErrorInjector, ErrorSlot, is_json_watch};
use crate::session::{UpgradeBody, UpgradeSession, lost};

pub(crate) async fn forward(
    proxy: &Arc<Proxy>,
    route: Route,
    mut request: Request<Incoming>,
    kind: Upgrade,
    in_flight: InFlight,
) -> Result<Response<Body>, Failure> {
    let Route { cluster, path, .. } = route;
    // Before the request is moved; it resolves only when the 101 has been written to kubectl.
    let client = hyper::upgrade::on(&mut request);
    remove_hop_by_hop(request.headers_mut());
    set_upgrade(request.headers_mut(), kind);
    let host = HeaderValue::from_str(&cluster).map_err(Failure::internal)?;
    request.headers_mut().insert(header::HOST, host);
    // HTTP/1.1 sends the target as it is given: a path, not the absolute form.
    *request.uri_mut() = request_uri(&path);
    *request.version_mut() = Version::HTTP_11;

    let (mut response, session) = match send(proxy, &cluster, &path, request).await {
        Ok(sent) => sent,
        Err(failure) => {
            shut_down(proxy, client);
            return Err(failure);
        }
    };
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        shut_down(proxy, client);
        return Ok(refused(proxy, response, session, in_flight));
    }
    // The bytes behind it have the framing of another protocol.
    if Upgrade::of(response.headers()) != Some(kind) {
        shut_down(proxy, client);
        return Err(Failure::Lost {
            cluster,
            source: Cause::OtherProtocol,
        });
    }
    proxy.metrics().count("upgraded");
    let agent = hyper::upgrade::on(&mut response);
    let slot = match kind {
        Upgrade::WebSocket => ErrorSlot::of_websocket(path.as_str(), response.headers()),
        Upgrade::Spdy => ErrorSlot::None,
    };
    let ends = Ends {
        client,
        agent,
        slot,
    };
    copy(proxy, cluster, ends, session, in_flight);

    let (mut parts, _) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    set_upgrade(&mut parts.headers, kind);
    parts.extensions.clear();
    Ok(Response::from_parts(parts, body::full("")))
}

/// A plain request whose head is too large for the session that plain requests share: it has a
/// separate session, which ends with it.
pub(crate) async fn plain(
    proxy: &Arc<Proxy>,
    route: Route,
    mut request: Request<Incoming>,
    in_flight: InFlight,
) -> Result<Response<Body>, Failure> {
    let Route { cluster, path, .. } = route;
    let host = HeaderValue::from_str(&cluster).map_err(Failure::internal)?;
    request.headers_mut().insert(header::HOST, host);
    *request.uri_mut() = request_uri(&path);
    *request.version_mut() = Version::HTTP_11;
    let (response, session) = send(proxy, &cluster, &path, request).await?;
    proxy.metrics().count("forwarded");
    let (mut parts, incoming) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    parts.version = Version::HTTP_11;
    let guards = (Either::Right(session), in_flight);
    let body = if is_json_watch(&path, &parts.headers) {
        body::watch(incoming, guards, cluster, None)
    } else {
        body::passing(incoming, guards)
    };
    Ok(Response::from_parts(parts, body))
}

/// The target as `http` holds it, or what [`RequestLine`](throwline_kube_wire::http1::request_line) replaces.
fn request_uri(target: &Target) -> Uri {
    let short = target.short().cloned();
    Uri::from(short.unwrap_or_else(|| PathAndQuery::from_static(PLACEHOLDER)))
}

/// Sends on the spare or, if the agent certainly did not read the request, again on a fresh session.
///
/// An agent that leaves a carrier ends its spare sessions cleanly, possibly while a request is on its
/// way: a clean end without an answer means that the request was not read. Any other end of a session
/// is an error, or no clean end.
async fn send(
    proxy: &Arc<Proxy>,
    cluster: &str,
    target: &Target,
    request: Request<Incoming>,
) -> Result<(Response<Incoming>, UpgradeSession), Failure> {
    let (head, body) = request.into_parts();
    // Only a request without a body can be repeated, since a body is read once.
    let (again, body) = if body.is_end_stream() {
        (Some(head.clone()), UpgradeBody::Right(Full::default()))
    } else {
        (None, UpgradeBody::Left(body))
    };
    let mut request = Request::from_parts(head, body);
    let interim = Interim::of(&mut request);
    let too_many_interim = || Failure::Lost {
        cluster: cluster.to_owned(),
        source: Cause::InterimAnswers,
    };
    let open = async |fresh| {
        let session = proxy.sessions.upgrade(cluster, fresh).await?;
        if target.short().is_none() {
            session.long.set(target.clone());
        }
        Ok::<_, Failure>(session)
    };
    let mut session = open(false).await?;
    let sent = tokio::select! {
        sent = session.sender.try_send_request(request) => sent,
        () = interim.exceeded() => return Err(too_many_interim()),
    };
    let mut error = match sent {
        Ok(response) => return Ok((response, session)),
        Err(error) => error,
    };
    request = match (error.take_message(), again) {
        (Some(unsent), _) => unsent,
        // hyper's error for a connection that was closed before the whole head of an answer.
        (None, Some(head)) if error.error().is_incomplete_message() => {
            Request::from_parts(head, UpgradeBody::Right(Full::default()))
        }
        _ => return Err(lost(cluster, error.into_error())),
    };
    tracing::debug!(cluster, "upgrade retried on a fresh session");
    // Fresh, since other spare sessions of the same carrier are ended at the same moment.
    let mut session = open(true).await?;
    let interim = Interim::of(&mut request);
    let sent = tokio::select! {
        sent = session.sender.send_request(request) => sent,
        () = interim.exceeded() => return Err(too_many_interim()),
    };
    sent.map(|response| (response, session))
        .map_err(|error| lost(cluster, error))
}

/// Any other answer is passed to kubectl as a whole: its fallback to SPDY depends on it. The connection
/// is closed after it, so that bytes pipelined behind the request are not read as another one.
fn refused(
    proxy: &Arc<Proxy>,
    response: Response<Incoming>,
    session: UpgradeSession,
    in_flight: InFlight,
) -> Response<Body> {
    proxy.metrics().count("forwarded");
    let (mut parts, incoming) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    let mut response = Response::from_parts(
        parts,
        body::passing(incoming, (Either::Right(session), in_flight)),
    );
    close(&mut response);
    response
}

/// hyper releases a connection with a requested upgrade, also when that was not granted, and the
/// receiver must then end TLS.
fn shut_down(proxy: &Arc<Proxy>, client: OnUpgrade) {
    proxy.sessions.context().spawn(async move {
        if let Ok(client) = client.await {
            let _ = TokioIo::new(client).shutdown().await;
        }
    });
}

/// The two sides of a copy.
struct Ends {
    client: OnUpgrade,
    agent: OnUpgrade,
    /// The place for an error, if the agent's end fails.
    slot: ErrorSlot,
}

fn copy(
    proxy: &Arc<Proxy>,
    cluster: String,
    ends: Ends,
    session: UpgradeSession,
    in_flight: InFlight,
) {
    let UpgradeSession { held, .. } = session;
    let upgraded = GaugeGuard::new(&proxy.metrics().upgraded);
    let bytes = proxy.metrics().upgraded_bytes.clone();
    proxy.sessions.context().spawn(async move {
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
            ErrorInjector::new(TokioIo::new(agent), cluster.clone(), ends.slot),
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
