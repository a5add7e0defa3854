//! One sealed session: HTTP on an authenticated byte stream, for as long as its user may have it.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use throwline_ops::{DrainGuard, Shutdown};
use throwline_tunnel::far;
use throwline_tunnel::http1::Rewound;
use throwline_tunnel::http1::head::{self, HeadError};
use throwline_tunnel::line::Phase;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use crate::audit::Subject;
use crate::gateway::{AnswerBody, Gateway};
use crate::metrics::Held;
use crate::rules::Refusal;
use crate::status::Failure;

/// Knobs of the HTTP that users speak to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests under way in one API session (SETTINGS_MAX_CONCURRENT_STREAMS). Default 250, as the
    /// API server's own; k9s with many watches stays below 100.
    pub streams: u32,
    /// Window of one HTTP/2 stream, at least. Default 512 KiB; worst case, with `send_buffer`,
    /// 768 KiB for each stream whose reader stalls.
    pub stream_window: u32,
    /// The same at most, where the user is far away. Default 18 MiB, [`far::STREAM_WINDOW`]; all
    /// streams of such a session hold at most twice as much.
    pub far_stream_window: u32,
    /// Bytes that wait to be sent on one stream. Default 256 KiB.
    pub send_buffer: usize,
    /// From an HTTP/1.1 head's first byte to its last. Default 10 s (Slowloris).
    pub head: Duration,
    /// How long a spare upgrade session may wait for its request. Default 15 min; costs its TLS and
    /// line buffers, about 100 KiB.
    pub spare: Duration,
    /// HTTP/2 PING when nothing comes, so that a dead user's session ends. Default 30 s, and 20 s
    /// for the answer.
    pub keep_alive: Duration,
    /// A request's body of which nothing comes for this long is broken off. Default 180 s: longer
    /// than its line may be without a stream.
    pub upload_idle: Duration,
    /// For reading the refusal of an upgrade from the API server, as a whole. Default 10 s.
    pub refusal: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 250,
            stream_window: 512 * 1024,
            far_stream_window: far::STREAM_WINDOW,
            send_buffer: 256 * 1024,
            head: Duration::from_secs(10),
            spare: Duration::from_secs(15 * 60),
            keep_alive: Duration::from_secs(30),
            upload_idle: Duration::from_secs(180),
            refusal: Duration::from_secs(10),
        }
    }
}

impl Limits {
    /// Windows of a stream and of a session with a user so far away.
    fn windows(&self, round_trip: Duration) -> (u32, u32) {
        let far = far::stream_window(round_trip).min(self.far_stream_window);
        // Less may be a busy machine.
        let is_far = round_trip >= Duration::from_millis(30) && far > self.stream_window;
        match is_far {
            true => (far, self.far_stream_window.saturating_mul(2)),
            // One stream that stalls must not stop the others: only the streams' own windows bind.
            false => (self.stream_window, i32::MAX.unsigned_abs()),
        }
    }
}

/// The protocol that the session's ALPN has picked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// All plain requests and watches of one user.
    Http2,
    /// One request, then the end; upgrades come this way.
    Http1,
}

/// How long a session may go on.
#[derive(Clone)]
pub struct Lifetime {
    /// End of the user's certificate.
    pub not_after: SystemTime,
    /// Take no more requests, end those under way.
    pub shutdown: Shutdown,
    /// End now.
    pub stop: Shutdown,
    /// Held while anything of the session lives.
    pub guard: Arc<DrainGuard>,
    /// How long the line below, which knows by itself whether its other end is there, may be without
    /// it; zero: not at all.
    pub detached: Duration,
    /// To the user and back, as the handshake had it.
    pub round_trip: Duration,
    /// Where that line is in its life.
    pub phases: Option<watch::Receiver<Phase>>,
}

/// The clock may be set while we sleep, so it is read again at least this often.
const LOOK_AT_CLOCK: Duration = Duration::from_secs(60);

impl Lifetime {
    /// Ends when the session must be no more.
    pub(crate) async fn over(&self) {
        tokio::select! {
            () = self.stop.requested() => {}
            () = self.expired() => tracing::info!("a session ended with its user's certificate"),
        }
    }

    async fn expired(&self) {
        while let Ok(left) = self.not_after.duration_since(SystemTime::now()) {
            tokio::time::sleep((left + Duration::from_millis(1)).min(LOOK_AT_CLOCK)).await;
        }
    }
}

/// Serves one session to its end.
pub async fn serve<IO>(
    io: IO,
    protocol: Protocol,
    gateway: Arc<Gateway>,
    subject: Arc<Subject>,
    life: Lifetime,
) where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let _held = Held::new(&gateway.metrics().sessions);
    match protocol {
        // Boxed: a line would be as large as both from its first byte.
        Protocol::Http2 => Box::pin(api(io, gateway, subject, life)).await,
        Protocol::Http1 => Box::pin(single(io, gateway, subject, life)).await,
    }
}

async fn api<IO>(io: IO, gateway: Arc<Gateway>, subject: Arc<Subject>, life: Lifetime)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = gateway.limits();
    let (stream_window, window) = limits.windows(life.round_trip);
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(window)
        .max_send_buf_size(limits.send_buffer)
        .max_header_list_size(64 * 1024)
        .keep_alive_interval(life.detached.is_zero().then_some(limits.keep_alive))
        .keep_alive_timeout(Duration::from_secs(20));
    let service = answers(gateway, subject, life.clone());
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(io), service));
    let ended = tokio::select! {
        ended = &mut connection => ended,
        // Dropped, not drained: what is under way is reset, never ended as if it were whole.
        () = life.over() => return,
        () = life.shutdown.requested() => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                ended = &mut connection => ended,
                () = life.over() => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an api session has ended");
    }
}

/// What answers the requests of one session.
fn answers(
    gateway: Arc<Gateway>,
    subject: Arc<Subject>,
    life: Lifetime,
) -> impl Service<
    Request<Incoming>,
    Response = Response<AnswerBody>,
    Error = Infallible,
    Future: Send + 'static,
> {
    service_fn(move |request| {
        // Boxed: it is large, and hyper moves it some times on its way to its task.
        let answer = gateway.clone();
        Box::pin(answer.answer(subject.clone(), life.clone(), request))
    })
}

async fn single<IO>(mut io: IO, gateway: Arc<Gateway>, subject: Arc<Subject>, life: Lifetime)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let limits = gateway.limits();
    let head = tokio::select! {
        head = head::read(&mut io, limits.spare, limits.head) => head,
        () = life.over() => return,
        () = life.shutdown.requested() => {
            let _ = io.shutdown().await;
            return;
        }
    };
    let head = match head {
        Ok(head) => head,
        Err(error) => return refuse(io, &gateway, &subject, error).await,
    };
    let service = answers(gateway, subject, life.clone());
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(head::MAX)
        // One request a session: whatever is sent behind it is never looked at as a request.
        .keep_alive(false)
        .serve_connection(TokioIo::new(Rewound::new(head, io)), service)
        .with_upgrades();
    tokio::select! {
        ended = connection => if let Err(error) = ended {
            tracing::debug!(%error, "an upgrade session has ended");
        },
        () = life.over() => {}
    }
}

/// Answers what is no request, as far as there is somebody to answer.
async fn refuse<IO: AsyncWrite + Unpin>(
    mut io: IO,
    gateway: &Gateway,
    subject: &Subject,
    error: HeadError,
) {
    let status = match &error {
        HeadError::Unused | HeadError::Idle => {
            let _ = io.shutdown().await;
            return;
        }
        HeadError::Cut(_) => return,
        HeadError::Slow(_) => "408 Request Timeout",
        HeadError::TooLarge => "431 Request Header Fields Too Large",
        _ => "400 Bad Request",
    };
    tracing::warn!(user = subject.user.name, source = subject.source, %error, "a malformed request was refused");
    gateway.metrics().refused.inc();
    let failure = Failure::from(Refusal::bad_request(error.to_string()));
    let Ok(body) = failure.response().into_body().collect().await;
    let body = body.to_bytes();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let answer = async {
        io.write_all(head.as_bytes()).await?;
        io.write_all(&body).await?;
        io.shutdown().await
    };
    // The other side may be one that does not read.
    let _ = tokio::time::timeout(Duration::from_secs(5), answer).await;
}
