//! The bound on interim answers (1xx), for a client on HTTP/2: h2 skips them without end, and hyper's
//! callback for them ([`crate::http1::interim`]) is HTTP/1.1's alone.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::frames::{DATA, END_STREAM, Frame, Frames, HEADERS, PREFACE, RST_STREAM, taken};
use super::open_streams::OpenStreams;
use crate::http1::interim::MOST;

/// HEADERS frames of one stream that go on, at most: interim answers, and the answer.
const HEADS: usize = MOST + 1;

/// Why a connection was ended.
#[derive(Debug, thiserror::Error)]
#[error("interim answers (1xx) without end")]
struct Endless;

/// Whether a connection was ended for that. Its streams only see that it was.
#[derive(Clone, Debug, Default)]
pub struct Exceeded(Arc<AtomicBool>);

impl Exceeded {
    /// Whether the limit was exceeded.
    #[must_use]
    pub fn is_true(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A client's end of an HTTP/2 connection. Reading fails when a stream has had more
/// than [`MOST`] interim answers: its server is broken or hostile, and would keep us busy for as long as
/// it likes. Holds a few bytes for each open stream.
#[derive(Debug)]
pub struct Bounded<IO> {
    io: IO,
    read: Frames,
    written: Frames,
    /// Of each open stream, the HEADERS frames that have arrived.
    heads: OpenStreams<usize>,
    exceeded: Exceeded,
}

impl<IO> Bounded<IO> {
    /// Counts interim answers on this connection.
    pub fn new(io: IO) -> Self {
        Self {
            io,
            read: Frames::default(),
            written: Frames::after(PREFACE),
            heads: OpenStreams::bounded(usize::MAX),
            exceeded: Exceeded::default(),
        }
    }

    /// A handle that shows whether the limit was exceeded.
    pub fn exceeded(&self) -> Exceeded {
        self.exceeded.clone()
    }

    fn heard(&mut self, bytes: &[u8]) -> Result<(), Endless> {
        let (heads, mut endless) = (&mut self.heads, false);
        self.read
            .pass(bytes, |frame| endless |= is_endless(heads, frame));
        if endless {
            self.exceeded.0.store(true, Ordering::Release);
            return Err(Endless);
        }
        Ok(())
    }

    fn said(&mut self, bytes: &[u8]) {
        let heads = &mut self.heads;
        self.written
            .pass(bytes, |frame| heads.client_sends(frame, 0));
    }
}

fn is_endless(heads: &mut OpenStreams<usize>, frame: Frame) -> bool {
    let ends = matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0;
    if ends || frame.kind == RST_STREAM {
        heads.remove(frame.stream);
        return false;
    }
    if frame.kind != HEADERS {
        return false;
    }
    // Frames of a stream that this side has reset do not count.
    let Some(heads) = heads.get_mut(frame.stream) else {
        return false;
    };
    *heads += 1;
    *heads > HEADS
}

impl<IO: AsyncRead + Unpin> AsyncRead for Bounded<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        let heard = this.heard(&buf.filled()[before..]);
        Poll::Ready(heard.map_err(|endless| io::Error::new(io::ErrorKind::InvalidData, endless)))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Bounded<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        self.said(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs))?;
        for part in taken(bufs, written) {
            self.said(part);
        }
        Poll::Ready(Ok(written))
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

    fn bytes(kind: u8, flags: u8, stream: u32) -> [u8; 9] {
        Frame {
            kind,
            flags,
            stream,
            length: 0,
        }
        .header()
    }

    /// It has sent its preface and opened these streams.
    fn client(streams: impl Iterator<Item = u32>) -> Bounded<tokio::io::Empty> {
        let mut client = Bounded::new(tokio::io::empty());
        client.said(&[b'P'; PREFACE]);
        for stream in streams {
            client.said(&bytes(HEADERS, 0, stream));
        }
        client
    }

    #[test]
    fn an_answer_with_as_many_as_it_may_and_trailers_passes() {
        let mut client = client([1, 3, 5].into_iter());
        for stream in [1, 3, 5] {
            for _ in 0..HEADS {
                client.heard(&bytes(HEADERS, 0, stream)).unwrap();
            }
            for _ in 0..1000 {
                client.heard(&bytes(DATA, 0, stream)).unwrap();
            }
            client.heard(&bytes(HEADERS, END_STREAM, stream)).unwrap();
        }
        assert!(client.heads.is_empty());
    }

    #[test]
    fn one_more_does_not_also_between_others() {
        let mut client = client((1..100).step_by(2));
        let answers = |client: &mut Bounded<_>, stream| client.heard(&bytes(HEADERS, 0, stream));
        for at in 0..HEADS {
            answers(&mut client, 1).unwrap();
            answers(&mut client, 3 + 2 * u32::try_from(at).unwrap()).unwrap();
        }
        assert!(!client.exceeded().is_true());
        answers(&mut client, 1).unwrap_err();
        assert!(client.exceeded().is_true());
    }

    #[test]
    fn what_has_ended_is_forgotten_whoever_ended_it() {
        let mut client = client(std::iter::empty());
        for stream in (1..20_000).step_by(2) {
            client.said(&bytes(HEADERS, 0, stream));
            client.heard(&bytes(HEADERS, 0, stream)).unwrap();
            match stream % 3 {
                0 => client.said(&bytes(RST_STREAM, 0, stream)),
                1 => client.heard(&bytes(RST_STREAM, 0, stream)).unwrap(),
                _ => client.heard(&bytes(DATA, END_STREAM, stream)).unwrap(),
            }
            // Late ones, of either end.
            client.said(&bytes(HEADERS, END_STREAM, stream));
            client.heard(&bytes(HEADERS, 0, stream)).unwrap();
        }
        assert!(client.heads.is_empty());
    }
}
