//! Streams on a carrier: yamux, with its traps avoided.
//!
//! | trap of yamux 0.14 | answer |
//! |---|---|
//! | a reset reads as a clean end | [`Stream`] reports it as an error where it can tell; ends that matter are signalled in-band ([`crate::line`]) |
//! | closing and then dropping leaves a writing peer hanging | a dropped half-closed stream is drained by the driver, then reset (`Linger`) |
//! | closing the connection leaves local readers hanging | it is never closed, only dropped, which wakes them |
//! | the cap of streams kills the connection | own permits, both ways, well below the crate's cap |
//! | nothing is sent until the opener writes | openers write their header at once |
//! | 256 unacknowledged opens block the next | an empty frame acknowledges each stream on arrival |
//! | GOAWAY closes at once | never sent to drain; draining is a message of ours |
//! | a broken protocol is answered by GOAWAY alone | the driver then ends the carrier |
//! | an undriven connection stalls all streams | one driver task, which awaits no stream |
//! | every frame is flushed | [`crate::ws`] corks |
//! | windows grow without end | [`Config::window_growth`] |
//! | setters assert in an order | one constructor, `Config::yamux` |
//! | a pong that waits stops reading, on both ends without end | pings are answered below yamux, in `frames` |
//!
//! Only this file names yamux.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;

use crate::sizes::SEALED_CHUNK;
use crate::slow_start::SlowStart;
use crate::ws::{WsDriver, WsIo};

use self::frames::{Frames, Injector};

mod frames;

/// What a stream's receive window starts with; fixed by yamux.
const FIRST_WINDOW: usize = 256 * 1024;

/// Longest payload of a frame that is sent: a whole sealed chunk. yamux' own limit is 16 KiB.
const FRAME: usize = SEALED_CHUNK;

/// Streams that may exist beyond both caps before yamux itself gives up on the connection: those
/// being refused.
const REFUSALS: usize = 64;

/// Bytes a dropped stream is drained of before it is reset.
const LINGER_BYTES: usize = FIRST_WINDOW;

/// Knobs of the multiplexer.
#[derive(Clone, Debug)]
pub struct Config {
    /// Streams that may be open at once and were opened by this side. Default 1024; cost of an
    /// idle one about 1 KiB, of one whose reader stands still see `window_growth`.
    pub max_streams: usize,
    /// Streams that may be open at once and were opened by the peer; more are refused with code
    /// `Limit`. Default 1024.
    pub max_incoming: usize,
    /// Bytes by which the receive windows of one carrier's streams may outgrow their first
    /// 256 KiB, all together. Default 12 MiB. A window doubles when half of it was read within two
    /// round trips of the hop, so only where a reader keeps up; a stream's throughput is at most
    /// its window a round trip. A stream whose reader has stopped holds what its window had grown
    /// to at most, 256 KiB if it never read fast, and as much again in frames on their way to a
    /// peer that has stopped.
    pub window_growth: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            max_streams: 1024,
            max_incoming: 1024,
            window_growth: 12 * 1024 * 1024,
        }
    }
}

impl Config {
    /// The largest cap that is accepted.
    const MOST: usize = 64 * 1024;

    pub(crate) fn outgoing_permits(&self) -> usize {
        self.max_streams.clamp(1, Self::MOST)
    }

    pub(crate) fn incoming_permits(&self) -> usize {
        self.max_incoming.clamp(1, Self::MOST)
    }

    /// The setters assert that the window covers all streams, so the order matters: first no
    /// window limit, then the streams, then the window.
    fn yamux(&self) -> yamux::Config {
        let streams = self.outgoing_permits() + self.incoming_permits() + REFUSALS;
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(streams);
        let window = (streams * FIRST_WINDOW).saturating_add(self.window_growth);
        config.set_max_connection_receive_window(Some(window));
        config.set_read_after_close(true);
        config.set_split_send_size(FRAME);
        config
    }
}

/// Which end of the connection: the client numbers its streams odd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Dialer,
    Acceptor,
}

/// The connection, polled by the driver only.
pub(crate) struct Mux<T> {
    connection: yamux::Connection<Frames<WsIo<T>>>,
    injector: Injector,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Mux<T> {
    pub(crate) fn new(io: WsIo<T>, config: &Config, side: Side) -> Self {
        let mode = match side {
            Side::Dialer => yamux::Mode::Client,
            Side::Acceptor => yamux::Mode::Server,
        };
        let (frames, injector) = frames::wrap(io);
        Self {
            connection: yamux::Connection::new(frames, config.yamux(), mode),
            injector,
        }
    }

    /// Drives all streams; yields those that the peer opens.
    pub(crate) fn poll_inbound(&mut self, cx: &mut Context<'_>) -> Poll<Option<io::Result<Raw>>> {
        match ready!(self.connection.poll_next_inbound(cx)) {
            Some(Ok(mut stream)) => {
                // An empty frame carries the ACK, so that the opener's backlog of unacknowledged
                // streams does not depend on how long the answer takes.
                let _ = futures::AsyncWrite::poll_write(Pin::new(&mut stream), cx, &[]);
                Poll::Ready(Some(Ok(Raw(stream))))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(to_io(error)))),
            None => Poll::Ready(None),
        }
    }

    pub(crate) fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Raw>> {
        match ready!(self.connection.poll_new_outbound(cx)) {
            Ok(stream) => Poll::Ready(Ok(Raw(stream))),
            Err(error) => Poll::Ready(Err(to_io(error))),
        }
    }

    /// Appends pongs and resets that are due, where one frame has ended and the next not begun.
    pub(crate) fn inject(&self, ws: &WsDriver<T>) {
        self.injector.inject(|bytes| ws.append_control(bytes));
    }

    /// Whether yamux found the peer breaking the protocol.
    pub(crate) fn gave_up(&self) -> bool {
        self.injector.gave_up()
    }

    pub(crate) fn reset(&self, stream: u32) {
        self.injector.reset(stream);
    }
}

fn to_io(error: yamux::ConnectionError) -> io::Error {
    match error {
        yamux::ConnectionError::Io(error) => error,
        yamux::ConnectionError::Closed => io::ErrorKind::ConnectionAborted.into(),
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

/// Counts one stream of a carrier for as long as the stream, or what is left of it, exists.
pub(crate) struct StreamPermit {
    /// `None` only while dropping.
    permit: Option<OwnedSemaphorePermit>,
    released: Arc<Notify>,
}

impl StreamPermit {
    /// `released` is notified after the permit was given back.
    pub(crate) fn new(permit: OwnedSemaphorePermit, released: Arc<Notify>) -> Self {
        Self {
            permit: Some(permit),
            released,
        }
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.released.notify_waiters();
    }
}

/// A yamux stream before it is given a permit.
pub(crate) struct Raw(yamux::Stream);

impl Raw {
    pub(crate) fn into_stream(
        self,
        permit: StreamPermit,
        lingering: mpsc::UnboundedSender<Box<Linger>>,
    ) -> Stream {
        Stream {
            inner: Some((self.0, permit)),
            chunk: None,
            slow_start: SlowStart::new(Instant::now()),
            lingering,
            shut: false,
            ended: false,
        }
    }

    /// A stream that is over the cap, to send the refusal on it.
    pub(crate) fn into_refusal(self) -> impl AsyncWrite + Unpin {
        use tokio_util::compat::FuturesAsyncWriteCompatExt as _;
        self.0.compat_write()
    }
}

/// One byte stream of a carrier.
///
/// An end of data (`Ok` with nothing read) does not prove that the peer finished: a stream that
/// was reset after this side had shut down its half reads the same. Where the end matters, signal
/// it in-band. A reset before that is an error of kind `ConnectionReset`.
///
/// Dropping it resets the stream; after `shutdown`, incoming data is first discarded for a short
/// while.
pub struct Stream {
    /// `None` only while dropping.
    inner: Option<(yamux::Stream, StreamPermit)>,
    /// A frame's payload, and how much of it was read.
    chunk: Option<(yamux::Packet, usize)>,
    slow_start: SlowStart,
    lingering: mpsc::UnboundedSender<Box<Linger>>,
    shut: bool,
    ended: bool,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let id = self
            .inner
            .as_ref()
            .map(|(stream, _)| stream.id().to_string());
        f.debug_struct("Stream")
            .field("id", &id)
            .finish_non_exhaustive()
    }
}

impl Stream {
    fn inner(&mut self) -> io::Result<Pin<&mut yamux::Stream>> {
        match &mut self.inner {
            Some((stream, _)) => Ok(Pin::new(stream)),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// yamux returns `WriteZero` for a stream or connection that is gone.
fn gone(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WriteZero => io::Error::new(io::ErrorKind::BrokenPipe, "stream was reset"),
        _ => error,
    }
}

impl Stream {
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<yamux::Packet>>> {
        let shut = self.shut;
        let mut inner = self.inner()?;
        let next = futures::Stream::poll_next(inner.as_mut(), cx);
        match ready!(next) {
            Some(Ok(chunk)) => return Poll::Ready(Ok(Some(chunk))),
            // A window update that can no longer be sent; what is buffered is read next time.
            Some(Err(error)) if error.kind() != io::ErrorKind::WriteZero => {
                return Poll::Ready(Err(error));
            }
            Some(Err(_)) | None => {}
        }
        // Both halves closed, and not by this side: reset, or the carrier is gone.
        if !shut && inner.is_closed() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        self.ended = true;
        Poll::Ready(Ok(None))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let waiting = ready!(self.as_mut().poll_fill_buf(cx))?;
        let n = waiting.len().min(buf.remaining());
        buf.put_slice(&waiting[..n]);
        self.consume(n);
        Poll::Ready(Ok(()))
    }
}

/// Frame by frame, as they came.
impl AsyncBufRead for Stream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        while this.chunk.is_none() {
            match ready!(this.poll_chunk(cx))? {
                // Nothing in it: an acknowledgement.
                Some(chunk) if chunk.as_ref().is_empty() => {}
                Some(chunk) => this.chunk = Some((chunk, 0)),
                None => break,
            }
        }
        let waiting = this.chunk.as_ref();
        Poll::Ready(Ok(
            waiting.map_or(&[], |(chunk, read)| &chunk.as_ref()[*read..])
        ))
    }

    fn consume(mut self: Pin<&mut Self>, n: usize) {
        if let Some((chunk, read)) = &mut self.chunk {
            *read += n;
            if *read >= chunk.as_ref().len() {
                self.chunk = None;
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let now = Instant::now();
        self.slow_start.before_send(now);
        let n = buf.len().min(self.slow_start.limit(FRAME));
        let n = ready!(futures::AsyncWrite::poll_write(
            self.inner()?,
            cx,
            &buf[..n]
        ))
        .map_err(gone)?;
        self.slow_start.on_sent(now, n);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        futures::AsyncWrite::poll_flush(self.inner()?, cx).map_err(gone)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.shut {
            return Poll::Ready(Ok(()));
        }
        let result = ready!(futures::AsyncWrite::poll_close(self.inner()?, cx));
        self.shut = true;
        Poll::Ready(result.map_err(gone))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let Some((stream, permit)) = self.inner.take() else {
            return;
        };
        if self.shut && !self.ended && !stream.is_closed() {
            // Fails only when the driver is gone, and the stream with it.
            let _ = self.lingering.send(Box::new(Linger {
                stream,
                _permit: permit,
                left: LINGER_BYTES,
            }));
        }
    }
}

/// A dropped stream whose peer may still write. yamux would send it nothing, and a peer out of
/// window would wait without end.
pub(crate) struct Linger {
    stream: yamux::Stream,
    _permit: StreamPermit,
    left: usize,
}

impl Linger {
    /// Discards until the peer ends, writes too much or takes too long. Gives the number of the
    /// stream if it has to be reset.
    pub(crate) async fn run(mut self, deadline: Duration) -> Option<u32> {
        let ended = tokio::time::timeout(deadline, std::future::poll_fn(|cx| self.poll(cx)));
        match ended.await {
            Ok(true) => None,
            Ok(false) | Err(_) => self.stream.id().to_string().parse().ok(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let mut scratch = [0; 4096];
        loop {
            let stream = Pin::new(&mut self.stream);
            match ready!(futures::AsyncRead::poll_read(stream, cx, &mut scratch)) {
                Ok(0) | Err(_) => return Poll::Ready(true),
                Ok(n) => match self.left.checked_sub(n) {
                    Some(left) => self.left = left,
                    None => return Poll::Ready(false),
                },
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_configuration_passes_the_assertions_of_the_crate() {
        for max_streams in [0, 1, 1024, usize::MAX] {
            for window_growth in [0, 1, usize::MAX] {
                let config = Config {
                    max_streams,
                    max_incoming: max_streams,
                    window_growth,
                };
                let _ = config.yamux();
            }
        }
    }
}
