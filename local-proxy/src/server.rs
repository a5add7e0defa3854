//! The loopback listener: TLS, then HTTP/1.1 or HTTP/2 as ALPN says.

use crate::{config::Timing, forward::Proxy, metrics::Held, route::cluster_of};
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use std::{convert::Infallible, io, sync::Arc, time::Duration};
use throwline_ops::Shutdown;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

/// Connections in their TLS handshake at once. Default 256, about 10 MiB at worst; another user of
/// the machine, who can connect but not authenticate, can hold these and no more.
pub(crate) const HALF_OPEN: usize = 256;
/// After a failed accept (no file descriptors left, for instance), so that it does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(2);
/// HTTP heads, both versions.
const HEAD: usize = 64 * 1024;
/// What an upload whose far end stalls can make us hold; with the API session's send buffer, below
/// 1 MiB a stream.
const STREAM_WINDOW: u32 = 512 * 1024;
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Bytes of an answer held for a client that does not read.
const SEND_BUFFER: usize = 128 * 1024;
/// k9s keeps one watch for each kind it has shown.
const STREAMS: u32 = 500;

/// Accepts until `shutdown`. Connections then finish what they have; who wants them gone sooner
/// cancels the tasks.
pub(crate) async fn run(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    proxy: Arc<Proxy>,
    timing: &Timing,
    shutdown: Shutdown,
) {
    let acceptor = TlsAcceptor::from(tls);
    let half_open = Arc::new(Semaphore::new(HALF_OPEN));
    let http = Arc::new(Http::new(timing));
    let mut backoff = ACCEPT_BACKOFF;
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &half_open) => accepted,
            () = shutdown.requested() => return,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                sleep(backoff).await;
                backoff = (backoff * 2).min(ACCEPT_BACKOFF_MAX);
                continue;
            }
        };
        backoff = ACCEPT_BACKOFF;
        let connection = Connection {
            acceptor: acceptor.clone(),
            proxy: proxy.clone(),
            http: http.clone(),
            handshake: timing.handshake,
            shutdown: shutdown.clone(),
        };
        proxy
            .sessions
            .shared()
            .spawn(connection.serve(stream, permit));
    }
}

/// A connection that may begin its handshake. It waits in the kernel's queue until one may.
async fn accept(
    listener: &TcpListener,
    half_open: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = half_open
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

struct Http {
    http1: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
}

impl Http {
    fn new(timing: &Timing) -> Self {
        let mut http1 = auto::Builder::new(TokioExecutor::new()).http1_only();
        http1
            .http1()
            .timer(TokioTimer::new())
            .header_read_timeout(timing.request_head)
            .max_buf_size(HEAD);
        let mut http2 = auto::Builder::new(TokioExecutor::new()).http2_only();
        http2
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(STREAMS)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEAD as u32);
        Self { http1, http2 }
    }
}

struct Connection {
    acceptor: TlsAcceptor,
    proxy: Arc<Proxy>,
    http: Arc<Http>,
    handshake: Duration,
    shutdown: Shutdown,
}

impl Connection {
    async fn serve(self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let _held = Held::one(&self.proxy.metrics().connections);
        let stream = match timeout(self.handshake, self.acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                tracing::debug!(%error, "loopback tls failed");
                return;
            }
            Err(_) => {
                tracing::debug!("loopback tls took too long");
                return;
            }
        };
        drop(permit);
        let http = match stream.get_ref().1.alpn_protocol() {
            Some(b"h2") => &self.http.http2,
            _ => &self.http.http1,
        };
        let cluster: Option<Arc<str>> = stream
            .get_ref()
            .1
            .server_name()
            .and_then(cluster_of)
            .map(Arc::from);
        let proxy = self.proxy.clone();
        let service = service_fn(move |request| {
            let answer = proxy.clone().serve(cluster.clone(), request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.shutdown.requested() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "loopback connection failed");
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod kubectl_tests;
