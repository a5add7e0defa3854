//! Puts a request target that is too long for [`http::Uri`] into the request line of a client.
//!
//! hyper writes the head with a placeholder, and the line is replaced on its way out.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::target::Target;

/// What stands in the request line until the target takes its place.
pub const PLACEHOLDER: &str = "/";

/// Longest line that is replaced: method, placeholder and version.
const LINE: usize = 256;

/// A connection whose first request may have a long target.
pub struct RequestLine<IO> {
    io: IO,
    slot: LongTarget,
    state: State,
}

/// Where the target is left before the request is sent.
#[derive(Clone, Default)]
pub struct LongTarget(Arc<OnceLock<Target>>);

impl LongTarget {
    /// Of the first request on the connection; has no effect once that has begun.
    pub fn set(&self, target: Target) {
        let _ = self.0.set(target);
    }
}

enum State {
    /// Collects the line.
    Line(BytesMut),
    /// Sends what was put together.
    Sending(Bytes),
    Passing,
}

impl<IO> RequestLine<IO> {
    /// Wraps a client's connection, with the handle that sets its long target.
    pub fn new(io: IO) -> (Self, LongTarget) {
        let slot = LongTarget::default();
        let line = Self {
            io,
            slot: slot.clone(),
            state: State::Line(BytesMut::new()),
        };
        (line, slot)
    }
}

impl<IO: AsyncWrite + Unpin> RequestLine<IO> {
    /// Ready when nothing of ours waits before the next byte.
    fn poll_sent(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let State::Sending(waiting) = &mut self.state {
            if waiting.is_empty() {
                self.state = State::Passing;
                break;
            }
            let sent = ready!(Pin::new(&mut self.io).poll_write(cx, waiting))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            waiting.advance(sent);
        }
        Poll::Ready(Ok(()))
    }

    /// Takes bytes of the line, with what follows it in the same piece.
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let State::Line(line) = &mut self.state else {
            return Ok(());
        };
        line.extend_from_slice(bytes);
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
            return if line.len() > LINE {
                Err(io::Error::other("a request line does not end"))
            } else {
                Ok(())
            };
        };
        let Some(target) = self.slot.0.get() else {
            let waiting = std::mem::take(line).freeze();
            self.state = State::Sending(waiting);
            return Ok(());
        };
        let mut parts = line[..end].splitn(3, |byte| *byte == b' ');
        let (Some(method), Some(_), Some(version)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(io::Error::other("a request line has no target"));
        };
        let target = target.as_str().as_bytes();
        let mut out = BytesMut::with_capacity(target.len() + line.len() + 2);
        out.extend_from_slice(method);
        out.extend_from_slice(b" ");
        out.extend_from_slice(target);
        out.extend_from_slice(b" ");
        out.extend_from_slice(version);
        out.extend_from_slice(&line[end..]);
        self.state = State::Sending(out.freeze());
        Ok(())
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for RequestLine<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let State::Line(line) = &self.state {
            if line.is_empty() && self.slot.0.get().is_none() {
                self.state = State::Passing;
            } else {
                self.take(bytes)?;
                return Poll::Ready(Ok(bytes.len()));
            }
        }
        ready!(self.poll_sent(cx))?;
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sent(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_sent(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if matches!(self.state, State::Passing) {
            return Pin::new(&mut self.io).poll_write_vectored(cx, slices);
        }
        let first = slices.iter().find(|slice| !slice.is_empty());
        self.poll_write(cx, first.map_or(&[], |slice| slice))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for RequestLine<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buffer)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn sent(target: Option<&Target>, pieces: &[&[u8]]) -> String {
        let (near, mut far) = tokio::io::duplex(1000);
        let (mut line, slot) = RequestLine::new(near);
        if let Some(target) = target {
            slot.set(target.clone());
        }
        let write = async move {
            for piece in pieces {
                line.write_all(piece).await.unwrap();
            }
            line.shutdown().await.unwrap();
        };
        let mut all = String::new();
        let ((), read) = tokio::join!(write, far.read_to_string(&mut all));
        read.unwrap();
        all
    }

    #[tokio::test]
    async fn the_first_line_gets_its_target_however_it_is_written() {
        let long = format!("/x?{}", "a".repeat(200_000));
        let target = Target::read(long.as_bytes(), 0).unwrap();
        let head: &[u8] = b"POST / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\n";
        let expected = format!("POST {long} HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\n");
        assert!(sent(Some(&target), &[head]).await == expected);
        let bytes: Vec<&[u8]> = head.chunks(1).collect();
        assert!(sent(Some(&target), &bytes).await == expected);
        assert_eq!(sent(None, &bytes).await.as_bytes(), head);
    }

    #[tokio::test]
    async fn what_is_no_request_line_is_an_error() {
        let (near, _far) = tokio::io::duplex(1000);
        let (mut line, slot) = RequestLine::new(near);
        slot.set(Target::read(b"/x", 0).unwrap());
        assert!(line.write_all(&[b'a'; 1000]).await.is_err());
    }
}
