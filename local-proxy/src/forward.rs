//! Takes one request from kubectl to its cluster and the answer back.

use crate::{
    body::{self, Body, Upload},
    error::Failure,
    headers::{Upgrade, remove_hop_by_hop},
    last_words::is_json_watch,
    metrics::{Held, Metrics},
    route::{Route, RouteError, route},
    session::{Sessions, refused_by_agent},
    status::{Audience, Status},
    upgrade,
};
use http::{HeaderValue, Request, Response, Uri, Version, header, uri::Authority, uri::Scheme};
use hyper::body::Incoming;
use std::{collections::HashSet, sync::Arc};

/// What all connections share.
pub(crate) struct Proxy {
    pub(crate) sessions: Sessions,
    /// The clusters to serve; `None` for all.
    pub(crate) only: Option<HashSet<String>>,
}

impl Proxy {
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.sessions.shared().metrics
    }

    /// Answers one request; what goes wrong becomes a `Status`.
    ///
    /// `connection` is the cluster that the connection's TLS server name stands for.
    pub(crate) async fn serve(
        self: Arc<Self>,
        connection: Option<Arc<str>>,
        request: Request<Incoming>,
    ) -> Response<Body> {
        let in_flight = Held::one(&self.metrics().requests_in_flight);
        let http1 = request.version() <= Version::HTTP_11;
        let routed = route(
            connection.as_deref(),
            request.version(),
            request.method(),
            request.uri(),
            request.headers(),
        )
        .and_then(|route| match &self.only {
            Some(only) if !only.contains(&route.cluster) => {
                Err(RouteError::NotServed(route.cluster))
            }
            _ => Ok(route),
        });
        let route = match routed {
            Ok(route) => route,
            Err(error) => {
                tracing::debug!(%error, "request refused");
                self.metrics().count("refused");
                let audience = Audience::of(request.uri().path(), request.headers());
                let mut response = Status::from(&error).response(audience);
                // Whatever follows a request that we do not understand is not read.
                if http1 {
                    close(&mut response);
                }
                return response;
            }
        };
        let audience = Audience::of(route.path.as_str(), request.headers());
        // HTTP/2 has no Connection header, and an Upgrade there means nothing.
        let upgrade = http1.then(|| Upgrade::of(request.headers())).flatten();
        let cluster = route.cluster.clone();
        let result = match upgrade {
            Some(kind) => upgrade::forward(&self, route, request, kind, in_flight).await,
            None => plain(&self, route, request, in_flight).await,
        };
        match result {
            Ok(response) => response,
            Err(failure) => {
                tracing::debug!(cluster, %failure, "request failed");
                self.metrics().count("failed");
                let mut response = Status::from(&failure).response(audience);
                // Its body may be unread, and a later request may be in the same segments.
                if http1 && upgrade.is_some() {
                    close(&mut response);
                }
                response
            }
        }
    }
}

/// Tells HTTP/1.1 not to read another request from this connection.
pub(crate) fn close(response: &mut Response<Body>) {
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
}

async fn plain(
    proxy: &Arc<Proxy>,
    route: Route,
    request: Request<Incoming>,
    in_flight: Held,
) -> Result<Response<Body>, Failure> {
    let cluster = route.cluster.clone();
    let path = route.path.clone();
    let mut request = request;
    remove_hop_by_hop(request.headers_mut());
    request.headers_mut().remove(header::HOST);
    // hyper has answered it when the body is first read.
    request.headers_mut().remove(header::EXPECT);
    *request.uri_mut() = target(route)?;
    *request.version_mut() = Version::HTTP_2;

    let (head, incoming) = request.into_parts();
    let body = Upload::new(incoming);
    let mut fresh = false;
    let (response, lease) = loop {
        let mut lease = proxy.sessions.api(&cluster, fresh).await?;
        let request = Request::from_parts(head.clone(), body.clone());
        let mut error = match lease.sender.try_send_request(request).await {
            Ok(response) => break (response, lease),
            Err(error) => error,
        };
        // What comes back, or is said not to have been looked at, has surely done nothing, whatever
        // its method: once more, on a session that is surely new.
        let is_unsent = error.take_message().is_some() || is_unprocessed(error.error());
        if is_unsent && !body.is_read() && !fresh {
            tracing::debug!(cluster, "request retried on a fresh session");
            fresh = true;
            continue;
        }
        let failure = lost(&cluster, &error.into_error());
        return Err(lease.ended().unwrap_or(failure));
    };
    proxy.metrics().count("forwarded");
    let (mut parts, incoming) = response.into_parts();
    remove_hop_by_hop(&mut parts.headers);
    parts.version = Version::HTTP_11;
    let line = lease.line();
    let held = (lease, in_flight);
    let body = match is_json_watch(&path, &parts.headers) {
        true => body::watch(incoming, held, cluster, line),
        false => body::passing(incoming, held),
    };
    Ok(Response::from_parts(parts, body))
}

/// Whether the agent says that it has not looked at the request (RFC 9113, section 8.7). A session
/// that ends in peace says so of what comes late, and hyper does of what it had in hand then, which
/// it does not give back.
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
pub(crate) fn target(route: Route) -> Result<Uri, Failure> {
    let internal = |error: &dyn std::error::Error| Failure::Internal(error.to_string());
    let authority = Authority::try_from(route.cluster.as_str()).map_err(|e| internal(&e))?;
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTPS);
    parts.authority = Some(authority);
    parts.path_and_query = Some(route.path);
    Uri::from_parts(parts).map_err(|e| internal(&e))
}

/// With the innermost cause, which is the one that says what happened. An alert of the agent's
/// about our certificate is one, see [`refused_by_agent`].
pub(crate) fn lost(cluster: &str, error: &hyper::Error) -> Failure {
    let mut cause: &dyn std::error::Error = error;
    loop {
        let io = cause.downcast_ref::<std::io::Error>().or_else(|| {
            let h2 = cause.downcast_ref::<h2::Error>()?;
            h2.get_io()
        });
        if let Some(failure) = io.and_then(|io| refused_by_agent(cluster, io)) {
            return failure;
        }
        let Some(source) = cause.source() else { break };
        cause = source;
    }
    Failure::Lost {
        cluster: cluster.to_owned(),
        why: cause.to_string(),
    }
}
