//! Reads ahead from the API server while the user's side reads little or nothing.
//!
//! A command that has ended leaves its last output in the sockets between container runtime, kubelet,
//! API server and agent. When any of them receives a byte, such as kubectl's ping, a reset discards that
//! output. So while a line is without its stream, or its reader is slow, the agent reads into a bounded
//! buffer: at most [`Limits::stream`] bytes a stream and [`Limits::all`] in the process. Beyond that it
//! stops reading, as it would without the buffer.
//!
//! A reader that keeps up costs nothing: its bytes are never in the buffer.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::sleep;

/// Bytes of one piece of the buffer, and of one read.
const PIECE: usize = 32 * 1024;
/// The user's side is behind for so long before the agent reads ahead.
const PATIENCE: Duration = Duration::from_millis(250);
/// A reader that takes this much in that time (8 MB/s) is not slow, only slower than the API server.
const QUICK: usize = 2 * 1024 * 1024;

/// Knobs of reading ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes held of one stream. Default 8 MiB: what fits into the sockets on its path with the defaults of
    /// Linux.
    pub stream: usize,
    /// Bytes held of all streams. Default 64 MiB.
    pub all: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            stream: 8 * 1024 * 1024,
            all: 64 * 1024 * 1024,
        }
    }
}

/// What all streams of a process share. Clones are the same.
#[derive(Clone)]
pub(crate) struct ReadAheadBudget(Arc<Shared>);

struct Shared {
    limits: Limits,
    used: AtomicUsize,
    gauge: prometheus::IntGauge,
}

impl ReadAheadBudget {
    pub(crate) fn new(limits: Limits, gauge: prometheus::IntGauge) -> Self {
        let used = AtomicUsize::new(0);
        Self(Arc::new(Shared {
            limits,
            used,
            gauge,
        }))
    }

    fn take(&self) -> bool {
        let fits = |used: usize| Some(used + PIECE).filter(|sum| *sum <= self.0.limits.all);
        let order = Ordering::Relaxed;
        let taken = self.0.used.fetch_update(order, order, fits).is_ok();
        if taken {
            self.0.gauge.add(PIECE as i64);
        }
        taken
    }

    fn give_back(&self, pieces: usize) {
        let bytes = pieces * PIECE;
        self.0.used.fetch_sub(bytes, Ordering::Relaxed);
        self.0.gauge.sub(bytes as i64);
    }
}

/// The stream from the API server, as the splice reads and writes it.
pub(crate) struct Server<R, W> {
    core: Arc<Mutex<Core<R>>>,
    writer: W,
}

/// Reads ahead; polled in the same task as the splice. Never ends.
pub(crate) struct Pump<R> {
    core: Arc<Mutex<Core<R>>>,
    slow_reader: Arc<Notify>,
}

/// Wakes the pump when the user's side has not taken a write.
#[derive(Clone, Default)]
pub(crate) struct SlowReader(Arc<Notify>);

struct Core<R> {
    reader: R,
    /// Each of [`PIECE`] bytes of capacity, filled from the front; `start` bytes of the first are gone.
    pieces: VecDeque<Vec<u8>>,
    start: usize,
    /// After what is held.
    end: Option<io::Result<()>>,
    /// Not caught up since the user's side took nothing.
    is_behind: bool,
    /// Bytes that the user's side took since then.
    taken: usize,
    /// The pump, which waits for space.
    waiting: Option<Waker>,
    budget: ReadAheadBudget,
}

/// The stream as the splice uses it, the pump, and the signal that wakes it.
type Split<S> = (
    Server<ReadHalf<S>, WriteHalf<S>>,
    Pump<ReadHalf<S>>,
    SlowReader,
);

/// Splits the stream from the API server; what is read ahead counts in `budget`.
pub(crate) fn split<S: AsyncRead + AsyncWrite>(server: S, budget: &ReadAheadBudget) -> Split<S> {
    let (reader, writer) = tokio::io::split(server);
    let core = Arc::new(Mutex::new(Core {
        reader,
        pieces: VecDeque::new(),
        start: 0,
        end: None,
        is_behind: false,
        taken: 0,
        waiting: None,
        budget: budget.clone(),
    }));
    let slow_reader = Arc::new(Notify::new());
    let pump = Pump {
        core: core.clone(),
        slow_reader: slow_reader.clone(),
    };
    (Server { core, writer }, pump, SlowReader(slow_reader))
}

impl SlowReader {
    pub(crate) fn notify(&self) {
        self.0.notify_one();
    }
}

impl<R: AsyncRead + Unpin> Pump<R> {
    pub(crate) async fn run(self) -> Infallible {
        loop {
            self.slow_reader.notified().await;
            lock(&self.core).begin();
            while self.is_quick_after(PATIENCE).await {}
            // At once where the user's side has caught up meanwhile.
            poll_fn(|cx| lock(&self.core).read_on(cx)).await;
        }
    }

    /// Whether the user's side, still behind then, took much in that time.
    async fn is_quick_after(&self, time: Duration) -> bool {
        sleep(time).await;
        let mut core = lock(&self.core);
        let taken = std::mem::take(&mut core.taken);
        core.is_behind && taken >= QUICK
    }
}

impl<R: AsyncRead + Unpin> Core<R> {
    fn begin(&mut self) {
        if !self.is_behind {
            self.is_behind = true;
            self.taken = 0;
        }
    }

    /// Ready when the user's side has caught up, or there is no more to read.
    fn read_on(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if !self.is_behind || self.end.is_some() {
                return Poll::Ready(());
            }
            let has_space = self.pieces.back().is_some_and(|piece| piece.len() < PIECE);
            if !has_space {
                // Bounded for the stream and for all streams: with either used up, back-pressure
                // reaches the API server.
                let limit = self.budget.0.limits.stream / PIECE;
                if self.pieces.len() >= limit || !self.budget.take() {
                    self.waiting = Some(cx.waker().clone());
                    return Poll::Pending;
                }
                self.pieces.push_back(Vec::with_capacity(PIECE));
            }
            let Some(piece) = self.pieces.back_mut() else {
                return Poll::Ready(());
            };
            let filled = piece.len();
            piece.resize(PIECE, 0);
            let mut space = ReadBuf::new(&mut piece[filled..]);
            let read = Pin::new(&mut self.reader).poll_read(cx, &mut space);
            let more = space.filled().len();
            piece.truncate(filled + more);
            if piece.is_empty() {
                // Budget is taken only for pieces that hold bytes.
                self.pieces.pop_back();
                self.budget.give_back(1);
            }
            match ready!(read) {
                Ok(()) if more == 0 => self.end = Some(Ok(())),
                Ok(()) => {}
                Err(error) => self.end = Some(Err(error)),
            }
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0
            && let Some(piece) = self.pieces.front()
        {
            let waits = &piece[self.start..];
            let step = waits.len().min(buf.remaining());
            buf.put_slice(&waits[..step]);
            self.start += step;
            if self.start == piece.len() {
                self.pieces.pop_front();
                self.start = 0;
                self.budget.give_back(1);
            }
        }
        let read = match buf.filled().len() - before {
            0 => match self.end.take() {
                Some(end) => {
                    // Asked again, it is still the end.
                    self.end = Some(Ok(()));
                    Poll::Ready(end)
                }
                // Nothing is held: directly into the caller's buffer, without a copy.
                None => Pin::new(&mut self.reader).poll_read(cx, buf),
            },
            _ => Poll::Ready(Ok(())),
        };
        let half = self.budget.0.limits.stream / PIECE / 2;
        match &read {
            // Nothing is held, and nothing more is there.
            Poll::Pending => self.is_behind = false,
            Poll::Ready(_) => self.taken += buf.filled().len() - before,
        }
        // Only from half on: a wake-up for each piece would alternate two tasks.
        if (!self.is_behind || self.pieces.len() <= half)
            && let Some(pump) = self.waiting.take()
        {
            pump.wake();
        }
        read
    }
}

impl<R> Drop for Core<R> {
    fn drop(&mut self) {
        self.budget.give_back(self.pieces.len());
    }
}

impl<R: AsyncRead + Unpin, W: Unpin> AsyncRead for Server<R, W> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        lock(&self.core).poll_read(cx, buf)
    }
}

impl<R: Unpin, W: AsyncWrite + Unpin> AsyncWrite for Server<R, W> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

fn lock<R>(core: &Mutex<Core<R>>) -> MutexGuard<'_, Core<R>> {
    // A panic under it is one of the reader's, whose stream then ends.
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
    use tokio::task::JoinHandle;

    use super::*;

    fn budget(stream: usize, all: usize) -> ReadAheadBudget {
        let gauge = prometheus::IntGauge::new("held", "held").unwrap();
        ReadAheadBudget::new(Limits { stream, all }, gauge)
    }

    type Half = tokio::io::ReadHalf<tokio::io::DuplexStream>;
    type Near = Server<Half, tokio::io::WriteHalf<tokio::io::DuplexStream>>;

    /// A stream through a socket of 1 KiB; the pump runs.
    fn stream(
        budget: &ReadAheadBudget,
    ) -> (
        Near,
        tokio::io::DuplexStream,
        SlowReader,
        JoinHandle<Infallible>,
    ) {
        let (near, far) = duplex(1024);
        let (server, pump, slow_reader) = split(near, budget);
        (server, far, slow_reader, tokio::spawn(pump.run()))
    }

    async fn settle() {
        sleep(PATIENCE * 2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_before_the_end_is_taken_though_nobody_reads() {
        let budget = budget(256 * 1024, 1024 * 1024);
        let (mut server, mut far, slow_reader, pump) = stream(&budget);
        slow_reader.notify();
        // The command ends with 100 KB in the way, and its side is closed.
        let said: Vec<u8> = (0..100_000_u32).map(|n| n as u8).collect();
        let telling = tokio::spawn({
            let said = said.clone();
            async move {
                far.write_all(&said).await.unwrap();
                drop(far);
            }
        });
        settle().await;
        assert!(telling.is_finished(), "it is stuck in the socket");
        assert!(budget.0.used.load(Ordering::Relaxed) >= 100_000);
        let mut read = Vec::new();
        server.read_to_end(&mut read).await.unwrap();
        assert!(read == said, "other bytes");
        assert_eq!(
            server.read(&mut [0; 8]).await.unwrap(),
            0,
            "the end stays the end"
        );
        assert_eq!(budget.0.used.load(Ordering::Relaxed), 0);
        pump.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn one_stream_and_all_of_them_are_bounded() {
        let budget = budget(4 * PIECE, 6 * PIECE);
        let mut streams = Vec::new();
        for _ in 0..3 {
            let (server, mut far, slow_reader, pump) = stream(&budget);
            slow_reader.notify();
            let flood =
                tokio::spawn(async move { while far.write_all(&[7; 512]).await.is_ok() {} });
            streams.push((server, flood, pump));
            settle().await;
            let used = budget.0.used.load(Ordering::Relaxed);
            assert_eq!(used, (4 * streams.len()).min(6) * PIECE);
        }
        // What one releases is available to another, and what has ended holds nothing.
        let mut bytes = vec![0; 3 * PIECE];
        streams[0].0.read_exact(&mut bytes).await.unwrap();
        settle().await;
        assert_eq!(budget.0.used.load(Ordering::Relaxed), 6 * PIECE);
        for (server, flood, pump) in streams {
            flood.abort();
            pump.abort();
            let _ = (flood.await, pump.await);
            drop(server);
        }
        assert_eq!(budget.0.used.load(Ordering::Relaxed), 0);
        assert_eq!(budget.0.gauge.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_keeps_up_has_nothing_in_the_buffer() {
        let budget = budget(256 * 1024, 1024 * 1024);
        let (mut server, mut far, slow_reader, pump) = stream(&budget);
        let mut byte = [0; 1];
        for _ in 0..10 {
            slow_reader.notify();
            far.write_all(b"x").await.unwrap();
            server.read_exact(&mut byte).await.unwrap();
            // Looked, and there was no more.
            let nothing = tokio::time::timeout(Duration::from_millis(1), server.read(&mut byte));
            assert!(nothing.await.is_err());
            settle().await;
            assert_eq!(budget.0.used.load(Ordering::Relaxed), 0);
        }
        pump.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_is_delivered_after_what_was_read_before_it() {
        struct Broken(u8);
        impl AsyncRead for Broken {
            fn poll_read(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
                buf: &mut ReadBuf<'_>,
            ) -> Poll<io::Result<()>> {
                self.0 += 1;
                match self.0 {
                    1 => buf.put_slice(b"last words"),
                    _ => return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                }
                Poll::Ready(Ok(()))
            }
        }
        let budget = budget(256 * 1024, 1024 * 1024);
        let (mut server, pump, slow_reader) =
            split(tokio::io::join(Broken(0), tokio::io::sink()), &budget);
        let pump = tokio::spawn(pump.run());
        slow_reader.notify();
        settle().await;
        let mut read = Vec::new();
        let error = server.read_to_end(&mut read).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(read, b"last words");
        pump.abort();
    }
}
