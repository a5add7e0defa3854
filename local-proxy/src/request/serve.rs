//! Takes one request from kubectl to its cluster and the answer back.

use std::sync::Arc;

use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, Response, Version, header};
use hyper::body::Incoming;
use throwline_kube_wire::Status;
use throwline_kube_wire::headers::Upgrade;
use throwline_kube_wire::http1::gate::{Allowance, Note};
use throwline_kube_wire::http1::head::{self, HeadError};

use crate::request::body::Body;
use crate::request::plain::{self, HeadSize};
use crate::request::proxy::{Proxy, close};
use crate::request::route::{RouteError, redirect, route};
use crate::request::upgrade;
use crate::status::{self, Audience};

/// Bytes of a head that goes over the session that requests share; the agent takes 64 KiB there.
const MAX_SHARED_HEAD: usize = 48 * 1024;

impl Proxy {
    /// Answers one request; an error becomes a `Status`.
    ///
    /// `connection` is the cluster that the connection's TLS server name stands for, `note` the gate's
    /// record of the request.
    pub(crate) async fn serve(
        self: Arc<Self>,
        connection: Option<Arc<str>>,
        request: Request<Incoming>,
        mut note: Note,
    ) -> Response<Body> {
        // Taken first and held by the body: a drain waits for the answer's last byte.
        let in_flight = self.in_flight();
        let http1 = request.version() <= Version::HTTP_11;
        let size = match self.measure(&request, &mut note) {
            Ok(size) => size,
            Err(error) => {
                tracing::info!(%error, "a malformed request was refused");
                self.metrics().count("refused");
                let mut response = status::response(&status::malformed(&error), Audience::Decoding);
                if http1 {
                    close(&mut response);
                }
                return response;
            }
        };
        let target = match &note.target {
            Some(long) => long.as_str(),
            None => request
                .uri()
                .path_and_query()
                .map_or("", PathAndQuery::as_str),
        };
        // `target` instead of hyper's URI, which cannot hold a path over 64 KiB.
        let routed = route(
            connection.as_deref(),
            request.version(),
            request.method(),
            request.uri(),
            request.headers(),
            target,
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
                let mut response = status::response(&Status::from(&error), audience);
                // Bytes after a malformed request must not be read as another one.
                if http1 {
                    close(&mut response);
                }
                return response;
            }
        };
        // Discovery errors have another form (docs/adr/0013), so the audience is read before the
        // request is moved.
        let audience = Audience::of(route.path.as_str(), request.headers());
        // HTTP/2 has no Connection header, and an Upgrade there means nothing.
        let upgrade = http1.then(|| Upgrade::of(request.headers())).flatten();
        let cluster = route.cluster.clone();
        let by_path = route.by_path;
        let result = match upgrade {
            Some(kind) => upgrade::forward(&self, route, request, kind, in_flight).await,
            None => plain::forward(&self, route, request, in_flight, size).await,
        };
        match result {
            Ok(mut response) => {
                // A redirect of the API server has a path without the cluster's prefix.
                if by_path {
                    keep_cluster(response.headers_mut(), &cluster);
                }
                response
            }
            Err(failure) => {
                tracing::debug!(cluster, %failure, "request failed");
                self.metrics().count("failed");
                let mut response = status::response(&Status::from(&failure), audience);
                // Its body may be unread, and a later request may be in the same segments.
                if http1 && upgrade.is_some() {
                    close(&mut response);
                }
                response
            }
        }
    }

    /// Whether the head fits the shared session, else with the permit for a large head.
    fn measure(&self, request: &Request<Incoming>, note: &mut Note) -> Result<HeadSize, HeadError> {
        if let Some(refused) = note.refused.take() {
            return Err(refused);
        }
        let target = match &note.target {
            Some(long) => long.as_str().len(),
            None => request
                .uri()
                .path_and_query()
                .map_or(0, |target| target.as_str().len()),
        };
        let headers = request.headers().iter();
        let size = headers.fold(target, |size, (name, value)| {
            // As HTTP/2 counts them.
            size + name.as_str().len() + value.len() + 32
        });
        if size <= MAX_SHARED_HEAD {
            return Ok(HeadSize::Shared);
        }
        if size > head::MAX {
            return Err(HeadError::TooLarge);
        }
        let permit = match &note.permit {
            Some(permit) => Some(permit.clone()),
            None if size <= head::SMALL => None,
            None => Some(self.large_heads.admit().ok_or(HeadError::Busy)?),
        };
        Ok(HeadSize::Large { _permit: permit })
    }
}

/// Rewrites redirects to this local proxy, for a client whose paths name the cluster.
fn keep_cluster(headers: &mut HeaderMap, cluster: &str) {
    for name in [header::LOCATION, header::CONTENT_LOCATION] {
        let to = headers.get(&name).and_then(|value| value.to_str().ok());
        let to = to.and_then(|to| redirect(to, cluster));
        if let Some(to) = to.and_then(|to| HeaderValue::try_from(to).ok()) {
            headers.insert(name, to);
        }
    }
}
