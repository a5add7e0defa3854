//! Accepts loopback connections: TLS, then HTTP/1.1 or HTTP/2 by ALPN.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use rustls::ServerConfig;
use throwline_kube_wire::http1::gate::{Gate, Note};
use throwline_kube_wire::http1::head;
use throwline_ops::shed_oldest::{Member, ShedOldest};
use throwline_ops::{GaugeGuard, Shutdown};
use throwline_tunnel::read_ahead::ReadAhead;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::rejection::Rejecting;
use crate::cluster_name::from_server_name;
use crate::config::{LoopbackLimits, Timing};
use crate::request::goaway::{GoawayReason, GoawayWriter};
use crate::request::proxy::Proxy;
use crate::request::route::prefix_of;

/// After a failed accept (no file descriptors left, for instance), so that it does not spin.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
const ACCEPT_BACKOFF_MAX: Duration = Duration::from_secs(2);
/// HTTP/1.1: the largest head, what hyper may read ahead of a body, and what it holds of an answer that its
/// client does not read. So only a connection that begins with a large head has more.
const BUFFER: usize = head::SMALL + 4 * 1024;
const LARGE_BUFFER: usize = head::MAX + 64 * 1024;
/// HTTP/2: far more than the service takes. Within it a request is refused on its own stream; beyond it h2
/// ends the connection. Go's clients keep to it by themselves.
const HEADER_LIST: u32 = 4 * head::MAX as u32;
/// The maximum of HTTP/2, so that a stalled stream exhausts its own window and no other's.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Accepts until `shutdown`. Connections then finish their requests; cancelling the tasks ends them
/// at once.
pub(crate) async fn run(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    proxy: Arc<Proxy>,
    timing: &Timing,
    limits: LoopbackLimits,
    shutdown: Shutdown,
) {
    let acceptor = TlsAcceptor::from(tls);
    let half_open = ShedOldest::new(limits.half_open);
    let http = Arc::new(Http::new(timing, limits));
    let mut backoff = ACCEPT_BACKOFF;
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = shutdown.requested() => return,
        };
        let stream = match accepted {
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
            request_head: timing.request_head,
            shutdown: shutdown.clone(),
        };
        proxy
            .sessions
            .context()
            .spawn(connection.serve(stream, half_open.enter()));
    }
}

async fn accept(listener: &TcpListener) -> io::Result<TcpStream> {
    let (stream, _) = listener.accept().await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

struct Http {
    http1: auto::Builder<TokioExecutor>,
    large_heads: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
}

impl Http {
    fn new(timing: &Timing, limits: LoopbackLimits) -> Self {
        let http1 = |buffer| {
            let mut http1 = auto::Builder::new(TokioExecutor::new()).http1_only();
            http1
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(timing.request_head)
                .max_headers(head::MAX_HEADERS)
                .max_buf_size(buffer);
            http1
        };
        let mut http2 = auto::Builder::new(TokioExecutor::new()).http2_only();
        http2
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(limits.stream_window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(limits.streams)
            .max_send_buf_size(limits.send_buffer)
            .max_header_list_size(HEADER_LIST);
        Self {
            http1: http1(BUFFER),
            large_heads: http1(LARGE_BUFFER),
            http2,
        }
    }
}

struct Connection {
    acceptor: TlsAcceptor,
    proxy: Arc<Proxy>,
    http: Arc<Http>,
    handshake: Duration,
    request_head: Duration,
    shutdown: Shutdown,
}

impl Connection {
    async fn serve(self, stream: TcpStream, slot: Member) {
        let _held = GaugeGuard::new(&self.proxy.metrics().connections);
        let Some(stream) = self.handshake(stream, &slot).await else {
            return;
        };
        // The client has shown its certificate, so its connection cannot be shed any more.
        drop(slot);
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let cluster: Option<Arc<str>> = stream
            .get_ref()
            .1
            .server_name()
            .and_then(from_server_name)
            .map(Arc::from);
        let proxy = self.proxy.clone();
        let goaway = is_http2.then(GoawayReason::default);
        let reason = goaway.clone();
        // HTTP/1.1: hyper's buffer is chosen by the first head, since it grows with each connection.
        let (http, stream, notes) = if is_http2 {
            (&self.http.http2, Gate::open(stream), None)
        } else {
            match self.first_head(stream).await {
                Some(mut stream) => {
                    let notes = stream.notes();
                    let mut http = &self.http.large_heads;
                    if stream.largest() <= head::SMALL {
                        stream.make_room(head::SMALL);
                        http = &self.http.http1;
                    }
                    (http, stream, Some(notes))
                }
                None => return,
            }
        };
        let service = service_fn(move |mut request: Request<Incoming>| {
            if let Some(goaway) = &goaway {
                request.extensions_mut().insert(goaway.clone());
            }
            let note = notes
                .as_ref()
                .map_or_else(Note::default, |notes| notes.take());
            // Boxed: it is large, and hyper moves it.
            let answer = Box::pin(proxy.clone().serve(cluster.clone(), request, note));
            async move { Ok::<_, Infallible>(answer.await) }
        });
        // h2 resets what it cannot parse without calling the service, so the rejection is counted here.
        let metrics = self.proxy.metrics().clone();
        let rejected = is_http2.then(|| -> Box<dyn Fn() + Send> {
            Box::new(move || {
                metrics.count("refused");
                tracing::info!(
                    "a request that cannot be read over HTTP/2 was refused; its target is likely too long, or not percent-encoded"
                );
            })
        });
        let stream = GoawayWriter::new(Rejecting::new(stream, rejected), reason);
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service);
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.shutdown.requested() => {
                // Requests in progress are finished; `run` in run.rs has the deadline.
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "loopback connection failed");
        }
    }

    /// TLS with the client's certificate, within its time and unless newer connections shed it.
    async fn handshake(
        &self,
        stream: TcpStream,
        slot: &Member,
    ) -> Option<TlsStream<ReadAhead<TcpStream>>> {
        let accepting = self.acceptor.accept(ReadAhead::new(stream));
        let accepted = tokio::select! {
            accepted = timeout(self.handshake, accepting) => accepted,
            () = slot.shed() => {
                tracing::debug!("a loopback connection was shed in its handshake");
                return None;
            }
        };
        match accepted {
            Ok(Ok(stream)) => Some(stream),
            Ok(Err(error)) => {
                tracing::debug!(%error, "loopback tls failed");
                None
            }
            Err(_) => {
                tracing::debug!("loopback tls took too long");
                None
            }
        }
    }

    /// Waits for the first head. The gate then checks every head before hyper parses it.
    async fn first_head<IO>(&self, stream: IO) -> Option<Gate<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let within = self.request_head;
        let mut gate = Gate::new(stream, prefix_of, self.proxy.large_heads.clone());
        let first = tokio::select! {
            first = gate.first(within, within) => first,
            () = self.shutdown.requested() => return None,
        };
        match first {
            Ok(()) => Some(gate),
            Err(error) => {
                tracing::debug!(%error, "no request on a loopback connection");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod kubectl_tests;
