//! Reads more at once than it was asked for.
//!
//! rustls asks its socket for 4 KiB at a time, so that a record of 16 KiB costs five system calls.
//! Between the two, this asks for `AHEAD` and hands out of it. What it reads into is given back
//! as soon as nothing waits in it: thousands of connections are idle.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

/// Bytes asked for at once: four records. Held only while some of them wait to be read.
const AHEAD: usize = 64 * 1024;

/// A byte stream that is read in large pieces. Writes pass.
#[derive(Debug)]
pub struct ReadAhead<T> {
    io: T,
    /// What of `waiting` was handed out.
    given: usize,
    waiting: Vec<u8>,
}

impl<T> ReadAhead<T> {
    /// Reads `io` through a buffer.
    pub fn new(io: T) -> Self {
        Self {
            io,
            given: 0,
            waiting: Vec::new(),
        }
    }

    /// What is read.
    pub fn get_ref(&self) -> &T {
        &self.io
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.given == this.waiting.len() {
            this.given = 0;
            this.waiting.clear();
            if buf.remaining() >= AHEAD {
                return Pin::new(&mut this.io).poll_read(cx, buf);
            }
            this.waiting.reserve(AHEAD);
            let read = poll_read_buf(Pin::new(&mut this.io), cx, &mut this.waiting);
            if this.waiting.is_empty() {
                this.waiting = Vec::new();
            }
            ready!(read)?;
        }
        let waiting = &this.waiting[this.given..];
        let n = waiting.len().min(buf.remaining());
        buf.put_slice(&waiting[..n]);
        this.given += n;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn what_is_read_ahead_is_handed_out_in_order_and_the_buffer_given_back() {
        let (near, mut far) = tokio::io::duplex(3 * AHEAD);
        let mut near = ReadAhead::new(near);
        let sent: Vec<u8> = (0..2 * AHEAD + 5).map(|n| (n % 251) as u8).collect();
        far.write_all(&sent).await.unwrap();
        let mut got = vec![0; sent.len()];
        for piece in got.chunks_mut(4096) {
            near.read_exact(piece).await.unwrap();
        }
        assert_eq!(got, sent);
        let idle = tokio::time::timeout(std::time::Duration::ZERO, near.read_u8()).await;
        assert!(idle.is_err());
        assert_eq!(near.waiting.capacity(), 0);
        drop(far);
        assert_eq!(near.read(&mut got).await.unwrap(), 0);
    }
}
