//! One sealed session: HTTP on an authenticated byte stream, for as long as its user may have it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use throwline_kube_wire::http1::gate::{Gate, Note, Notes};
use throwline_kube_wire::http1::head::{self, HeadError};
use throwline_ops::{GaugeGuard, Shutdown};
use throwline_tunnel::bdp;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::audit::Subject;
use crate::metrics::Metrics;
use crate::quotas::Quotas;
use crate::quotas::large_heads::LargeHeads;
use crate::request::{AnswerBody, Gateway, Lifetime};

mod line_credentials;

pub use line_credentials::LineCredentials;

/// Knobs of the HTTP between users and the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests under way in one API session (SETTINGS_MAX_CONCURRENT_STREAMS). Default 250;
    /// k9s with many watches stays below 100. An API server allows 100 on a connection, and the
    /// pool opens more of them.
    pub streams: u32,
    /// Window of one HTTP/2 stream, at least. Default 512 KiB; worst case, with `send_buffer`,
    /// 768 KiB for each stream whose reader stalls.
    pub stream_window: u32,
    /// The same at most, where the user is far away. Default 18 MiB, [`bdp::STREAM_WINDOW`]; all
    /// streams of such a session hold at most twice as much.
    pub far_stream_window: u32,
    /// Bytes that wait to be sent on one stream. Default 256 KiB.
    pub send_buffer: usize,
    /// From an HTTP/1.1 head's first byte to its last. Default 10 s (Slowloris).
    pub head: Duration,
    /// How long a spare upgrade session may wait for its request. Default 15 min; costs its TLS and
    /// line buffers, about 100 KiB.
    pub spare: Duration,
    /// HTTP/2 PING when nothing arrives, so that a dead user's session ends. Default 30 s, and 20 s
    /// for the answer.
    pub keep_alive: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 250,
            stream_window: 512 * 1024,
            far_stream_window: bdp::STREAM_WINDOW,
            send_buffer: 256 * 1024,
            head: Duration::from_secs(10),
            spare: Duration::from_secs(15 * 60),
            keep_alive: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// Windows of a stream, and of a session as a whole, with a user so far away. A session holds at
    /// most its own window of bodies that the API server does not take; eight streams have to stall
    /// before they stop others of the same session.
    fn windows(&self, round_trip: Duration) -> (u32, [u32; 2]) {
        let far = bdp::stream_window(round_trip).min(self.far_stream_window);
        let near = self.stream_window.saturating_mul(8);
        let is_far = round_trip >= bdp::THRESHOLD && far > self.stream_window;
        match is_far {
            true => (far, [self.far_stream_window.saturating_mul(2), near]),
            false => (self.stream_window, [near, near / 4]),
        }
    }
}

/// The protocol that the session's ALPN has selected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// All plain requests and watches of one user.
    Http2,
    /// One request, then the end; for upgrades.
    Http1,
}

/// What the line and its handshake give to a session.
#[derive(Clone)]
pub struct Setup {
    pub protocol: Protocol,
    pub subject: Arc<Subject>,
    pub life: Lifetime,
    /// Accept no more requests, end those under way.
    pub shutdown: Shutdown,
    /// To the user and back, as measured in the handshake.
    pub round_trip: Duration,
    /// Puts the session's certificate under lines; `None`: under no line.
    pub credentials: Option<LineCredentials>,
}

/// Serves the sessions of all users. Clones are the same.
#[derive(Clone)]
pub struct SessionServer {
    gateway: Arc<Gateway>,
    quotas: Quotas,
    large_heads: Arc<LargeHeads>,
    metrics: Metrics,
    limits: Limits,
}

/// Window of a session whose user has used up the budget for windows: HTTP/2's initial one.
const LEAST_WINDOW: u32 = 65_535;

impl SessionServer {
    pub fn new(gateway: Arc<Gateway>, quotas: Quotas, metrics: Metrics, limits: Limits) -> Self {
        Self {
            gateway,
            quotas,
            large_heads: Arc::default(),
            metrics,
            limits,
        }
    }

    /// Serves one session to its end.
    pub async fn serve<IO>(self, io: IO, setup: Setup)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _held = GaugeGuard::new(&self.metrics.sessions);
        match setup.protocol {
            // Boxed: a line would be as large as both from its first byte.
            Protocol::Http2 => Box::pin(self.serve_http2(io, setup)).await,
            Protocol::Http1 => Box::pin(self.serve_http1(io, setup)).await,
        }
    }

    async fn serve_http2<IO>(self, io: IO, setup: Setup)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let limits = self.limits;
        let (stream_window, windows) = limits.windows(setup.round_trip);
        let user = &setup.subject.user.name;
        let (window, _held) = self.quotas.window(user, windows, LEAST_WINDOW);
        let (life, shutdown) = (setup.life.clone(), setup.shutdown.clone());
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .max_concurrent_streams(limits.streams)
            .initial_stream_window_size(stream_window.min(window))
            .initial_connection_window_size(window)
            .max_send_buf_size(limits.send_buffer)
            .max_header_list_size(64 * 1024)
            .keep_alive_interval(life.detached.is_zero().then_some(limits.keep_alive))
            .keep_alive_timeout(Duration::from_secs(20));
        let service = self.service(setup, None);
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
        let ended = tokio::select! {
            ended = &mut connection => ended,
            // Dropped, not drained: what is under way is reset, never ended as if it were whole.
            _ = life.ended() => return,
            () = shutdown.requested() => {
                connection.as_mut().graceful_shutdown();
                tokio::select! {
                    ended = &mut connection => ended,
                    _ = life.ended() => return,
                }
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "an api session has ended");
        }
    }

    async fn serve_http1<IO>(self, io: IO, setup: Setup)
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let limits = self.limits;
        let (life, shutdown) = (setup.life.clone(), setup.shutdown.clone());
        let mut gate = Gate::new(io, |_| 0, self.large_heads.share(&setup.subject));
        let first = tokio::select! {
            first = gate.first(limits.spare, limits.head) => first,
            _ = life.ended() => return,
            () = shutdown.requested() => {
                // A clean end without an answer: the local proxy may send its request again on
                // another session.
                let _ = gate.shutdown().await;
                return;
            }
        };
        match first {
            Ok(()) => {}
            Err(HeadError::Unused | HeadError::Idle) => {
                let _ = gate.shutdown().await;
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "an upgrade session was cut in its request");
                return;
            }
        }
        let mut builder = http1::Builder::new();
        builder
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head)
            // Also bounds what is read ahead of a body, so no more than is needed.
            .max_buf_size(head::SMALL.max(gate.largest() + 4096))
            .max_headers(head::MAX_HEADERS)
            // One request a session: bytes behind it are never parsed as a request.
            .keep_alive(false);
        let (gateway, subject) = (self.gateway.clone(), setup.subject.clone());
        let service = self.service(setup, Some(gate.notes()));
        let connection = builder
            .serve_connection(TokioIo::new(gate), service)
            .with_upgrades();
        tokio::select! {
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%error, "an upgrade session has ended");
                if error.is_parse() {
                    gateway.record_malformed(&subject, &error).await;
                }
            },
            _ = life.ended() => {}
        }
    }

    /// Answers the requests of one session.
    fn service(
        self,
        setup: Setup,
        notes: Option<Notes>,
    ) -> impl Service<
        Request<Incoming>,
        Response = Response<AnswerBody>,
        Error = Infallible,
        Future: Send + 'static,
    > {
        let gateway = self.gateway;
        let Setup {
            subject,
            life,
            credentials,
            ..
        } = setup;
        service_fn(move |request| {
            let (gateway, subject, life) = (gateway.clone(), subject.clone(), life.clone());
            let credentials = credentials.clone();
            // Boxed: it is large, and hyper moves it several times on its way to its task.
            let note = notes.as_ref().map_or_else(Note::default, Notes::take);
            Box::pin(async move {
                match &credentials {
                    Some(credentials) if LineCredentials::is_for_agent(&request) => {
                        credentials.answer(request).await
                    }
                    _ => gateway.answer(subject, life, request, note).await,
                }
            })
        })
    }
}
