//! A small pool of connections to one API server, with one set of credentials.
//!
//! HTTP/2: the first connection with room is taken, so that extra ones fall idle and are closed.
//! HTTP/1.1, when the server's ALPN says so: one request a connection at a time.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use http::Request;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::time::Instant;

use super::access::Credentials;
use super::connect::{Connected, Protocols, connect};
use super::{Answer, Error, Limits, OutBody};
use crate::metrics::{Held, Metrics};

/// Longest DATA frame of HTTP/2 that is taken, bytes: what one piece of bulk is on its way to the user.
const FRAME: u32 = throwline_tunnel::piece::PIECE as u32;

pub(crate) struct Pool {
    pub(super) credentials: Credentials,
    limits: Limits,
    metrics: Metrics,
    state: Mutex<State>,
    /// Held while connecting, so that a burst of requests opens one connection and not one each.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    http2: Vec<Arc<Multiplexed>>,
    http1: Vec<(http1::SendRequest<OutBody>, Instant)>,
    speaks_http1: bool,
}

struct Multiplexed {
    sender: http2::SendRequest<OutBody>,
    /// What the server allows at once, as its SETTINGS said last.
    allowed: Arc<AtomicUsize>,
    in_flight: AtomicUsize,
    /// When it last had a stream.
    used: Mutex<Instant>,
}

/// A place on a connection; ends with the answer's body.
pub(crate) enum Lease {
    Http2(Stream),
    Http1(Arc<Pool>, http1::SendRequest<OutBody>),
}

/// One stream's share of a connection.
pub(crate) struct Stream(Arc<Multiplexed>);

/// A request without an answer.
pub(super) enum Failed {
    /// Never left; here it is back.
    NotSent {
        request: Box<Request<OutBody>>,
        error: Error,
    },
    /// Left, but the server says that it did not touch it.
    NotProcessed(Error),
    /// May have been processed: never sent again by us.
    Unknown(Error),
}

impl Pool {
    pub(super) fn new(credentials: Credentials, limits: Limits, metrics: Metrics) -> Self {
        Self {
            credentials,
            limits,
            metrics,
            state: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// A place on a connection that is alive as far as is known, opened if need be.
    /// Opening is boxed: requests are moved about, and most find a connection that is open.
    pub(super) async fn lease(self: &Arc<Self>) -> Result<Lease, Error> {
        if let Some(lease) = self.ready() {
            return Ok(lease);
        }
        if self.state().speaks_http1 {
            // Nothing is shared, so nobody need wait for another's connection.
            return Box::pin(self.open()).await;
        }
        let _turn = self.connecting.lock().await;
        match self.ready() {
            Some(lease) => Ok(lease),
            None => Box::pin(self.open()).await,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(self: &Arc<Self>) -> Option<Lease> {
        let mut state = self.state();
        state
            .http2
            .retain(|connection| !connection.sender.is_closed());
        let spares: Vec<bool> = state
            .http2
            .iter()
            .map(|connection| connection.is_idle(self.limits.idle))
            .collect();
        if spares.len() > 1 {
            // The first stays warm; the others have had their time.
            let mut at = 0;
            state.http2.retain(|_| {
                at += 1;
                at == 1 || !spares[at - 1]
            });
        }
        if let Some(connection) = state
            .http2
            .iter()
            .find(|connection| connection.has_room(self.limits.streams))
        {
            return Some(Lease::Http2(Stream::on(connection)));
        }
        while let Some((sender, since)) = state.http1.pop() {
            if sender.is_ready() && since.elapsed() < self.limits.idle {
                return Some(Lease::Http1(self.clone(), sender));
            }
        }
        None
    }

    async fn open(self: &Arc<Self>) -> Result<Lease, Error> {
        if self.state().http2.len() >= self.limits.connections {
            return Err(Error::Busy);
        }
        let Connected { io, http2 } =
            connect(&self.credentials, Protocols::Any, self.limits.connect).await?;
        let held = Held::new(&self.metrics.upstream_connections);
        let broken = |error: hyper::Error| Error::Connect(error.to_string());
        if !http2 {
            let (sender, driver) = http1::Builder::new()
                .max_buf_size(64 * 1024)
                .handshake(TokioIo::new(io))
                .await
                .map_err(broken)?;
            self.state().speaks_http1 = true;
            tokio::spawn(async move {
                let _held = held;
                if let Err(error) = driver.await {
                    tracing::debug!(%error, "a connection to the API server has ended");
                }
            });
            return Ok(Lease::Http1(self.clone(), sender));
        }
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(self.limits.stream_window)
            // One stream that stalls must not stop the others: only the streams' own windows bind.
            .initial_connection_window_size(i32::MAX.unsigned_abs())
            .max_frame_size(FRAME)
            .max_send_buf_size(256 * 1024)
            .max_header_list_size(64 * 1024)
            .keep_alive_interval(self.limits.keep_alive)
            .keep_alive_timeout(self.limits.keep_alive / 2)
            .keep_alive_while_idle(true)
            .handshake(TokioIo::new(io))
            .await
            .map_err(broken)?;
        let allowed = Arc::new(AtomicUsize::new(self.limits.streams));
        let learned = allowed.clone();
        tokio::spawn(async move {
            let _held = held;
            let mut driver = std::pin::pin!(driver);
            let driving = std::future::poll_fn(|cx| {
                let ended = driver.as_mut().poll(cx);
                learned.store(driver.current_max_send_streams(), Ordering::Relaxed);
                ended
            });
            if let Err(error) = driving.await {
                tracing::debug!(%error, "a connection to the API server has ended");
            }
        });
        let connection = Arc::new(Multiplexed {
            sender,
            allowed,
            in_flight: AtomicUsize::new(0),
            used: Mutex::new(Instant::now()),
        });
        let lease = Lease::Http2(Stream::on(&connection));
        let mut state = self.state();
        state.speaks_http1 = false;
        state.http2.push(connection);
        Ok(lease)
    }
}

impl Multiplexed {
    fn has_room(&self, streams: usize) -> bool {
        self.in_flight.load(Ordering::Relaxed) < streams.min(self.allowed.load(Ordering::Relaxed))
    }

    fn is_idle(&self, limit: std::time::Duration) -> bool {
        let used = *self.used.lock().unwrap_or_else(PoisonError::into_inner);
        self.in_flight.load(Ordering::Relaxed) == 0 && used.elapsed() > limit
    }
}

impl Stream {
    fn on(connection: &Arc<Multiplexed>) -> Self {
        connection.in_flight.fetch_add(1, Ordering::Relaxed);
        Self(connection.clone())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        *self.0.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Lease {
    pub(super) fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    pub(super) async fn send(self, request: Request<OutBody>) -> Result<Answer, Failed> {
        match self {
            Self::Http2(stream) => match stream.0.sender.clone().try_send_request(request).await {
                Ok(response) => Ok(Answer {
                    response,
                    lease: Self::Http2(stream),
                }),
                Err(error) => Err(failed(error)),
            },
            Self::Http1(pool, mut sender) => match sender.try_send_request(request).await {
                Ok(response) => Ok(Answer {
                    response,
                    lease: Self::Http1(pool, sender),
                }),
                Err(error) => Err(failed(error)),
            },
        }
    }

    /// The answer has ended as it should: its connection may serve another.
    pub(crate) fn give_back(self) {
        let Self::Http1(pool, mut sender) = self else {
            return;
        };
        tokio::spawn(async move {
            if sender.ready().await.is_ok() {
                let mut state = pool.state();
                if state.http1.len() < pool.limits.connections {
                    state.http1.push((sender, Instant::now()));
                }
            }
        });
    }
}

fn failed(mut error: TrySendError<Request<OutBody>>) -> Failed {
    let request = error.take_message();
    let error = error.into_error();
    let said = Error::Exchange(describe(&error));
    match request {
        Some(request) => Failed::NotSent {
            request: Box::new(request),
            error: said,
        },
        None if is_unprocessed(&error) => Failed::NotProcessed(said),
        None => Failed::Unknown(said),
    }
}

/// The server has said of this stream that it was not processed: REFUSED_STREAM, or a graceful GOAWAY,
/// which a stream only sees as its error when it lies above the last one processed (RFC 9113, 6.8).
fn is_unprocessed(error: &hyper::Error) -> bool {
    let cause = error
        .source()
        .and_then(|source| source.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        cause.is_remote()
            && (cause.reason() == Some(h2::Reason::REFUSED_STREAM)
                || (cause.is_go_away() && cause.reason() == Some(h2::Reason::NO_ERROR)))
    })
}

fn describe(error: &hyper::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
