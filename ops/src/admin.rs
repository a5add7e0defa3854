//! The admin listener: `/healthz`, `/readyz`, `/metrics`, and `POST /drain` where a part can be
//! drained. It is for operators and balancers, not for the internet: what it tells is not secret
//! and needs no authentication, and `POST /drain` needs a token.

mod connections;
mod drain_token;

use crate::{Readiness, Shutdown};
use axum::{
    Router,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use prometheus::{
    Encoder, IntCounter, IntGauge, Registry, TextEncoder, core::Collector, proto::MetricFamily,
};
use std::io;
use tokio::{net::TcpListener, runtime::Handle};

pub use drain_token::DrainToken;

/// Serves until `shutdown`. The caller binds, so that tests can use port 0.
///
/// Keep it running through the drain, by giving it the last [`Shutdown`]: a balancer
/// learns from `/readyz` that it must send no more.
///
/// It holds at most 64 connections: a new one replaces the oldest that waits for a request. One
/// has 10 s to send the head of a request and lives 60 s in all.
///
/// # Errors
/// The listener fails in a way that does not pass.
pub async fn run(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    shutdown: Shutdown,
) -> io::Result<()> {
    serve(listener, router(registry, readiness), shutdown).await
}

/// The same with `POST /drain`, which calls `drain` and answers 202 at once: to take a
/// component out of service without a signal to its process, as a pod's `preStop` hook does.
/// `drain` must bear to be called again.
///
/// Only a client with the token may do so, as `Authorization: Bearer …`, and never a web page: a request
/// with an `Origin`, or for a host by a name with a dot, is refused with 403.
///
/// # Errors
/// As [`run`].
pub async fn run_with_drain(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    token: DrainToken,
    drain: impl Fn() + Clone + Send + Sync + 'static,
    shutdown: Shutdown,
) -> io::Result<()> {
    let ask = async move |headers: HeaderMap| match token.check(&headers) {
        Ok(()) => {
            drain();
            (StatusCode::ACCEPTED, "draining\n").into_response()
        }
        Err(denied) => {
            tracing::warn!(reason = %denied, "a request to drain was refused");
            denied.into_response()
        }
    };
    let router = router(registry, readiness).route("/drain", post(ask));
    serve(listener, router, shutdown).await
}

async fn serve(listener: TcpListener, router: Router, shutdown: Shutdown) -> io::Result<()> {
    let is_loopback = listener.local_addr()?.ip().is_loopback();
    let router = if is_loopback {
        router.layer(middleware::from_fn(for_this_machine))
    } else {
        router
    };
    connections::serve(listener, router, shutdown).await
}

/// On a loopback listener: refuses a request for another host's name, which a web page can send
/// here by having its own name resolve to 127.0.0.1 (DNS rebinding), to read the answer.
async fn for_this_machine(request: Request, next: Next) -> Response {
    if drain_token::is_of_a_machine(request.headers()) {
        return next.run(request).await;
    }
    (StatusCode::FORBIDDEN, "ask for an address or localhost\n").into_response()
}

/// The routes alone, for a part that has an axum server already.
pub fn router(registry: Registry, readiness: Readiness) -> Router {
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz).with_state(readiness))
        .route("/metrics", get(metrics).with_state(registry))
}

async fn readyz(State(readiness): State<Readiness>) -> Response {
    if readiness.is_ready() {
        return "ok\n".into_response();
    }
    let mut body = readiness.reasons().join("\n");
    body.push('\n');
    (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
}

async fn metrics(State(registry): State<Registry>) -> Response {
    let encoder = TextEncoder::new();
    let mut body = Vec::new();
    let mut families = registry.gather();
    families.extend(tasks());
    families.extend(left_out());
    match encoder.encode(&families, &mut body) {
        Ok(()) => (
            [(header::CONTENT_TYPE, encoder.format_type().to_owned())],
            body,
        )
            .into_response(),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be encoded");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

fn left_out() -> Vec<MetricFamily> {
    let help = "lines left out of the log because there were too many like them";
    let Ok(counter) = IntCounter::new("throwline_log_lines_left_out_total", help) else {
        return Vec::new();
    };
    counter.inc_by(crate::telemetry::left_out());
    counter.collect()
}

/// How many tasks live in this runtime: a rising number shows tasks that never end.
fn tasks() -> Vec<MetricFamily> {
    let help = "tasks of the process that have not ended";
    let Ok(gauge) = IntGauge::new("throwline_tasks", help) else {
        return Vec::new();
    };
    let alive = Handle::current().metrics().num_alive_tasks();
    gauge.set(i64::try_from(alive).unwrap_or(i64::MAX));
    gauge.collect()
}

#[cfg(test)]
mod tests;
