//! The stream below a line: polls it, and moves bytes between it and the state machine.
//!
//! This is the line's driver: the one place that reads the clock, for what is passed the time.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::task::waker_ref;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;
use tokio_util::io::poll_read_buf;

use crate::proto::line::SEALED_CHUNK;
use crate::proto::line::machine::Read;

use super::error::lost;
use super::state::{Core, Shared};
use super::{Line, LineError};

/// Bytes asked of the stream at once.
const READ_SIZE: usize = SEALED_CHUNK;

impl<S: AsyncRead + AsyncWrite + Unpin> Core<S> {
    // ---- to and from the stream

    /// Hands down what waits. The caller has registered its waker. Without a stream, frames are only
    /// kept for the next one.
    pub(super) fn poll_drain(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        loop {
            let Some(chunk) = self.machine.chunk() else {
                return Poll::Ready(Ok(()));
            };
            let Some(stream) = &mut self.stream else {
                return Poll::Ready(Ok(()));
            };
            match ready!(Pin::new(stream).poll_write(cx, chunk)) {
                Ok(0) => return Poll::Ready(self.on_stream_lost(shared, LineError::Cut)),
                Ok(n) => self.machine.on_written(n),
                Err(error) => return Poll::Ready(self.on_stream_lost(shared, lost(error))),
            }
        }
    }

    /// Hands down as much as goes without waiting. The reader and the writer get an error of it by
    /// their next poll.
    pub(super) fn try_drain(&mut self, shared: &Shared<S>) {
        let _ = self.poll_drain(shared);
    }

    /// Reads from the stream into the machine's input. Pending also while there is no stream.
    pub(super) fn poll_fill(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        if let Some(failed) = self.lifecycle.failure() {
            return Poll::Ready(Err(failed.clone()));
        }
        let Some(stream) = &mut self.stream else {
            return Poll::Pending;
        };
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        let input = self.machine.input();
        input.reserve(READ_SIZE);
        let error = match ready!(poll_read_buf(Pin::new(stream), cx, input)) {
            // The peer has closed the stream, as agreed.
            Ok(0) if self.machine.is_delivered() && self.machine.has_received_fin() => {
                self.stream = None;
                self.end(shared);
                return Poll::Pending;
            }
            Ok(0) => LineError::Cut,
            Ok(n) => {
                self.machine.on_input(n);
                return Poll::Ready(Ok(()));
            }
            Err(error) => lost(error),
        };
        match self.on_stream_lost(shared, error) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// Reads what a stream that takes no more writes still has to give: the peer need not send it
    /// again, or no longer can. At most a window.
    pub(super) fn salvage_input(&mut self, shared: &Shared<S>) {
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        while let Some(stream) = &mut self.stream {
            let input = self.machine.input();
            input.reserve(READ_SIZE);
            let Poll::Ready(Ok(n @ 1..)) = poll_read_buf(Pin::new(stream), cx, input) else {
                return;
            };
            self.machine.on_input(n);
            while let Ok(true) = self.machine.process_input() {}
            if self.machine.ended().is_some() {
                return;
            }
        }
    }

    pub(super) fn poll_flush(&mut self, shared: &Shared<S>) -> Poll<io::Result<()>> {
        if let Some(failed) = self.lifecycle.failure() {
            return Poll::Ready(Err(failed.clone().into()));
        }
        ready!(self.poll_drain(shared))?;
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(Ok(()));
        };
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        match ready!(Pin::new(stream).poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(self.on_stream_lost(shared, lost(error)).map_err(Into::into)),
        }
    }

    // ---- flow control

    /// After frames were processed: applies what acknowledgements, reads and requests in them change.
    pub(super) fn on_progress(&mut self, shared: &Shared<S>) {
        let acked = self.machine.acked();
        // The clock is read only for an acknowledgement that is timed.
        if self.autotune.is_sampled(acked)
            && self
                .autotune
                .on_acknowledged(Instant::now().into_std(), acked)
        {
            self.grow_window(self.machine.window_growth());
        }
        if self.machine.unread() == 0 {
            self.memory.release_unread();
        }
        if self.memory.holds_unacked() {
            let unacked = self.unacked();
            self.memory.release_unacked(unacked);
        }
        // Only once window and budget both have room; woken earlier, the writer would poll in vain.
        if self.writer_waits && self.reserve_room() {
            self.writer_waits = false;
            shared.wakers.writer.wake();
        }
        if self.machine.is_move_requested() && !shared.phase.borrow().move_requested {
            shared.publish(self);
        }
    }

    fn unacked(&self) -> u64 {
        self.machine.sent() - self.machine.acked()
    }

    /// Grows the window, unless the budget for that is used up.
    fn grow_window(&mut self, by: u64) {
        if by > 0 && self.memory.grow_window(by) {
            self.machine.grow_window(by);
            self.autotune.on_grown(self.memory.window_growth());
        }
    }

    /// Whether window and memory budget have room for a write; takes what is needed of the latter.
    fn reserve_room(&mut self) -> bool {
        let unacked = self.unacked();
        self.machine.has_room() && self.memory.reserve_unacked(unacked)
    }

    /// For a writer without room: processes frames until an acknowledgement makes some.
    fn poll_room(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        loop {
            if self.reserve_room() {
                return Poll::Ready(Ok(()));
            }
            // The acknowledgement may be behind payload that is not read yet, which is buffered to
            // reach it.
            if !self.memory.reserve_unread(self.machine.unread()) {
                // Until the reader has taken some of it, and frames behind it.
                self.writer_waits = true;
                return Poll::Pending;
            }
            let processed = match self.machine.process_input() {
                Ok(processed) => processed,
                Err(ended) => {
                    self.on_violation(shared, ended)?;
                    continue;
                }
            };
            if processed {
                self.on_progress(shared);
                if self.machine.is_readable() {
                    shared.wakers.reader.wake();
                }
                continue;
            }
            // The peer can only acknowledge what has left.
            if let Poll::Ready(Err(error)) = self.poll_drain(shared) {
                return Poll::Ready(Err(error));
            }
            self.writer_waits = true;
            ready!(self.poll_fill(shared))?;
        }
    }

    // ---- for the reader and the writer

    fn poll_read(&mut self, shared: &Shared<S>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let read = self.machine.read(buf);
            self.on_progress(shared);
            match read {
                Ok(Read::Bytes(_) | Read::End) => {
                    // A reader may be the only one that drives this line.
                    if self.machine.has_frames() {
                        self.try_drain(shared);
                    }
                    self.try_close(shared);
                    return Poll::Ready(Ok(()));
                }
                Ok(Read::Empty) => {}
                Err(ended) => self.on_violation(shared, ended)?,
            }
            if self.machine.has_frames() {
                self.try_drain(shared);
            }
            self.machine.shrink_input();
            ready!(self.poll_fill(shared))?;
        }
    }

    fn poll_write(
        &mut self,
        shared: &Shared<S>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(failed) = self.lifecycle.failure() {
            return Poll::Ready(Err(failed.clone().into()));
        }
        if self.machine.has_sent_fin() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        // A full window shows that the window limits the throughput, not the writer.
        if !self.machine.has_room() {
            self.autotune.on_used();
        }
        if !self.reserve_room() {
            ready!(self.poll_room(shared))?;
        }
        // The frame is full: it is handed down first, so that a slow stream holds the writer back.
        if self.machine.is_corked() {
            ready!(self.poll_drain(shared))?;
        }
        let mut taken = 0;
        for buf in bufs {
            let n = self.machine.write(buf);
            taken += n;
            if n < buf.len() {
                break;
            }
        }
        self.on_appended();
        Poll::Ready(Ok(taken))
    }

    /// Lets the window follow what is written.
    fn on_appended(&mut self) {
        if self.machine.is_window_half_used() {
            self.autotune.on_used();
            if !self.memory.has_grown_window() {
                // After an idle time, what was useful before is taken at once.
                self.grow_window(self.autotune.proven());
            }
        }
        if self.autotune.wants_sample() {
            self.autotune
                .on_sent(Instant::now().into_std(), self.machine.sent());
        }
    }

    fn poll_shutdown(&mut self, shared: &Shared<S>) -> Poll<io::Result<()>> {
        if !self.machine.has_sent_fin() {
            if let Some(failed) = self.lifecycle.failure() {
                return Poll::Ready(Err(failed.clone().into()));
            }
            self.machine.finish();
        }
        if self.lifecycle.is_closed() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_flush(shared))?;
        self.try_close(shared);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Line<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let shared = &*self.shared;
        shared.wakers.reader.register(cx.waker());
        shared.lock().poll_read(shared, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Line<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        shared.lock().poll_write(shared, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        shared.lock().poll_flush(shared)
    }

    /// Sends FIN. The other direction stays open.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        shared.lock().poll_shutdown(shared)
    }
}
