//! An answer to requests that the HTTP/2 library refuses before we see them, instead of a bare reset.
//!
//! h2 resets a stream whose target `http` cannot hold: longer than 64 KiB, a raw `<` or `>` in the path, a
//! raw `"` or `<` in the query, and whatever else breaks a rule of HTTP/2. Kubernetes' own server accepts
//! such targets. kubectl would show `stream error … PROTOCOL_ERROR`, and Go's client would use the
//! connection no more. So where the stream has no answer yet, RST_STREAM becomes a response without a body
//! (RFC 9113, section 8.1) and an RST_STREAM that is no error. The text is in `Warning`, which kubectl
//! prints: a body would count in flow-control windows of which h2 has the only account.
//!
//! What was refused, its target above all, is not known here: it is compressed, with a state that only h2 has.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use throwline_kube_wire::http2::frames::{
    END_HEADERS, END_STREAM, Frame, Frames, HEADER, HEADERS, PREFACE, RST_STREAM, taken,
};
use throwline_kube_wire::http2::open_streams::OpenStreams;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const RESET: usize = HEADER + 4;
const PROTOCOL_ERROR: u32 = 1;
/// Streams that wait for their answer, at most; h2 refuses those beyond its own, lower bound.
const WAITING: usize = 4096;

const TEXT: &str = "throwline proxy: this request cannot be read over HTTP/2; most likely its URL is longer than 64 KiB, \
    or has a < or > or quotation mark in it: percent-encode these, or use HTTP/1.1 (for kubectl: DISABLE_HTTP2=1)";

/// A server's end of an HTTP/2 connection. Where another protocol is spoken, it does nothing.
pub(crate) struct Rejecting<IO> {
    io: IO,
    http2: Option<Http2>,
}

struct Http2 {
    read: Frames,
    /// Streams with a request and no answer.
    waiting: OpenStreams<()>,
    written: Frames,
    /// The beginning of a frame that may be a reset, until it is known.
    held: BytesMut,
    /// What goes out before anything else.
    pending: Bytes,
    rejected: Box<dyn Fn() + Send>,
}

impl<IO> Rejecting<IO> {
    /// `rejected` is called with each request that is answered here; none where another protocol is spoken.
    pub(crate) fn new(io: IO, rejected: Option<Box<dyn Fn() + Send>>) -> Self {
        let http2 = rejected.map(|rejected| Http2 {
            read: Frames::after(PREFACE),
            waiting: OpenStreams::bounded(WAITING),
            written: Frames::default(),
            held: BytesMut::new(),
            pending: Bytes::new(),
            rejected,
        });
        Self { io, http2 }
    }
}

impl Http2 {
    fn heard(&mut self, bytes: &[u8]) {
        let waiting = &mut self.waiting;
        self.read
            .pass(bytes, |frame| waiting.client_sends(frame, ()));
    }

    /// These bytes have gone out, or will before all others.
    fn passed(&mut self, bytes: &[u8]) {
        let waiting = &mut self.waiting;
        self.written.pass(bytes, |frame| {
            if frame.kind == HEADERS {
                waiting.remove(frame.stream);
            }
        });
    }

    /// Takes what cannot be judged yet, and judges it when it can be. How much that was.
    fn hold(&mut self, bytes: &[u8]) -> usize {
        let whole = if self.held.len() < HEADER {
            HEADER
        } else {
            RESET
        };
        let step = (whole - self.held.len()).min(bytes.len());
        self.held.put_slice(&bytes[..step]);
        let Some(header) = self.held.first_chunk() else {
            return step;
        };
        let frame = Frame::read(header);
        if !is_reset(frame) {
            self.pending = self.held.split().freeze();
            self.passed(&self.pending.clone());
        } else if self.held.len() == RESET {
            let mut reset = self.held.split();
            let code = (&reset[HEADER..]).get_u32();
            if self.waiting.remove(frame.stream).is_some() && code == PROTOCOL_ERROR {
                (self.rejected)();
                // The client need not send the rest of its request.
                reset[HEADER..].fill(0);
                let mut both = answer(frame.stream);
                both.unsplit(reset);
                self.pending = both.freeze();
            } else {
                self.pending = reset.freeze();
            }
        }
        step
    }

    fn poll_pending<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.pending.has_remaining() {
            let written = ready!(Pin::new(&mut *io).poll_write(cx, &self.pending))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.pending.advance(written);
        }
        Poll::Ready(Ok(()))
    }
}

fn is_reset(frame: Frame) -> bool {
    frame.kind == RST_STREAM && HEADER + frame.length == RESET
}

/// 400 with the text, by fields that change nothing in the client's state of compression (RFC 7541).
fn answer(stream: u32) -> BytesMut {
    let mut fields = BytesMut::new();
    // `:status: 400` of the static table.
    fields.put_u8(0x80 | 12);
    // `cache-control`, `content-length`: names of the table, each 15 and what is above it.
    fields.put_slice(&[0x0f, 24 - 15]);
    put_text(&mut fields, "no-store");
    fields.put_slice(&[0x0f, 28 - 15]);
    put_text(&mut fields, "0");
    fields.put_u8(0);
    put_text(&mut fields, "warning");
    put_text(&mut fields, &format!("299 - \"{TEXT}\""));
    let frame = Frame {
        kind: HEADERS,
        flags: END_HEADERS | END_STREAM,
        stream,
        length: fields.len(),
    };
    let mut all = BytesMut::from(&frame.header()[..]);
    all.unsplit(fields);
    all
}

/// A string as it is, behind its length with a prefix of seven bits.
fn put_text(fields: &mut BytesMut, text: &str) {
    match text.len().checked_sub(127) {
        None => fields.put_u8(text.len() as u8),
        Some(mut rest) => {
            fields.put_u8(127);
            while rest >= 128 {
                fields.put_u8(0x80 | (rest % 128) as u8);
                rest /= 128;
            }
            fields.put_u8(rest as u8);
        }
    }
    fields.put_slice(text.as_bytes());
}

impl<IO: AsyncRead + Unpin> AsyncRead for Rejecting<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
        if let Some(http2) = &mut this.http2 {
            http2.heard(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Rejecting<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { io, http2 } = &mut *self;
        let Some(http2) = http2 else {
            return Pin::new(io).poll_write(cx, buf);
        };
        ready!(http2.poll_pending(io, cx))?;
        let most = match http2.held.is_empty() {
            true => http2.written.whole_before(buf, is_reset),
            false => 0,
        };
        if most == 0 && !buf.is_empty() {
            return Poll::Ready(Ok(http2.hold(buf)));
        }
        let written = ready!(Pin::new(io).poll_write(cx, &buf[..most]))?;
        http2.passed(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { io, http2 } = &mut *self;
        let Some(http2) = http2 else {
            return Pin::new(io).poll_write_vectored(cx, bufs);
        };
        ready!(http2.poll_pending(io, cx))?;
        let mut frames = http2.written.clone();
        let all = http2.held.is_empty()
            && bufs.iter().all(|buf| {
                let most = frames.whole_before(buf, is_reset);
                frames.pass(buf, |_| {});
                most == buf.len()
            });
        if !all {
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buf| buf));
        }
        let written = ready!(Pin::new(io).poll_write_vectored(cx, bufs))?;
        for part in taken(bufs, written) {
            http2.passed(part);
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, http2 } = &mut *self;
        if let Some(http2) = http2 {
            ready!(http2.poll_pending(io, cx))?;
        }
        Pin::new(io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { io, http2 } = &mut *self;
        if let Some(http2) = http2 {
            ready!(http2.poll_pending(io, cx))?;
        }
        Pin::new(io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn frame(kind: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let frame = Frame {
            kind,
            flags: 0,
            stream,
            length: payload.len(),
        };
        [&frame.header()[..], payload].concat()
    }

    fn reset(stream: u32, code: u32) -> Vec<u8> {
        frame(RST_STREAM, stream, &code.to_be_bytes())
    }

    /// The output for `sent`, by writes of `step` bytes into a pipe of `pipe` bytes, after requests on
    /// streams 1, 3 and 5; and how many were rejected.
    async fn written(sent: &[u8], step: usize, pipe: usize) -> (Vec<u8>, usize) {
        let (near, mut far) = duplex(pipe);
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let mut io = Rejecting::new(
            near,
            Some(Box::new(move || {
                counted.fetch_add(1, Ordering::Relaxed);
            })),
        );
        let mut heard = vec![0; PREFACE];
        for stream in [1, 3, 5] {
            heard.extend(frame(HEADERS, stream, b"request"));
        }
        io.http2.as_mut().unwrap().heard(&heard);
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            all
        });
        for part in sent.chunks(step) {
            // In two buffers, as h2 writes them.
            let (mut at, middle) = (0, part.len() / 2);
            while at < part.len() {
                let (one, two) = part.split_at(middle.max(at));
                let bufs = [IoSlice::new(&one[at.min(one.len())..]), IoSlice::new(two)];
                at += io.write_vectored(&bufs).await.unwrap();
            }
        }
        io.flush().await.unwrap();
        drop(io);
        (reading.await.unwrap(), count.load(Ordering::Relaxed))
    }

    #[tokio::test]
    async fn only_a_request_without_an_answer_gets_this_one() {
        let before = [frame(HEADERS, 3, b"answer"), frame(0, 3, &[7; 300])].concat();
        // Answered already; not asked; gone for another reason.
        let others = [reset(3, 1), reset(7, 1), reset(5, 8), frame(0, 0, b"x")].concat();
        let sent = [&before[..], &reset(1, 1), &others].concat();
        let expected = [&before[..], &answer(1), &reset(1, 0), &others].concat();
        for pipe in [1, 7, 10_000] {
            for step in [1, 5, 13, 100, sent.len()] {
                let (all, rejected) = written(&sent, step, pipe).await;
                assert_eq!(all, expected, "{step} {pipe}");
                assert_eq!(rejected, 1);
            }
        }
    }

    #[test]
    fn lengths_of_texts_are_those_of_rfc_7541() {
        for (length, prefix) in [
            (5, &[5][..]),
            (126, &[126]),
            (127, &[127, 0]),
            (254, &[127, 127]),
            (255, &[127, 0x80, 1]),
            (1337 + 127, &[127, 0xb9, 0x0a]),
        ] {
            let mut fields = BytesMut::new();
            put_text(&mut fields, &"a".repeat(length));
            assert_eq!(fields[..fields.len() - length], *prefix, "{length}");
        }
    }
}
