//! A small pool of connections to one API server, with one set of credentials.
//!
//! HTTP/2: the first connection with room is taken, so that extra ones fall idle and are closed.
//! HTTP/1.1, when the server's ALPN selects it: one request a connection at a time.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use throwline_kube_wire::http1::interim::Interim;
use throwline_kube_wire::http1::request_line::RequestLine;
use throwline_kube_wire::http1::target::Target;
use throwline_kube_wire::http2::interim::{Bounded, Exceeded};
use throwline_ops::GaugeGuard;
use tokio::time::Instant;

use super::access::Credentials;
use super::connect::{Connected, Protocols, connect};
use super::error::{ConnectError, Error, ExchangeError};
use super::limits::Limits;
use super::upload::OutBody;
use crate::metrics::Metrics;

/// Longest DATA frame of HTTP/2 that is taken, bytes: one chunk of bulk on its way to the user.
const FRAME: u32 = throwline_tunnel::sizes::BULK_CHUNK as u32;

/// What is wrong with an answer that is never complete.
pub(crate) const INTERIM: &str = "interim answers (1xx) without end";

pub(crate) struct Pool {
    pub(super) credentials: Arc<Credentials>,
    protocols: Protocols,
    limits: Limits,
    metrics: Metrics,
    state: Mutex<State>,
    /// Held while connecting, so that a burst of requests opens one connection and not one each.
    connecting: tokio::sync::Mutex<()>,
    /// HTTP/1.1 connections that serve a request.
    busy: Arc<AtomicUsize>,
}

#[derive(Default)]
struct State {
    http2: Vec<Arc<Multiplexed>>,
    http1: Vec<(http1::SendRequest<OutBody>, Instant)>,
    speaks_http1: bool,
}

struct Multiplexed {
    sender: http2::SendRequest<OutBody>,
    /// What the server allows at once, by its last SETTINGS.
    allowed: Arc<AtomicUsize>,
    exceeded: Exceeded,
    /// After so long without a byte it is given up.
    silence: Duration,
    in_flight: AtomicUsize,
    /// When it last had a stream.
    used: Mutex<Instant>,
}

/// An answer's head with its body, and the place in the pool that it holds until the end of both.
pub(crate) struct Answer {
    pub(crate) response: Response<Incoming>,
    pub(crate) lease: Lease,
}

/// A place on a connection; ends with the answer's body.
pub(crate) enum Lease {
    Http2(Stream),
    Http1(Arc<Pool>, http1::SendRequest<OutBody>, Busy),
}

/// One HTTP/1.1 connection's share of those that may serve requests.
pub(crate) struct Busy(Arc<AtomicUsize>);

impl Busy {
    /// `None`: there are `most` already.
    fn on(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let busy = Self(count.clone());
        (count.fetch_add(1, Ordering::Relaxed) < most).then_some(busy)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One stream's share of a connection.
pub(crate) struct Stream(Arc<Multiplexed>);

/// A request without an answer.
pub(super) enum Failed {
    /// Never sent.
    NotSent {
        request: Box<Request<OutBody>>,
        error: Error,
    },
    /// Sent, but the server reports that it did not process it.
    NotProcessed(Error),
    /// May have been processed: not sent again, except a read.
    Unknown(Error),
}

impl Pool {
    pub(super) fn new(
        credentials: Arc<Credentials>,
        protocols: Protocols,
        limits: Limits,
        metrics: Metrics,
    ) -> Self {
        let state = State {
            speaks_http1: protocols == Protocols::Http1,
            ..State::default()
        };
        Self {
            credentials,
            protocols,
            limits,
            metrics,
            state: Mutex::new(state),
            connecting: tokio::sync::Mutex::default(),
            busy: Arc::default(),
        }
    }

    /// A place on an open connection, which is opened if there is none. Opening is boxed: requests are moved,
    /// and most find an open connection.
    /// `long` is the target of the request where `http` cannot hold it: it takes a fresh connection.
    pub(super) async fn lease(self: &Arc<Self>, long: Option<Target>) -> Result<Lease, Error> {
        if long.is_some() {
            return Box::pin(self.open(long)).await;
        }
        if let Some(lease) = self.ready() {
            return Ok(lease);
        }
        if self.state().speaks_http1 {
            // Nothing is shared, so no request waits for the connection of another.
            return Box::pin(self.open(None)).await;
        }
        let _turn = self.connecting.lock().await;
        match self.ready() {
            Some(lease) => Ok(lease),
            None => Box::pin(self.open(None)).await,
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
            // The first stays open; the idle time of the others is over.
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
                let busy = Busy::on(&self.busy, self.limits.apart)?;
                return Some(Lease::Http1(self.clone(), sender, busy));
            }
        }
        None
    }

    async fn open(self: &Arc<Self>, long: Option<Target>) -> Result<Lease, Error> {
        if self.state().http2.len() >= self.limits.connections {
            return Err(Error::Busy);
        }
        // Counts before the connection is made: a slow API server would otherwise collect connects
        // without bound.
        let busy = Busy::on(&self.busy, self.limits.apart).ok_or(Error::Busy)?;
        let Connected { io, http2 } =
            connect(&self.credentials, self.protocols, self.limits.connect).await?;
        let held = GaugeGuard::new(&self.metrics.upstream_connections);
        let broken = |error: hyper::Error| Error::Connect(ConnectError::Http(error));
        if !http2 {
            let (io, slot) = RequestLine::new(io);
            if let Some(target) = long {
                slot.set(target);
            }
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
            return Ok(Lease::Http1(self.clone(), sender, busy));
        }
        drop(busy);
        let io = Bounded::new(io);
        let exceeded = io.exceeded();
        let (sender, driver) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(self.limits.stream_window)
            // One stream that stalls must not stop the others: only the streams' own windows bind.
            .initial_connection_window_size(i32::MAX.unsigned_abs())
            .max_frame_size(FRAME)
            .max_send_buf_size(256 * 1024)
            .max_header_list_size(64 * 1024)
            .keep_alive_interval(self.limits.keep_alive)
            .keep_alive_timeout(self.limits.keep_alive)
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
                // SETTINGS_MAX_CONCURRENT_STREAMS of the API server, which may change while the
                // connection lives.
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
            exceeded,
            silence: self.limits.keep_alive * 2,
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

    fn is_idle(&self, limit: Duration) -> bool {
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
                Err(_) if stream.0.exceeded.is_true() => {
                    Err(Failed::Unknown(Error::Broken(INTERIM)))
                }
                Err(error) => Err(failed(error, stream.0.silence)),
            },
            Self::Http1(pool, mut sender, busy) => {
                let mut request = request;
                let interim = Interim::of(&mut request);
                let sent = tokio::select! {
                    sent = sender.try_send_request(request) => sent,
                    () = interim.exceeded() => return Err(Failed::Unknown(Error::Broken(INTERIM))),
                };
                match sent {
                    Ok(response) => Ok(Answer {
                        response,
                        lease: Self::Http1(pool, sender, busy),
                    }),
                    Err(error) => Err(failed(error, pool.limits.keep_alive * 2)),
                }
            }
        }
    }

    /// The answer has ended cleanly: its connection may serve another request.
    pub(crate) fn give_back(self) {
        let Self::Http1(pool, mut sender, _busy) = self else {
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

fn failed(mut error: TrySendError<Request<OutBody>>, silence: Duration) -> Failed {
    let request = error.take_message();
    let error = error.into_error();
    let is_unprocessed = is_unprocessed(&error);
    let error = match error.is_timeout() {
        true => Error::Silent(silence),
        false => Error::Exchange(ExchangeError::Http(error)),
    };
    match request {
        Some(request) => Failed::NotSent {
            request: Box::new(request),
            error,
        },
        None if is_unprocessed => Failed::NotProcessed(error),
        None => Failed::Unknown(error),
    }
}

/// The server has reported that this stream was not processed: REFUSED_STREAM, or a graceful GOAWAY,
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
