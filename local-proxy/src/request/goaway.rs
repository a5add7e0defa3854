//! Delivers the reason why an HTTP/2 answer to kubectl was lost, for answers that have no place for
//! errors, as `kubectl logs -f`: bytes are never added to data.
//!
//! A stream that is reset shows as `stream error … INTERNAL_ERROR`. GOAWAY has room for a text (RFC 9113,
//! section 6.8), and Go's client shows it when the connection ends after it. So where the line below
//! has ended, and with it all that ran over it, the first RST_STREAM is replaced by a GOAWAY with the
//! reason, and the connection ends. Frames before it go out as they are.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use throwline_kube_wire::http2::frames::{Frame, Frames, GOAWAY, HEADER, RST_STREAM, taken};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest reason, bytes; a frame has room for 16 KiB.
const MAX_REASON: usize = 1024;

/// The reason, once there is one. Clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct GoawayReason(Arc<OnceLock<String>>);

impl GoawayReason {
    /// Everything on this connection has ended, for this reason.
    pub(crate) fn set(&self, reason: String) {
        // The first is the cause of the others.
        let _ = self.0.set(reason);
    }

    fn frame(&self) -> Option<Bytes> {
        let reason = self.0.get()?;
        let reason = &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON)];
        let header = Frame {
            kind: GOAWAY,
            flags: 0,
            stream: 0,
            length: 8 + reason.len(),
        };
        let mut frame = Vec::with_capacity(HEADER + header.length);
        frame.extend(header.header());
        // All streams were seen; the error is in the text.
        frame.extend(i32::MAX.to_be_bytes());
        frame.extend([0; 4]);
        frame.extend(reason);
        Some(frame.into())
    }
}

/// A server's end of a connection. With HTTP/2, it can end with a GOAWAY that has a reason.
pub(crate) struct GoawayWriter<IO> {
    io: IO,
    reason: Option<GoawayReason>,
    /// The position of the next byte in the outgoing frames.
    frames: Frames,
    /// The GOAWAY, which replaces everything after it.
    goaway: Option<Bytes>,
}

impl<IO> GoawayWriter<IO> {
    /// `reason`: `None` for another protocol than HTTP/2.
    pub(crate) fn new(io: IO, reason: Option<GoawayReason>) -> Self {
        Self {
            io,
            reason,
            frames: Frames::default(),
            goaway: None,
        }
    }

    fn frame(&self) -> Option<Bytes> {
        self.reason.as_ref()?.frame()
    }

    fn passed(&mut self, bytes: &[u8]) {
        if self.reason.is_some() {
            self.frames.pass(bytes, drop);
        }
    }
}

impl<IO: AsyncWrite + Unpin> GoawayWriter<IO> {
    /// Writes the last frame; then every write fails.
    fn poll_goaway(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let Some(goaway) = &mut self.goaway {
            while goaway.has_remaining() {
                let written = ready!(Pin::new(&mut self.io).poll_write(cx, goaway))?;
                if written == 0 {
                    return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                }
                goaway.advance(written);
            }
        }
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "the connection was ended with a reason",
        )))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for GoawayWriter<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let mut most = buf.len();
        if this.goaway.is_none()
            && let Some(frame) = this.frame()
        {
            most = this.frames.before(buf, |frame| frame.kind == RST_STREAM);
            if most == 0 && !buf.is_empty() {
                this.goaway = Some(frame);
            }
        }
        if this.goaway.is_some() {
            return this.poll_goaway(cx);
        }
        let written = ready!(Pin::new(&mut this.io).poll_write(cx, &buf[..most]))?;
        this.passed(&buf[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.goaway.is_some() || this.frame().is_some() {
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buf| buf));
        }
        let written = ready!(Pin::new(&mut this.io).poll_write_vectored(cx, bufs))?;
        for part in taken(bufs, written) {
            this.passed(part);
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

impl<IO: AsyncRead + Unpin> AsyncRead for GoawayWriter<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&length[1..], &[kind, 0, 0, 0, 0, 1], payload].concat()
    }

    /// Data, a reset, more data: by writes of so many bytes, into a pipe of so many.
    async fn written(step: usize, pipe: usize, reason: Option<&str>) -> (Vec<u8>, bool) {
        let (near, mut far) = duplex(pipe);
        let shared = GoawayReason::default();
        let mut writer = GoawayWriter::new(near, Some(shared.clone()));
        let reading = tokio::spawn(async move {
            let mut all = Vec::new();
            far.read_to_end(&mut all).await.unwrap();
            all
        });
        writer.write_all(&frame(0, b"before")).await.unwrap();
        if let Some(reason) = reason {
            shared.set(reason.to_owned());
            shared.set("another".to_owned());
        }
        let rest = [
            frame(0, &[3; 40]),
            frame(RST_STREAM, &[0; 4]),
            frame(0, b"after"),
        ]
        .concat();
        let mut failed = false;
        for part in rest.chunks(step) {
            failed |= writer.write_all(part).await.is_err();
        }
        drop(writer);
        (reading.await.unwrap(), failed)
    }

    #[tokio::test]
    async fn the_first_reset_becomes_the_reason_and_what_was_before_it_stays() {
        let before = [frame(0, b"before"), frame(0, &[3; 40])].concat();
        for pipe in [1, 7, 1000] {
            for step in [HEADER + 40 + HEADER + 4, 500] {
                let (all, failed) = written(step, pipe, Some("it was stopped")).await;
                assert!(failed);
                assert_eq!(all[..before.len()], before, "{step} {pipe}");
                let last = &all[before.len()..];
                assert_eq!(last[3], GOAWAY);
                assert_eq!(last[..3], [0, 0, 8 + 14]);
                assert_eq!(&last[HEADER + 8..], b"it was stopped");
            }
        }
    }

    #[tokio::test]
    async fn without_a_reason_nothing_changes() {
        for step in [1, 5, 500] {
            let (all, failed) = written(step, 16, None).await;
            let expected = [
                frame(0, b"before"),
                frame(0, &[3; 40]),
                frame(RST_STREAM, &[0; 4]),
                frame(0, b"after"),
            ];
            assert!(!failed);
            assert_eq!(all, expected.concat());
        }
    }
}
