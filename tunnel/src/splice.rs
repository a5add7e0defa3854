//! Copies bytes between two streams until both are done.
//!
//! One task, one bounded buffer a direction, back-pressure by not reading. An end on one side
//! half-closes the other; an error on one side delivers what was read before it and drops both. A
//! side that takes no more is still read to its end: a server that has closed may have sent more than
//! was passed on when the first write to it failed.
//! It counts bytes and inspects none.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::budget::Grant;

pub use crate::budget::Budget;

/// Knobs of a splice.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes held a direction at most. Default 64 KiB. Cost: twice this while bulk moves; 2 KiB for
    /// data that arrives in pieces smaller than that.
    pub buffer: usize,
    /// From the first error until both sides are dropped, at most. Default 5 s.
    pub drain: Duration,
    /// From the end of one direction until both sides are dropped, at most, if the other
    /// direction moves no bytes. Default none: half-closed streams are used as such.
    pub half_closed: Option<Duration>,
    /// Buffers are given back after this long without a byte. Default 5 s.
    pub release_after: Duration,
    /// What buffers are taken from. While one of these is used up, a direction makes do with 2 KiB
    /// at a time: slower, but never stopped by what others hold. Default none.
    pub budgets: Vec<Budget>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            buffer: 64 * 1024,
            drain: Duration::from_secs(5),
            half_closed: None,
            release_after: Duration::from_secs(5),
            budgets: Vec::new(),
        }
    }
}

/// Bytes passed so far, readable while the splice runs.
#[derive(Debug, Default)]
pub struct Meter {
    /// From the first side to the second.
    pub a_to_b: AtomicU64,
    /// From the second side to the first.
    pub b_to_a: AtomicU64,
}

/// How one direction ended.
#[derive(Debug)]
pub enum End {
    /// The reader's end of data was passed on.
    Clean,
    /// The side read from failed.
    ReadFailed(io::Error),
    /// The side written to failed.
    WriteFailed(io::Error),
    /// Stopped because the other direction failed, or a deadline passed.
    Cut,
}

impl End {
    /// Whether the reader's end of data was passed on.
    pub fn is_clean(&self) -> bool {
        matches!(self, Self::Clean)
    }
}

/// What became of one direction.
#[derive(Debug)]
pub struct Direction {
    /// The bytes that were passed on.
    pub bytes: u64,
    /// How it ended.
    pub end: End,
}

/// What became of a splice.
#[derive(Debug)]
pub struct Outcome {
    /// From the first side to the second.
    pub a_to_b: Direction,
    /// From the second side to the first.
    pub b_to_a: Direction,
}

/// Reads this small need no buffer of their own; it is where an idle direction waits.
const PROBE: usize = 2048;

/// What one direction reads before it lets the other have a turn.
const TURN: usize = 16;

/// Splices `a` and `b`. Both are dropped at the end, which resets streams that have not ended.
pub async fn splice<A, B>(a: A, b: B, config: &Config, meter: &Meter) -> Outcome
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut splice = Splice {
        a,
        b,
        a_to_b: Half::new(config.buffer),
        b_to_a: Half::new(config.buffer),
        deadline: None,
        seen: 0,
        timer: None,
    };
    std::future::poll_fn(|cx| splice.poll(cx, config, meter)).await;
    let Splice { a_to_b, b_to_a, .. } = splice;
    Outcome {
        a_to_b: a_to_b.outcome(),
        b_to_a: b_to_a.outcome(),
    }
}

struct Splice<A, B> {
    a: A,
    b: B,
    a_to_b: Half,
    b_to_a: Half,
    /// Set once one direction has ended.
    deadline: Option<Instant>,
    /// Bytes of both directions when the timer was last looked at.
    seen: u64,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<A, B> Splice<A, B>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    fn poll(&mut self, cx: &mut Context<'_>, config: &Config, meter: &Meter) -> Poll<()> {
        let before = self.a_to_b.bytes + self.b_to_a.bytes;
        let forth = self
            .a_to_b
            .poll(cx, &mut self.a, &mut self.b, &meter.a_to_b, config);
        let back = self
            .b_to_a
            .poll(cx, &mut self.b, &mut self.a, &meter.b_to_a, config);
        if forth.is_ready() && back.is_ready() {
            return Poll::Ready(());
        }
        let moved = self.a_to_b.bytes + self.b_to_a.bytes != before;
        if self.a_to_b.has_failed() || self.b_to_a.has_failed() {
            // An error fixes the deadline: bytes that still move do not extend it, or a slow reader
            // would hold both streams open.
            let latest = Instant::now() + config.drain;
            let deadline = *self.deadline.get_or_insert(latest);
            self.deadline = Some(deadline.min(latest));
            // A direction that waits for a failed side never becomes ready; what counts is that
            // neither has anything left to deliver.
            if self.a_to_b.is_over(&self.b_to_a) && self.b_to_a.is_over(&self.a_to_b) {
                return Poll::Ready(());
            }
        } else if (forth.is_ready() || back.is_ready())
            && let Some(wait) = config.half_closed
            && (moved || self.deadline.is_none())
        {
            // Half-closed is a limit on idleness: each byte of the open direction restarts it.
            self.deadline = Some(Instant::now() + wait);
        }
        self.poll_timer(cx, config)
    }

    /// Ends the splice at its deadline, and gives buffers back when nothing moves.
    fn poll_timer(&mut self, cx: &mut Context<'_>, config: &Config) -> Poll<()> {
        loop {
            // A splice that is idle and holds no buffer has no timer: most streams of a carrier are
            // idle.
            let holds = self.a_to_b.buf.capacity() + self.b_to_a.buf.capacity() > 0;
            let timer = match (&mut self.timer, self.deadline) {
                // Set for the release of buffers, before there was a deadline.
                (Some(timer), Some(deadline)) if timer.deadline() > deadline => {
                    timer.as_mut().reset(deadline);
                    timer
                }
                (Some(timer), _) => timer,
                (None, None) if !holds => return Poll::Pending,
                (None, deadline) => {
                    let release = Instant::now() + config.release_after;
                    let at = deadline.map_or(release, |deadline| deadline.min(release));
                    self.timer.insert(Box::pin(tokio::time::sleep_until(at)))
                }
            };
            ready!(timer.as_mut().poll(cx));
            if self
                .deadline
                .is_some_and(|deadline| deadline <= Instant::now())
            {
                return Poll::Ready(());
            }
            let bytes = self.a_to_b.bytes + self.b_to_a.bytes;
            // Only after a whole period without a byte, so that a stream in use does not allocate
            // again and again.
            if bytes == self.seen {
                self.a_to_b.release();
                self.b_to_a.release();
            }
            self.seen = bytes;
            self.timer = None;
        }
    }
}

/// One direction.
struct Half {
    /// Empty capacity while idle, else `size` bytes, or `PROBE` for small reads or a budget used up.
    buf: Vec<u8>,
    size: usize,
    granted: Vec<Grant>,
    /// Bytes `start..end` of `buf` were read and not yet written.
    start: usize,
    end: usize,
    unflushed: bool,
    /// The reader has no more, and why.
    read_end: Option<Result<(), io::Error>>,
    write_error: Option<io::Error>,
    done: bool,
    bytes: u64,
}

impl Half {
    fn new(size: usize) -> Self {
        Self {
            buf: Vec::new(),
            size: size.max(PROBE),
            granted: Vec::new(),
            start: 0,
            end: 0,
            unflushed: false,
            read_end: None,
            write_error: None,
            done: false,
            bytes: 0,
        }
    }

    /// Ready when this direction has ended, well or not.
    fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        meter: &AtomicU64,
        config: &Config,
    ) -> Poll<()>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        if self.done || self.write_error.is_some() {
            return Poll::Ready(());
        }
        match ready!(self.copy(cx, reader, writer, meter, config)) {
            Ok(()) => self.done = true,
            Err(error) => self.write_error = Some(error),
        }
        Poll::Ready(())
    }

    fn copy<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        meter: &AtomicU64,
        config: &Config,
    ) -> Poll<io::Result<()>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut turns = 0;
        loop {
            let mut moved = false;
            // Reads on while the writer is stuck, as long as there is space: that is how an error
            // of the reader is noticed.
            if self.read_end.is_none() && self.has_space(&config.budgets) {
                if turns == TURN {
                    // A fast reader must not starve the other direction.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                turns += 1;
                moved |= self.poll_fill(cx, reader, &config.budgets).is_ready();
            }
            if !self.is_empty() {
                let chunk = &self.buf[self.start..self.end];
                if let Poll::Ready(written) = Pin::new(&mut *writer).poll_write(cx, chunk) {
                    let n = written?;
                    if n == 0 {
                        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                    }
                    self.start += n;
                    self.bytes += n as u64;
                    meter.fetch_add(n as u64, Ordering::Relaxed);
                    self.unflushed = true;
                    moved = true;
                }
            }
            if moved {
                continue;
            }
            // The writer has registered the waker; neither a flush nor the end of data may overtake
            // these bytes.
            if !self.is_empty() {
                return Poll::Pending;
            }
            // Flushed only when nothing more is there, so that bulk is not cut into small frames.
            if self.unflushed {
                ready!(Pin::new(&mut *writer).poll_flush(cx))?;
                self.unflushed = false;
            }
            return match &self.read_end {
                None => Poll::Pending,
                Some(Ok(())) => Pin::new(writer).poll_shutdown(cx),
                // Not an end of data: the writer is dropped, not shut down.
                Some(Err(_)) => Poll::Ready(Ok(())),
            };
        }
    }

    /// Makes space by moving what waits to the front, if that is worth it, or to a larger buffer.
    fn has_space(&mut self, budgets: &[Budget]) -> bool {
        if self.is_empty() {
            (self.start, self.end) = (0, 0);
            // A small one: the next read may need more, or the budgets have it now.
            if self.buf.len() < self.size {
                self.buf = Vec::new();
            }
        } else if self.end == self.buf.len() && self.start >= self.buf.len() / 2 {
            // Only when half is free, so that copying costs at most as much as the bytes that were
            // written.
            self.buf.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        } else if self.end == self.buf.len() && self.buf.len() < self.size {
            // The writer does not keep up with many small reads.
            if let Some(granted) = self.take(budgets) {
                self.granted = granted;
                self.buf.resize(self.size, 0);
            }
        }
        self.buf.is_empty() || self.end < self.buf.len()
    }

    fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        budgets: &[Budget],
    ) -> Poll<()> {
        let before = self.end;
        let result = if self.buf.is_empty() {
            // Onto the stack, so that a direction that waits holds no heap memory.
            let mut probe = [0; PROBE];
            let mut space = ReadBuf::new(&mut probe);
            let result = ready!(Pin::new(reader).poll_read(cx, &mut space));
            self.end = space.filled().len();
            if self.end > 0 {
                // A probe that is filled suggests bulk behind it.
                self.allocate(budgets, self.end == PROBE);
                self.buf[..self.end].copy_from_slice(space.filled());
            }
            result
        } else {
            let mut space = ReadBuf::new(&mut self.buf[self.end..]);
            let result = ready!(Pin::new(reader).poll_read(cx, &mut space));
            self.end += space.filled().len();
            result
        };
        match result {
            Ok(()) if self.end == before => self.read_end = Some(Ok(())),
            Ok(()) => {}
            Err(error) => self.read_end = Some(Err(error)),
        }
        Poll::Ready(())
    }

    /// Room for what was just read, and where there is more behind it for as much as the budgets
    /// allow. A keystroke needs no large buffer, and the allocator would keep its pages.
    fn allocate(&mut self, budgets: &[Budget], is_more: bool) {
        let granted = is_more.then(|| self.take(budgets)).flatten();
        let size = if granted.is_some() { self.size } else { PROBE };
        self.granted = granted.unwrap_or_default();
        self.buf = vec![0; size];
    }

    /// What a large buffer takes of each budget, if all of them have it.
    fn take(&self, budgets: &[Budget]) -> Option<Vec<Grant>> {
        let bytes = self.size as u64;
        budgets.iter().map(|from| from.take(bytes)).collect()
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn has_failed(&self) -> bool {
        self.write_error.is_some() || matches!(self.read_end, Some(Err(_)))
    }

    /// Something has failed, and this direction has nothing more to deliver: not what was read,
    /// nor what still can be. Nothing new is awaited for a side that has sent its end.
    fn is_over(&self, other: &Self) -> bool {
        let awaits_nothing = self.read_end.is_some()
            || self.write_error.is_some()
            || matches!(other.read_end, Some(Err(_)));
        awaits_nothing && self.is_drained()
    }

    /// Nothing that was read waits to be delivered.
    fn is_drained(&self) -> bool {
        self.done || self.write_error.is_some() || (self.is_empty() && !self.unflushed)
    }

    fn release(&mut self) {
        if self.is_empty() {
            self.buf = Vec::new();
            self.granted.clear();
        }
    }

    fn outcome(self) -> Direction {
        let end = match (self.write_error, self.read_end) {
            (Some(error), _) => End::WriteFailed(error),
            (None, Some(Err(error))) => End::ReadFailed(error),
            (None, Some(Ok(()))) if self.done => End::Clean,
            _ => End::Cut,
        };
        Direction {
            bytes: self.bytes,
            end,
        }
    }
}
