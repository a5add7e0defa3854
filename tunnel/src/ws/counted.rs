//! Counts what passes, and stops a message that never ends.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// More bytes came in than the longest message has, and no message was complete: fragments
/// without end, which tungstenite would gather for as long as they are small enough.
#[derive(Debug, thiserror::Error)]
#[error("bytes of an unfinished message without end")]
pub(super) struct Flood;

pub(super) struct Counted<T> {
    io: T,
    received: u64,
    written: u64,
    since_message: usize,
    limit: usize,
}

impl<T> Counted<T> {
    pub(super) fn new(io: T, limit: usize) -> Self {
        Self {
            io,
            received: 0,
            written: 0,
            since_message: 0,
            limit,
        }
    }

    pub(super) fn received(&self) -> u64 {
        self.received
    }

    pub(super) fn written(&self) -> u64 {
        self.written
    }

    pub(super) fn message_complete(&mut self) {
        self.since_message = 0;
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Counted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.since_message > self.limit {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, Flood)));
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        let n = buf.filled().len() - before;
        self.received += n as u64;
        self.since_message += n;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Counted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.written += n as u64;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
