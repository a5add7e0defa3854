//! WebSocket as a byte stream, corked and bounded.
//!
//! Binary messages carry one opaque byte stream; where one message ends means nothing. Writes are
//! appended to a cork and leave as one message, when it is full or when the driver has nothing
//! else left to do: yamux flushes after every frame, and a message a frame would cost a system
//! call and a TLS record each.
//!
//! Two handles share the socket: [`WsIo`] is the byte stream that the multiplexer owns,
//! [`WsDriver`] is for the task that owns the carrier (flush, ping, close, counters). Both are
//! used by that one task, so the lock between them is never waited for.
//!
//! Only this file names tungstenite.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::{Sink, Stream as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode as WireCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message, error::ProtocolError};

use crate::proto::close::{CloseCode, CloseReason, ClosedBy};
use crate::sizes::WS_MESSAGE;
use crate::slow_start::SlowStart;

use self::counted::{Counted, Flood};

mod counted;

/// Buffers of one WebSocket.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes allocated for reading as long as the connection lives, and zeroed for each read, also
    /// for one that finds nothing. 4 KiB: four reads for a whole TLS record cost bulk nothing that
    /// can be measured, and small messages are most.
    pub read_buffer: usize,
    /// Bytes of frames that may wait for the network; writers wait beyond. 256 KiB.
    pub max_write_buffer: usize,
    /// Longest frame and message accepted; a longer one is answered with close code 1009 before
    /// anything is allocated for it. 256 KiB.
    pub max_message: usize,
    /// Bytes gathered into one message at most; the first ones are smaller, see `crate::slow_start`.
    /// 48 KiB with its header.
    pub cork: usize,
}

impl Default for Config {
    /// Worst case a carrier: `read_buffer` always, `max_message` + `max_write_buffer` + `cork` when
    /// both directions stand still.
    fn default() -> Self {
        Self {
            read_buffer: 4 * 1024,
            max_write_buffer: 256 * 1024,
            max_message: 256 * 1024,
            cork: WS_MESSAGE,
        }
    }
}

impl Config {
    fn tungstenite(&self) -> WebSocketConfig {
        WebSocketConfig::default()
            .read_buffer_size(self.read_buffer)
            // What was corked leaves as it is.
            .write_buffer_size(0)
            .max_write_buffer_size(self.max_write_buffer)
            .max_message_size(Some(self.max_message))
            .max_frame_size(Some(self.max_message))
    }
}

/// Control frames and empty messages a peer may send at once, and how many a second it earns
/// back. Pings of both ends and of what stands between come to less than one a second.
const CONTROL_BURST: f64 = 100.0;
const CONTROL_PER_SECOND: f64 = 10.0;

/// Control bytes of the multiplexer may go this far over the cork: a pong must not wait behind
/// back-pressure, or two flooding ends would deadlock.
const CORK_RESERVE: usize = 4 * 1024;

/// Longest reason in a close frame (RFC 6455 section 5.5: 125 bytes with the code).
const MAX_REASON: usize = 123;

/// A fresh `Sec-WebSocket-Key`.
pub fn new_key() -> String {
    generate_key()
}

/// The `Sec-WebSocket-Accept` for a key (RFC 6455 section 4.2.2).
pub fn accept_key(key: &[u8]) -> String {
    derive_accept_key(key)
}

/// Which end of the WebSocket this is: a client masks what it sends, a server requires it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Masks its frames.
    Client,
    /// Rejects unmasked frames.
    Server,
}

/// Wraps a connection on which the upgrade is done. `early` are bytes that were read behind it.
pub async fn wrap<T>(io: T, early: Bytes, side: Side, config: &Config) -> (WsIo<T>, WsDriver<T>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let role = match side {
        Side::Client => Role::Client,
        Side::Server => Role::Server,
    };
    let unfinished = config.max_message + config.read_buffer + 64 * 1024;
    let counted = Counted::new(io, unfinished);
    let settings = Some(config.tungstenite());
    let ws = WebSocketStream::from_partially_read(counted, early.to_vec(), role, settings).await;
    let core = Arc::new(Mutex::new(Core {
        ws,
        inbound: Bytes::new(),
        cork: BytesMut::new(),
        cork_limit: config.cork.max(1024),
        slow_start: SlowStart::new(Instant::now()),
        unflushed: false,
        blocked: false,
        control: CONTROL_BURST,
        control_at: Instant::now(),
        pong: None,
        ended: None,
    }));
    (WsIo(core.clone()), WsDriver(core))
}

struct Core<T> {
    ws: WebSocketStream<Counted<T>>,
    inbound: Bytes,
    cork: BytesMut,
    cork_limit: usize,
    slow_start: SlowStart,
    /// Messages were handed to tungstenite since the last complete flush.
    unflushed: bool,
    /// A writer was held back since the driver last checked.
    blocked: bool,
    control: f64,
    control_at: Instant,
    pong: Option<Bytes>,
    ended: Option<CloseReason>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Core<T> {
    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if !self.inbound.is_empty() {
                let n = self.inbound.len().min(buf.len());
                self.inbound.split_to(n).copy_to_slice(&mut buf[..n]);
                return Poll::Ready(Ok(n));
            }
            if self.ended.is_some() {
                return Poll::Ready(Ok(0));
            }
            let message = ready!(Pin::new(&mut self.ws).poll_next(cx));
            self.ws.get_mut().message_complete();
            self.on_message(message);
        }
    }

    fn on_message(&mut self, message: Option<Result<Message, WsError>>) {
        match message {
            Some(Ok(Message::Binary(bytes))) => {
                // It moves no data and costs its sender as little as a ping.
                if bytes.is_empty() {
                    self.take_control();
                }
                self.inbound = bytes;
            }
            Some(Ok(Message::Ping(_))) => self.take_control(),
            Some(Ok(Message::Pong(payload))) => {
                self.take_control();
                self.pong = Some(payload);
            }
            Some(Ok(Message::Text(_) | Message::Frame(_))) => {
                self.end(
                    ClosedBy::Us,
                    CloseCode::Unsupported,
                    "only binary messages are spoken here",
                );
            }
            Some(Ok(Message::Close(frame))) => {
                let (code, reason) = frame.map_or((CloseCode::Normal, String::new()), |frame| {
                    (
                        CloseCode::from_u16(frame.code.into()),
                        frame.reason.to_string(),
                    )
                });
                self.end(ClosedBy::Peer, code, reason);
            }
            Some(Err(error)) => self.fail(&error),
            None => self.end(ClosedBy::Network, CloseCode::Abnormal, ""),
        }
    }

    /// A frame that carries no data: cheap to send, so it is rationed.
    fn take_control(&mut self) {
        let now = Instant::now();
        let earned = now.duration_since(self.control_at).as_secs_f64() * CONTROL_PER_SECOND;
        self.control_at = now;
        self.control = (self.control + earned).min(CONTROL_BURST) - 1.0;
        if self.control < 0.0 {
            self.end(ClosedBy::Us, CloseCode::Protocol, "too many control frames");
        }
    }

    fn fail(&mut self, error: &WsError) {
        use ProtocolError::ResetWithoutClosingHandshake;
        let (by, code) = match error {
            WsError::Capacity(_) => (ClosedBy::Us, CloseCode::TooBig),
            WsError::Protocol(ResetWithoutClosingHandshake)
            | WsError::ConnectionClosed
            | WsError::AlreadyClosed => (ClosedBy::Network, CloseCode::Abnormal),
            WsError::Io(io) if io.get_ref().is_some_and(|inner| inner.is::<Flood>()) => {
                (ClosedBy::Us, CloseCode::Protocol)
            }
            WsError::Io(_) => (ClosedBy::Network, CloseCode::Abnormal),
            _ => (ClosedBy::Us, CloseCode::Protocol),
        };
        self.end(by, code, error.to_string());
    }

    /// The first reason stays.
    fn end(&mut self, by: ClosedBy, code: CloseCode, reason: impl Into<String>) {
        if self.ended.is_none() {
            self.ended = Some(CloseReason::new(by, code, reason));
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.ended.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        // TCP's congestion window decays while idle, and with it the size of message that passes a
        // hop in one round trip.
        if self.cork.is_empty() {
            self.slow_start.before_send(Instant::now());
        }
        // What was appended as control may have gone over it.
        let limit = self.slow_start.limit(self.cork_limit);
        if self.cork.len() >= limit {
            match self.poll_uncork(cx) {
                Poll::Ready(result) => result?,
                Poll::Pending => {
                    self.blocked = true;
                    return Poll::Pending;
                }
            }
        }
        let limit = self.slow_start.limit(self.cork_limit);
        let n = buf.len().min(limit - self.cork.len());
        self.cork.extend_from_slice(&buf[..n]);
        Poll::Ready(Ok(n))
    }

    /// Makes a message of the cork, once earlier ones are on their way.
    fn poll_uncork(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Err(error) = ready!(Pin::new(&mut self.ws).poll_ready(cx)) {
            return Poll::Ready(Err(self.write_failed(error)));
        }
        self.slow_start.on_sent(Instant::now(), self.cork.len());
        let message = Message::Binary(self.cork.split().freeze());
        self.unflushed = true;
        match Pin::new(&mut self.ws).start_send(message) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(self.write_failed(error))),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.cork.is_empty() {
            ready!(self.poll_uncork(cx))?;
        }
        if self.unflushed {
            if let Err(error) = ready!(Pin::new(&mut self.ws).poll_flush(cx)) {
                return Poll::Ready(Err(self.write_failed(error)));
            }
            self.unflushed = false;
            if self.cork.is_empty() {
                // Idle for now: thousands of carriers must not each keep their largest message.
                self.cork = BytesMut::new();
            }
        }
        Poll::Ready(Ok(()))
    }

    fn write_failed(&mut self, error: WsError) -> io::Error {
        self.fail(&error);
        io::Error::new(io::ErrorKind::BrokenPipe, error)
    }
}

/// The byte stream. `poll_flush` does nothing: bytes leave when the driver flushes.
pub struct WsIo<T>(Arc<Mutex<Core<T>>>);

/// The driver's handle.
pub struct WsDriver<T>(Arc<Mutex<Core<T>>>);

fn lock<T>(core: &Mutex<Core<T>>) -> MutexGuard<'_, Core<T>> {
    // A panic under the lock ends the driver that holds both handles.
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> std::fmt::Debug for WsIo<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WsIo")
    }
}

impl<T> std::fmt::Debug for WsDriver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WsDriver")
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures::AsyncRead for WsIo<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).poll_read(cx, buf)
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> futures::AsyncWrite for WsIo<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> WsDriver<T> {
    /// Sends what is corked and waits for the socket to take it.
    pub fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.0).poll_flush(cx)
    }

    /// Waits until everything written was handed to the connection.
    ///
    /// # Errors
    /// The connection fails.
    pub async fn flush(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_flush(cx)).await
    }

    /// Appends a few bytes to the stream even when writers have to wait. False when the reserve
    /// is used up.
    pub(crate) fn append_control(&self, bytes: &[u8]) -> bool {
        let mut core = lock(&self.0);
        let fits = core.cork.len() + bytes.len() <= core.cork_limit + CORK_RESERVE;
        if fits {
            core.cork.extend_from_slice(bytes);
        }
        fits
    }

    /// Whether a writer had to wait since the last call.
    pub fn take_blocked(&self) -> bool {
        std::mem::take(&mut lock(&self.0).blocked)
    }

    /// Queues a ping unless earlier bytes are stuck. The next flush sends it.
    pub fn ping(&self, cx: &mut Context<'_>, payload: Bytes) -> bool {
        let mut core = lock(&self.0);
        if !matches!(Pin::new(&mut core.ws).poll_ready(cx), Poll::Ready(Ok(()))) {
            return false;
        }
        core.unflushed = true;
        Pin::new(&mut core.ws)
            .start_send(Message::Ping(payload))
            .is_ok()
    }

    /// The payload of the newest pong, once.
    pub fn take_pong(&self) -> Option<Bytes> {
        lock(&self.0).pong.take()
    }

    /// Bytes that came from the network, ever.
    pub fn received(&self) -> u64 {
        lock(&self.0).ws.get_ref().received()
    }

    /// Bytes that the network took, ever.
    pub fn written(&self) -> u64 {
        lock(&self.0).ws.get_ref().written()
    }

    /// Bytes that wait for the next flush.
    pub(crate) fn corked(&self) -> usize {
        lock(&self.0).cork.len()
    }

    /// Whether bytes wait for the network.
    pub fn is_unflushed(&self) -> bool {
        let core = lock(&self.0);
        core.unflushed || !core.cork.is_empty()
    }

    /// How the WebSocket ended, if it has.
    pub fn ended(&self) -> Option<CloseReason> {
        lock(&self.0).ended.clone()
    }

    /// Sends what is corked and a close frame, then reads until the peer's answer, so that the
    /// kernel does not discard the close frame with a reset. Gives up after `deadline`.
    pub async fn close(&self, code: CloseCode, reason: &str, deadline: Duration) {
        let mut cut = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(cut) {
            cut -= 1;
        }
        let frame = CloseFrame {
            code: WireCode::from(code.to_u16()),
            reason: reason[..cut].into(),
        };
        let goodbye = async {
            // The close frame is not sent behind bytes that the network does not take.
            let half = deadline / 2;
            let _ = tokio::time::timeout(half, self.flush()).await;
            let mut frame = Some(Message::Close(Some(frame)));
            let sent = std::future::poll_fn(|cx| {
                let mut core = lock(&self.0);
                if frame.is_some() {
                    ready!(Pin::new(&mut core.ws).poll_ready(cx)).map_err(drop)?;
                }
                if let Some(frame) = frame.take() {
                    Pin::new(&mut core.ws).start_send(frame).map_err(drop)?;
                }
                Pin::new(&mut core.ws).poll_flush(cx).map_err(drop)
            });
            if sent.await.is_ok() {
                std::future::poll_fn(|cx| self.poll_discard(cx)).await;
            }
        };
        let _ = tokio::time::timeout(deadline, goodbye).await;
    }

    fn poll_discard(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut core = lock(&self.0);
        core.inbound = Bytes::new();
        loop {
            match ready!(Pin::new(&mut core.ws).poll_next(cx)) {
                Some(Ok(Message::Close(_))) | Some(Err(_)) | None => return Poll::Ready(()),
                Some(Ok(_)) => {}
            }
        }
    }
}
