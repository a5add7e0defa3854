//! The loopback listener: TLS, then HTTP/1.1 or HTTP/2 as ALPN says.

use crate::{config::Timing, forward::Proxy, metrics::Held, route::cluster_of, status::Status};
use bytes::Bytes;
use http::StatusCode;
use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use rustls::ServerConfig;
use std::{convert::Infallible, io, sync::Arc, time::Duration};
use throwline_ops::Shutdown;
use throwline_tunnel::http1::{
    Rewound,
    head::{self, HeadError},
};
use throwline_tunnel::read_ahead::ReadAhead;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt},
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
const HEAD: usize = head::MAX;
/// How long a client may take to read why its request was refused.
const REFUSAL: Duration = Duration::from_secs(5);
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
            request_head: timing.request_head,
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
    request_head: Duration,
    shutdown: Shutdown,
}

impl Connection {
    async fn serve(self, stream: TcpStream, permit: OwnedSemaphorePermit) {
        let _held = Held::one(&self.proxy.metrics().connections);
        let stream =
            match timeout(self.handshake, self.acceptor.accept(ReadAhead::new(stream))).await {
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
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        let cluster: Option<Arc<str>> = stream
            .get_ref()
            .1
            .server_name()
            .and_then(cluster_of)
            .map(Arc::from);
        let proxy = self.proxy.clone();
        let service = service_fn(move |request| {
            // Boxed: it is large, and hyper moves it.
            let answer = Box::pin(proxy.clone().serve(cluster.clone(), request));
            async move { Ok::<_, Infallible>(answer.await) }
        });
        let (http, stream) = if is_http2 {
            (&self.http.http2, Rewound::new(Bytes::new(), stream))
        } else {
            match self.first_head(stream).await {
                Some(stream) => (&self.http.http1, stream),
                None => return,
            }
        };
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

    /// Refuses a first request with two readings, which the parser would settle by itself. Of a
    /// later one on the same connection it reads one and then closes (RFC 9112, section 6.3).
    async fn first_head<IO>(&self, mut stream: IO) -> Option<Rewound<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let within = self.request_head;
        let head = tokio::select! {
            head = head::read(&mut stream, within, within) => head,
            () = self.shutdown.requested() => return None,
        };
        match head {
            Ok(head) => Some(Rewound::new(head, stream)),
            Err(error) => {
                tracing::debug!(%error, "no request on a loopback connection");
                refuse(stream, &error).await;
                None
            }
        }
    }
}

/// Answers what is no request, as far as there is somebody to answer.
async fn refuse<IO: AsyncWrite + Unpin>(mut stream: IO, error: &HeadError) {
    let status = match error {
        HeadError::Unused | HeadError::Idle | HeadError::Cut(_) => return,
        HeadError::Slow(_) => StatusCode::REQUEST_TIMEOUT,
        HeadError::TooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        _ => StatusCode::BAD_REQUEST,
    };
    let body = Status::bad_request(&error.to_string()).json();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let answer = async {
        stream.write_all(head.as_bytes()).await?;
        stream.write_all(&body).await?;
        stream.shutdown().await
    };
    // The client may be one that does not read.
    let _ = timeout(REFUSAL, answer).await;
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod kubectl_tests;
