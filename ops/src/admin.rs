//! The admin listener: `/healthz`, `/readyz`, `/metrics`, and `POST /drain` where a part can be
//! drained. It is for operators and balancers, not for the internet: it has no authentication and
//! says nothing secret.

use crate::{Readiness, Shutdown};
use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use prometheus::{Encoder, IntGauge, Registry, TextEncoder, core::Collector, proto::MetricFamily};
use std::io;
use tokio::{net::TcpListener, runtime::Handle};

/// Serves until `shutdown`. The caller binds, so that tests can use port 0.
///
/// Keep it running through the drain, by giving it a [`Shutdown`] that comes last: a balancer
/// learns from `/readyz` that it must send no more.
pub async fn run(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    shutdown: Shutdown,
) -> io::Result<()> {
    serve(listener, router(registry, readiness), shutdown).await
}

/// The same with `POST /drain`, which calls `drain` and answers 202 at once: for whoever takes a
/// part out of service without a signal to its process, such as a pod's `preStop` hook. `drain`
/// must bear to be called again.
pub async fn run_with_drain(
    listener: TcpListener,
    registry: Registry,
    readiness: Readiness,
    drain: impl Fn() + Clone + Send + Sync + 'static,
    shutdown: Shutdown,
) -> io::Result<()> {
    let ask = async move || {
        drain();
        (StatusCode::ACCEPTED, "draining\n")
    };
    let router = router(registry, readiness).route("/drain", post(ask));
    serve(listener, router, shutdown).await
}

async fn serve(listener: TcpListener, router: Router, shutdown: Shutdown) -> io::Result<()> {
    let serve = axum::serve(listener, router).into_future();
    // Not a graceful end: a scraper that never closes must not hold the process.
    tokio::select! {
        result = serve => result,
        () = shutdown.requested() => Ok(()),
    }
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

/// How many tasks live in this runtime, which tells of any that nobody ends.
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
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    async fn get(address: std::net::SocketAddr, path: &str) -> String {
        ask(address, "GET", path).await
    }

    async fn ask(address: std::net::SocketAddr, method: &str, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn answers_and_stops() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let registry = Registry::new();
        let counter = prometheus::IntCounter::new("throwline_test_total", "a test").unwrap();
        registry.register(Box::new(counter)).unwrap();
        let readiness = Readiness::new();
        let listening = readiness.condition("listening");
        let (trigger, shutdown) = Shutdown::new();
        let server = tokio::spawn(run(listener, registry, readiness, shutdown));

        assert!(get(address, "/healthz").await.starts_with("HTTP/1.1 200"));
        let answer = get(address, "/readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("listening: not yet"));
        listening.ready();
        assert!(get(address, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(
            get(address, "/metrics")
                .await
                .contains("throwline_test_total 0")
        );
        assert!(
            get(address, "/metrics")
                .await
                .contains("\nthrowline_tasks ")
        );
        assert!(get(address, "/else").await.starts_with("HTTP/1.1 404"));

        // A scraper that stays does not hold the process.
        let _open = TcpStream::connect(address).await.unwrap();
        trigger.trigger();
        let ended = tokio::time::timeout(Duration::from_secs(10), server).await;
        ended.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_post_drains_and_a_get_does_not() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, drained) = Shutdown::new();
        let drain = std::sync::Arc::new(drain);
        let (trigger, shutdown) = Shutdown::new();
        let server = tokio::spawn(run_with_drain(
            listener,
            Registry::new(),
            Readiness::new(),
            move || drain.trigger(),
            shutdown,
        ));
        assert!(get(address, "/drain").await.starts_with("HTTP/1.1 405"));
        assert!(!drained.is_requested());
        for _ in 0..2 {
            let answer = ask(address, "POST", "/drain").await;
            assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
        }
        assert!(drained.is_requested());
        trigger.trigger();
        server.await.unwrap().unwrap();
    }
}
