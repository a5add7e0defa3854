//! What a listener answers: one request for each connection.
//!
//! Nothing here reads `Host`, and the path only chooses between the three things below. Where a line
//! goes is decided by the identity that its carrier has proved.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use http::{HeaderMap, Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use throwline_certs::Directory;
use throwline_tunnel::PrefixedIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::{debug, warn};

use super::authenticator::{Authenticator, VerifiedAssertion};
use super::caller::{Caller, ListenerKind};
use super::denied::Denied;
use super::enrolment::Enrolment;
use super::response::{self, Body};
use crate::limits::carriers::{CarrierLimit, CarrierPermit, LimitReached};
use crate::limits::handshakes::Handshakes;
use crate::metrics::Metrics;

/// How long, and for how many bytes, an answered connection is read on.
const LINGER: (Duration, u64) = (Duration::from_secs(1), 256 * 1024);

/// Answers requests of both listeners.
pub(crate) struct Requests {
    pub(crate) enrolment: Enrolment,
    pub(crate) carriers: CarrierLimit,
    pub(crate) handshakes: Arc<Handshakes>,
    /// For its clock.
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) metrics: Metrics,
    /// The path of the public URL, without a slash at its end.
    pub(crate) path_prefix: String,
    /// Bytes of a request's head.
    pub(crate) head_bytes: usize,
    /// See [`Timing`](crate::Timing).
    pub(crate) head_timeout: Duration,
    pub(crate) request_timeout: Duration,
}

/// How a connection's one request ended.
pub(super) enum Outcome<T> {
    Answered,
    Failed,
    /// The 101 is written; the bytes that follow are the carrier's.
    Upgraded {
        accepted: Box<Accepted>,
        io: PrefixedIo<T>,
    },
}

/// A peer whose assertion is valid, with the permit that its carrier holds already.
pub(super) struct Accepted {
    pub(super) assertion: VerifiedAssertion,
    pub(super) permit: CarrierPermit,
    pub(super) client: SocketAddr,
}

/// One connection's request, with what it needs for its answer.
#[derive(Clone)]
struct Exchange {
    requests: Arc<Requests>,
    authenticator: Arc<Authenticator>,
    caller: Caller,
    /// Filled when the answer is the 101.
    accepted: Arc<Mutex<Option<Box<Accepted>>>>,
}

/// The answer of `GET /v1/ping`, for pre-flight checks.
#[derive(Serialize)]
struct Ping {
    product: &'static str,
    version: &'static str,
}

impl Requests {
    pub(super) async fn serve<T>(
        self: &Arc<Self>,
        io: T,
        caller: &Caller,
        authenticator: &Arc<Authenticator>,
    ) -> Outcome<T>
    where
        T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let exchange = Exchange {
            requests: Arc::clone(self),
            authenticator: Arc::clone(authenticator),
            caller: caller.clone(),
            accepted: Arc::default(),
        };
        let address = caller.address;
        let service = service_fn({
            let exchange = exchange.clone();
            move |request| {
                let exchange = exchange.clone();
                Box::pin(async move { Ok::<_, Infallible>(exchange.answer(request).await) })
            }
        });
        let mut connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.head_timeout)
            .max_buf_size(self.head_bytes.max(8 * 1024))
            // One request each: an idle kept connection would be half-open without end.
            .keep_alive(false)
            .serve_connection(TokioIo::new(io), service);
        // hyper's timeout covers the head only; this one ends a body that trickles.
        let whole = self.head_timeout + self.request_timeout;
        let served = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx));
        let outcome = match tokio::time::timeout(whole, served).await {
            Ok(Ok(())) => Outcome::Answered,
            // `from`, not `client`: without a whole request, it may be a balancer's address.
            // hyper has answered what is wrong with the request.
            Ok(Err(error)) if error.is_parse() => {
                debug!(from = %address, %error, "refused a malformed request");
                Outcome::Failed
            }
            Ok(Err(error)) => {
                debug!(from = %address, %error, "no request could be read");
                return Outcome::Failed;
            }
            Err(_) => {
                debug!(from = %address, "the request or its answer took too long");
                return Outcome::Failed;
            }
        };
        let parts = connection.into_parts();
        let mut io = parts.io.into_inner();
        let accepted = exchange.lock().take();
        if let (Outcome::Answered, Some(accepted)) = (&outcome, accepted) {
            // The dialer may send WebSocket frames before it has read the 101.
            let io = PrefixedIo::new(parts.read_buf, io);
            return Outcome::Upgraded { accepted, io };
        }
        // A timeout does no harm: the answer is on its way.
        let _ = tokio::time::timeout(LINGER.0, linger(&mut io)).await;
        outcome
    }

    /// A balancer may or may not have taken off the public URL's path.
    fn path_below_prefix<'p>(&self, path: &'p str) -> &'p str {
        match path.strip_prefix(&self.path_prefix) {
            Some(below) if below.starts_with('/') => below,
            _ => path,
        }
    }
}

/// Shuts the connection down and reads on for a moment. To close with bytes unread would be a reset,
/// which can discard the answer before the client has read it.
async fn linger<T: AsyncRead + AsyncWrite + Unpin>(io: &mut T) {
    if io.shutdown().await.is_ok() {
        let mut rest = io.take(LINGER.1);
        let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    }
}

impl Exchange {
    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        // Before the path is served: behind a balancer, this is the first moment with a client's
        // address.
        if let Err(wait) = self.admit(&request).await {
            return too_many(wait);
        }
        let client = self.caller.client(request.headers());
        let path = self.requests.path_below_prefix(request.uri().path());
        match (request.method(), path) {
            (&Method::GET, "/v1/carrier") => self.upgrade(client, request.headers()).await,
            _ if self.caller.kind == ListenerKind::Peers => response::problem(
                StatusCode::NOT_FOUND,
                "not-found",
                "this listener is for the other relays",
            ),
            (&Method::POST, "/v1/enroll") => {
                let enrolment = &self.requests.enrolment;
                enrolment.serve(client.ip(), request).await
            }
            (&Method::GET, "/v1/ping") => response::json(
                StatusCode::OK,
                &Ping {
                    product: "throwline",
                    version: env!("CARGO_PKG_VERSION"),
                },
            ),
            (_, "/v1/carrier" | "/v1/enroll" | "/v1/ping") => response::problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "bad-request",
                "this path does not accept that method",
            ),
            _ => response::problem(
                StatusCode::NOT_FOUND,
                "not-found",
                "there is nothing at that path; /v1/ping answers where a relay is",
            ),
        }
    }

    /// Waits for admission where that was not possible before TLS, since a balancer terminates it. A
    /// balancer's health check needs none: a relay that is busy is not down.
    async fn admit(&self, request: &Request<Incoming>) -> Result<(), Duration> {
        match self.requests.path_below_prefix(request.uri().path()) {
            "/v1/carrier" | "/v1/enroll" => {
                let client = self.caller.client(request.headers());
                self.caller.admit(client).await
            }
            _ => Ok(()),
        }
    }

    async fn upgrade(&self, client: SocketAddr, headers: &HeaderMap) -> Response<Body> {
        match self.accept(client, headers).await {
            Ok(accepted) => {
                let response = accepted.assertion.response();
                *self.lock() = Some(Box::new(accepted));
                response
            }
            Err(refused) => {
                self.requests.metrics.handshake(refused.label());
                warn!(%client, reason = %refused, "refused a carrier");
                refused.response()
            }
        }
    }

    async fn accept(&self, client: SocketAddr, headers: &HeaderMap) -> Result<Accepted, Refused> {
        let requests = &self.requests;
        // Signatures are verified on the threads for handshakes, so that lines do not wait for them.
        let check = {
            let (directory, headers) = (Arc::clone(&requests.directory), headers.clone());
            let authenticator = Arc::clone(&self.authenticator);
            async move { authenticator.check(&headers, directory.now()) }
        };
        let checked = requests.handshakes.run(check).await;
        let assertion = checked.unwrap_or(Err(Denied::Busy))?;
        // Only behind the signature: the limit is per identity, and a forged one must not fill
        // another's share.
        let permit = requests.carriers.take(&assertion.peer);
        let permit = permit.inspect_err(|reached| requests.metrics.limited(reached.limit()))?;
        Ok(Accepted {
            assertion,
            permit,
            client,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Box<Accepted>>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// More at once than the relay takes on; each peer gets another moment to come again.
fn too_many(wait: Duration) -> Response<Body> {
    let message = "too many connect at once; come again a little later";
    let response = response::problem(StatusCode::SERVICE_UNAVAILABLE, "limit", message);
    response::retry_after(response, wait)
}

fn limit_reached(reached: LimitReached) -> Response<Body> {
    let (status, message) = match reached {
        LimitReached::Relay => (
            StatusCode::SERVICE_UNAVAILABLE,
            "this relay is full; try again later",
        ),
        LimitReached::Identity => (
            StatusCode::TOO_MANY_REQUESTS,
            "this identity is connected too many times; is it in use elsewhere?",
        ),
    };
    let wait = Duration::from_secs(15);
    response::retry_after(response::problem(status, "limit", message), wait)
}

/// Why a request does not become a carrier.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Limit(#[from] LimitReached),
}

impl Refused {
    fn response(&self) -> Response<Body> {
        match self {
            Self::Denied(denied) => denied.response(),
            Self::Limit(reached) => limit_reached(*reached),
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Denied(denied) => denied.label(),
            Self::Limit(_) => "limit",
        }
    }
}
