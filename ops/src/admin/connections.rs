//! Connections to the admin listener, of which no client can hold all.

use crate::{
    Shutdown,
    shed_oldest::{Member, ShedOldest},
};
use axum::Router;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tower_service::Service;

/// The most connections at once. Each costs a descriptor and up to 16 KiB.
const CONNECTIONS: usize = 64;
/// For the head of a request, and so for a connection that rests between two.
const HEAD: Duration = Duration::from_secs(10);
/// For all that one connection does, which ends readers that stop in the middle of an answer.
const LIFE: Duration = Duration::from_secs(60);
/// For a request's head. Probes and scrapers send some hundred bytes.
const HEAD_BYTES: usize = 16 * 1024;
/// After an `accept` that failed, most likely because descriptors ran out.
const BACK_OFF: Duration = Duration::from_millis(100);

/// Accepts until `shutdown`. Not a graceful end: a scraper that never closes must not hold the
/// process.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: Shutdown,
) -> io::Result<()> {
    let open = ShedOldest::new(CONNECTIONS);
    let stop = CancellationToken::new();
    // Ends all connections, also when this future is dropped.
    let _stop = stop.clone().drop_guard();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.requested() => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => {
                // At the limit the oldest connection is shed, so that probes get through beside a
                // scraper that leaks connections.
                let member = Arc::new(open.enter());
                let (router, stop) = (router.clone(), stop.clone());
                tokio::spawn(async move {
                    tokio::select! {
                        () = connection(stream, router, Arc::clone(&member)) => {}
                        () = member.shed() => {}
                        () = stop.cancelled() => {}
                    }
                });
            }
            Err(error) => {
                tracing::debug!(%error, "the admin listener cannot accept");
                tokio::time::sleep(BACK_OFF).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, router: Router, member: Arc<Member>) {
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (mut router, member) = (router.clone(), Arc::clone(&member));
        async move {
            // A connection whose answer is being made is not the first to be shed.
            let _busy = member.busy();
            router.call(request).await
        }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(LIFE, serving).await {
        Ok(Ok(())) | Err(_) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection failed"),
    }
}
