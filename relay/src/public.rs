//! What the public listener answers: one request a connection.
//!
//! Nothing here looks at `Host`, and the path only chooses between the three things below; where
//! a line goes is decided by the identity that its carrier has proved.

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
use throwline_tunnel::http1::Rewound;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tracing::{debug, warn};

use crate::accept::{Admission, Denied};
use crate::enrol;
use crate::listener::{Caller, Door};
use crate::pace::{Turn, in_turn};
use crate::relay::Shared;
use crate::response::{self, Body};
use crate::session::{Full, Seat};

/// How long, and for how many bytes, an answered connection is read on.
const LINGER: (Duration, u64) = (Duration::from_secs(1), 256 * 1024);

/// How a connection's one request ended.
pub(crate) enum Outcome<T> {
    Answered,
    Failed,
    /// The 101 is written; what follows is the carrier.
    Upgraded {
        admitted: Box<Admitted>,
        io: Rewound<T>,
    },
}

/// A peer whose assertion was good, with the place among the carriers that it holds already.
pub(crate) struct Admitted {
    pub(crate) admission: Admission,
    pub(crate) seat: Seat,
    pub(crate) client: SocketAddr,
}

/// The answer of `GET /v1/ping`, for pre-flight checks.
#[derive(Serialize)]
struct Ping {
    product: &'static str,
    version: &'static str,
}

pub(crate) async fn serve<T>(shared: &Arc<Shared>, io: T, caller: &Caller) -> Outcome<T>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let admitted: Arc<Mutex<Option<Box<Admitted>>>> = Arc::default();
    let address = caller.address;
    let service = service_fn({
        let shared = Arc::clone(shared);
        let admitted = Arc::clone(&admitted);
        let caller = caller.clone();
        move |request| {
            let shared = Arc::clone(&shared);
            let admitted = Arc::clone(&admitted);
            let caller = caller.clone();
            let answered = async move {
                let response = match taken(&shared, &caller, request.uri().path()).await {
                    Turn::Later(wait) => too_many(&shared, wait),
                    Turn::Now => answer(&shared, &admitted, &caller, request).await,
                };
                Ok::<_, Infallible>(response)
            };
            Box::pin(answered)
        }
    });
    let timing = &shared.config.timing;
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(timing.request_head)
        .max_buf_size(shared.config.limits.head_bytes.max(8 * 1024))
        // One request each: an idle kept connection would be half-open without end.
        .keep_alive(false)
        .serve_connection(TokioIo::new(io), service);
    let whole = timing.request_head + timing.request;
    let served = std::future::poll_fn(|cx| connection.poll_without_shutdown(cx));
    let outcome = match tokio::time::timeout(whole, served).await {
        Ok(Ok(())) => Outcome::Answered,
        // `from`, not `client`: without a whole request, it may be a balancer's address.
        // hyper has told the client what is wrong with its request.
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
    let admitted = admitted
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let (Outcome::Answered, Some(admitted)) = (&outcome, admitted) {
        let io = Rewound::new(parts.read_buf, io);
        return Outcome::Upgraded { admitted, io };
    }
    // Too late for this one is no harm: the answer is on its way.
    let _ = tokio::time::timeout(LINGER.0, linger(&mut io)).await;
    outcome
}

/// Says goodbye and reads on for a moment. To close with bytes unread would be a reset, which
/// can take the answer away before the client has seen it.
async fn linger<T: AsyncRead + AsyncWrite + Unpin>(io: &mut T) {
    if io.shutdown().await.is_ok() {
        let mut rest = io.take(LINGER.1);
        let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    }
}

async fn answer(
    shared: &Arc<Shared>,
    admitted: &Mutex<Option<Box<Admitted>>>,
    caller: &Caller,
    request: Request<Incoming>,
) -> Response<Body> {
    let client = caller.client(shared, request.headers());
    let door = &caller.door;
    let path = shared.path_below_prefix(request.uri().path());
    match (request.method(), path) {
        (&Method::GET, "/v1/carrier") => match admit(shared, door, client, request.headers()) {
            Ok(ready) => {
                let response = ready.admission.response();
                *admitted.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(ready));
                response
            }
            Err(refused) => {
                shared.metrics.handshake(refused.label());
                warn!(%client, reason = %refused, "refused a carrier");
                refused.response()
            }
        },
        _ if matches!(door, Door::Peers(_)) => response::problem(
            StatusCode::NOT_FOUND,
            "not-found",
            "this listener is for the other relays",
        ),
        (&Method::POST, "/v1/enroll") => enrol::handle(shared, client.ip(), request).await,
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
            "this method is not for that path",
        ),
        _ => response::problem(
            StatusCode::NOT_FOUND,
            "not-found",
            "this is a throwline relay; there is nothing at that path",
        ),
    }
}

/// The turn that the TLS handshake took or, where a balancer ends TLS, takes one now. A balancer's
/// health check needs none: a relay that is busy is not down.
async fn taken(shared: &Shared, caller: &Caller, path: &str) -> Turn {
    match (shared.path_below_prefix(path), caller.turn) {
        ("/v1/carrier" | "/v1/enroll", Some(turn)) => turn,
        ("/v1/carrier" | "/v1/enroll", None) => in_turn(shared).await,
        _ => Turn::Now,
    }
}

/// More at once than the relay takes on; each is told another moment to come again.
fn too_many(shared: &Shared, wait: Duration) -> Response<Body> {
    shared.metrics.handshake("busy");
    let message = "too many connect at once; come again a little later";
    let response = response::problem(StatusCode::SERVICE_UNAVAILABLE, "limit", message);
    response::retry_after(response, wait)
}

fn admit(
    shared: &Arc<Shared>,
    door: &Door,
    client: SocketAddr,
    headers: &HeaderMap,
) -> Result<Admitted, Refused> {
    let admission = door.gate(shared).check(headers, shared.authority.now())?;
    let seat = shared.seats.take(&admission.peer).inspect_err(|full| {
        shared.metrics.limited(match full {
            Full::Relay => "carriers",
            Full::Identity => "carriers-per-identity",
        });
    })?;
    Ok(Admitted {
        admission,
        seat,
        client,
    })
}

/// Why a request does not become a carrier.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Full(#[from] Full),
}

impl Refused {
    fn response(&self) -> Response<Body> {
        match self {
            Self::Denied(denied) => denied.response(),
            Self::Full(full) => full.response(),
        }
    }

    fn label(&self) -> &'static str {
        match self {
            Self::Denied(denied) => denied.label(),
            Self::Full(_) => "limit",
        }
    }
}
