//! Plain requests and watches: one stream of the API session.

use std::sync::Arc;
use std::time::Duration;

use http::uri::{Authority, PathAndQuery, Scheme};
use http::{Method, Request, Response, Uri, Version, header};
use http_body::Body as _;
use http_body_util::Either;
use hyper::body::Incoming;
use throwline_kube_wire::headers::remove_hop_by_hop;
use throwline_kube_wire::http1::gate::Permit;
use throwline_tunnel::line::Handle;
use throwline_tunnel::mux;

use crate::failure::{Cause, Failure};
use crate::request::body::{self, Body};
use crate::request::goaway::GoawayReason;
use crate::request::proxy::{InFlight, Proxy};
use crate::request::retry::Retry;
use crate::request::route::Route;
use crate::request::stream_error::is_json_watch;
use crate::request::upgrade;
use crate::session::{ResendableBody, lost};

/// Whether a head fits the session that requests share.
pub(crate) enum HeadSize {
    Shared,
    Large { _permit: Option<Permit> },
}

pub(crate) async fn forward(
    proxy: &Arc<Proxy>,
    route: Route,
    request: Request<Incoming>,
    in_flight: InFlight,
    size: HeadSize,
) -> Result<Response<Body>, Failure> {
    let cluster = route.cluster.clone();
    let path = route.path.clone();
    let mut request = request;
    let goaway = request.extensions_mut().remove::<GoawayReason>();
    remove_hop_by_hop(request.headers_mut());
    // In HTTP/2 `:authority` has the cluster's name; a different Host beside it is malformed (RFC
    // 9113 section 8.3.1).
    request.headers_mut().remove(header::HOST);
    // hyper has answered it when the body is first read.
    request.headers_mut().remove(header::EXPECT);
    let short = match &size {
        HeadSize::Shared => path.short(),
        HeadSize::Large { .. } => None,
    };
    let Some(short) = short else {
        return Box::pin(upgrade::plain(proxy, route, request, in_flight)).await;
    };
    *request.uri_mut() = target(&cluster, short)?;
    *request.version_mut() = Version::HTTP_2;

    let (head, incoming) = request.into_parts();
    // Only what changes nothing may be repeated without an answer (RFC 9110 section 9.2.2).
    let is_safe = matches!(head.method, Method::GET | Method::HEAD) && incoming.is_end_stream();
    let timing = &proxy.sessions.context().timing;
    let mut retry = Retry::new(is_safe, timing.wait_for_relay);
    let body = ResendableBody::new(incoming);
    let mut fresh = false;
    let (response, lease) = loop {
        let mut lease = match proxy.sessions.api(&cluster, fresh).await {
            Ok(lease) => lease,
            Err(failure) if retry.has_begun() => {
                retry.after(failure).await?;
                continue;
            }
            Err(failure) => return Err(failure),
        };
        let request = Request::from_parts(head.clone(), Either::Left(body.counted(lease.upload())));
        let line = lease.line();
        let sent = tokio::select! {
            sent = lease.sender.try_send_request(request) => sent,
            // The line may stay detached for minutes; a fresh session may reach another replica of
            // the agent at once.
            () = stays_detached(line, timing.resend_after), if is_safe => {
                let cluster = cluster.clone();
                let source = Cause::Detached;
                retry.after(Failure::Lost { cluster, source }).await?;
                continue;
            }
        };
        let mut error = match sent {
            Ok(response) => break (response, lease),
            Err(error) => error,
        };
        // A request that hyper returns, or that the agent reports as unprocessed, had no effect, whatever
        // its method: it is sent again, on a fresh session.
        let is_unsent = error.take_message().is_some() || is_unprocessed(error.error());
        // Once: a second session that returns the request shows another cause, which `retry`
        // bounds.
        if is_unsent && !body.is_read() && !fresh {
            tracing::debug!(cluster, "request retried on a fresh session");
            fresh = true;
            continue;
        }
        let failure = lost(&cluster, error.into_error());
        retry.after(lease.ended().unwrap_or(failure)).await?;
        fresh = false;
    };
    proxy.metrics().count("forwarded");
    let (mut parts, incoming) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    parts.version = Version::HTTP_11;
    let line = lease.line();
    let guards = (Either::Left(lease), in_flight);
    let body = if is_json_watch(&path, &parts.headers) {
        body::watch(incoming, guards, cluster, line)
    } else {
        body::passing(incoming, guards).with_goaway(cluster, line, goaway)
    };
    Ok(Response::from_parts(parts, body))
}

/// Ends when the line has been detached for `limit` without a break.
async fn stays_detached(line: Option<Handle<mux::Stream>>, limit: Duration) {
    let Some(mut phases) = line.map(|line| line.phases()) else {
        return std::future::pending().await;
    };
    loop {
        // The end of the line ends the request, too.
        if phases
            .wait_for(|phase| !phase.attached && !phase.over)
            .await
            .is_err()
        {
            return std::future::pending().await;
        }
        let back = phases.wait_for(|phase| phase.attached || phase.over);
        if tokio::time::timeout(limit, back).await.is_err() {
            return;
        }
    }
}

/// Whether the agent reports that it did not process the request (RFC 9113, section 8.7). A session
/// that ends with NO_ERROR does so for late requests, and hyper for those that it had not sent, which
/// it does not return.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            let reason = error.reason();
            return error.is_remote()
                && ((error.is_go_away() && reason == Some(h2::Reason::NO_ERROR))
                    || (error.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM)));
        }
        cause = error.source();
    }
    false
}

/// The request's target towards the agent: the path as it came, the cluster's name for a host,
/// which the agent replaces.
fn target(cluster: &str, path: &PathAndQuery) -> Result<Uri, Failure> {
    let authority = Authority::try_from(cluster).map_err(Failure::internal)?;
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTPS);
    parts.authority = Some(authority);
    parts.path_and_query = Some(path.clone());
    Uri::from_parts(parts).map_err(Failure::internal)
}
