//! Between yamux and the WebSocket: finds where frames begin, both ways.
//!
//! That allows three things which yamux does not do well itself:
//! - pings are answered here. yamux stops reading while a pong waits to be written; when both ends
//!   are full of data to write, both stop reading, and neither ever writes again.
//! - a stream can be reset after it was half-closed and dropped.
//! - a frame with a large announced length is rejected before memory is allocated for it.
//! - a peer that breaks the protocol is disconnected: yamux only sends it a GOAWAY.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};

const HEADER_LEN: usize = 12;
const DATA: u8 = 0;
const PING: u8 = 2;
const GOAWAY: u8 = 3;
const ACK: u16 = 2;
const RST: u16 = 8;

/// Longest body accepted. Ours are at most 40 KiB; yamux' own limit is 1 MiB, allocated before
/// the first byte arrives.
const MAX_BODY: u32 = 64 * 1024;

/// Where in a frame a direction is.
#[derive(Clone, Copy)]
enum Place {
    Header {
        have: usize,
        bytes: [u8; HEADER_LEN],
    },
    Body {
        left: usize,
    },
}

const BOUNDARY: Place = Place::Header {
    have: 0,
    bytes: [0; HEADER_LEN],
};

/// Where bytes behind this header lead to.
fn after(header: &[u8; HEADER_LEN]) -> Place {
    let [_, kind, _, _, _, _, _, _, l0, l1, l2, l3] = *header;
    match u32::from_be_bytes([l0, l1, l2, l3]) {
        // Only DATA has a body: in other types the field is a window, a ping's value or an error
        // code.
        left if kind == DATA && left > 0 => Place::Body {
            left: usize::try_from(left).unwrap_or(usize::MAX),
        },
        _ => BOUNDARY,
    }
}

impl Place {
    /// Follows bytes that were passed on. True if a GOAWAY was among them.
    fn advance(&mut self, mut passed: &[u8]) -> bool {
        let mut goaway = false;
        while !passed.is_empty() {
            match self {
                Place::Header { have, bytes } => {
                    let n = passed.len().min(HEADER_LEN - *have);
                    bytes[*have..*have + n].copy_from_slice(&passed[..n]);
                    *have += n;
                    passed = &passed[n..];
                    if *have == HEADER_LEN {
                        goaway |= bytes[1] == GOAWAY;
                        *self = after(bytes);
                    }
                }
                Place::Body { left } => {
                    let n = passed.len().min(*left);
                    *left -= n;
                    passed = &passed[n..];
                    if *left == 0 {
                        *self = BOUNDARY;
                    }
                }
            }
        }
        goaway
    }

    fn is_boundary(&self) -> bool {
        matches!(self, Place::Header { have: 0, .. })
    }
}

struct Outbound {
    place: Place,
    /// The newest ping to answer. An honest peer has one on the way at most.
    pong: Option<u32>,
    /// At most one a stream that this side has dropped.
    resets: VecDeque<u32>,
    /// yamux sent GOAWAY. It only does when the peer broke the protocol.
    gave_up: bool,
}

/// Appends frames to what yamux writes.
#[derive(Clone)]
pub(super) struct Injector(Arc<Mutex<Outbound>>);

impl Injector {
    fn lock(&self) -> MutexGuard<'_, Outbound> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn reset(&self, stream: u32) {
        self.lock().resets.push_back(stream);
    }

    pub(super) fn gave_up(&self) -> bool {
        self.lock().gave_up
    }

    /// Gives `append` the frames that are due, unless a frame is under way. What it does not take
    /// stays due.
    pub(super) fn inject(&self, append: impl Fn(&[u8]) -> bool) {
        let mut out = self.lock();
        // Within the body of another frame, these bytes would be read as that body.
        if !out.place.is_boundary() {
            return;
        }
        if let Some(id) = out.pong
            && append(&frame(PING, ACK, 0, id))
        {
            out.pong = None;
        }
        while let Some(stream) = out.resets.front().copied()
            && append(&frame(DATA, RST, stream, 0))
        {
            out.resets.pop_front();
        }
    }
}

fn frame(kind: u8, flags: u16, stream: u32, len: u32) -> [u8; HEADER_LEN] {
    let [f0, f1] = flags.to_be_bytes();
    let [s0, s1, s2, s3] = stream.to_be_bytes();
    let [l0, l1, l2, l3] = len.to_be_bytes();
    [0, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3]
}

/// The byte stream that yamux sees.
pub(super) struct Frames<I> {
    io: I,
    inbound: Place,
    /// A header that was looked at and of which `given` bytes were passed on.
    held: Option<([u8; HEADER_LEN], usize)>,
    injector: Injector,
}

pub(super) fn wrap<I>(io: I) -> (Frames<I>, Injector) {
    let injector = Injector(Arc::new(Mutex::new(Outbound {
        place: BOUNDARY,
        pong: None,
        resets: VecDeque::new(),
        gave_up: false,
    })));
    let frames = Frames {
        io,
        inbound: BOUNDARY,
        held: None,
        injector: injector.clone(),
    };
    (frames, injector)
}

fn invalid(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<I> Frames<I> {
    /// Judges a complete header: passes it on, or answers it.
    fn on_header(&mut self, header: [u8; HEADER_LEN]) -> io::Result<()> {
        let [_, kind, f0, f1, s0, s1, s2, s3, l0, l1, l2, l3] = header;
        let len = u32::from_be_bytes([l0, l1, l2, l3]);
        if kind == DATA && len > MAX_BODY {
            return Err(invalid("the peer sent a mux frame over the limit"));
        }
        if kind == PING && u16::from_be_bytes([f0, f1]) & ACK == 0 {
            // yamux reserves stream 0 for the session's frames, pings among them.
            if [s0, s1, s2, s3] != [0; 4] {
                return Err(invalid("the peer sent a ping on a stream"));
            }
            // Replaces an earlier one that still waits: a flood of pings fills no queue.
            self.injector.lock().pong = Some(len);
            self.inbound = BOUNDARY;
            return Ok(());
        }
        self.held = Some((header, 0));
        self.inbound = after(&header);
        Ok(())
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Frames<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        loop {
            // yamux may read with a buffer below 12 bytes, so the inspected header is handed out in
            // parts.
            if let Some((header, given)) = &mut this.held {
                let n = buf.len().min(HEADER_LEN - *given);
                buf[..n].copy_from_slice(&header[*given..*given + n]);
                *given += n;
                if *given == HEADER_LEN {
                    this.held = None;
                }
                return Poll::Ready(Ok(n));
            }
            match &mut this.inbound {
                Place::Body { left } => {
                    let n = buf.len().min(*left);
                    // Directly into yamux' buffer, and never past the frame's end: the next header
                    // is inspected here first.
                    let n = ready!(Pin::new(&mut this.io).poll_read(cx, &mut buf[..n]))?;
                    *left -= n;
                    if *left == 0 {
                        this.inbound = BOUNDARY;
                    }
                    return Poll::Ready(Ok(n));
                }
                Place::Header { have, bytes } => {
                    let n = ready!(Pin::new(&mut this.io).poll_read(cx, &mut bytes[*have..]))?;
                    if n == 0 {
                        // The end of the connection between two frames is clean; inside a header it
                        // is a cut.
                        return Poll::Ready(match *have {
                            0 => Ok(0),
                            _ => Err(io::ErrorKind::UnexpectedEof.into()),
                        });
                    }
                    *have += n;
                    if *have == HEADER_LEN {
                        let header = *bytes;
                        this.on_header(header)?;
                    }
                }
            }
        }
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Frames<I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let n = ready!(Pin::new(&mut self.io).poll_write(cx, buf))?;
        let mut out = self.injector.lock();
        out.gave_up |= out.place.advance(&buf[..n]);
        drop(out);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::io::{AsyncReadExt, AsyncWriteExt, Cursor};
    use std::cell::RefCell;

    fn injected(injector: &Injector) -> Vec<u8> {
        let got = RefCell::new(Vec::new());
        injector.inject(|bytes| {
            got.borrow_mut().extend_from_slice(bytes);
            true
        });
        got.into_inner()
    }

    fn data(stream: u32, body: &[u8]) -> Vec<u8> {
        let mut out = frame(DATA, 0, stream, u32::try_from(body.len()).unwrap()).to_vec();
        out.extend_from_slice(body);
        out
    }

    #[test]
    fn pings_are_answered_and_everything_else_passes() {
        let mut wire = data(1, b"one");
        wire.extend_from_slice(&frame(PING, 1, 0, 77));
        wire.extend_from_slice(&frame(PING, ACK, 0, 5));
        wire.extend_from_slice(&data(1, b"two"));
        let (mut frames, injector) = wrap(Cursor::new(wire));
        let mut got = Vec::new();
        block_on(frames.read_to_end(&mut got)).unwrap();
        let mut want = data(1, b"one");
        want.extend_from_slice(&frame(PING, ACK, 0, 5));
        want.extend_from_slice(&data(1, b"two"));
        assert_eq!(got, want);
        assert_eq!(injected(&injector), frame(PING, ACK, 0, 77));
        assert_eq!(injected(&injector), b"");
    }

    #[test]
    fn nothing_is_put_into_the_middle_of_a_frame() {
        let (mut frames, injector) = wrap(Cursor::new(Vec::new()));
        injector.reset(9);
        let wire = data(3, b"body");
        for byte in &wire[..wire.len() - 1] {
            block_on(frames.write_all(&[*byte])).unwrap();
            assert_eq!(injected(&injector), b"");
        }
        block_on(frames.write_all(&wire[wire.len() - 1..])).unwrap();
        assert_eq!(injected(&injector), frame(DATA, RST, 9, 0));
    }

    #[test]
    fn what_does_not_fit_stays_due() {
        let (_, injector) = wrap(Cursor::new(Vec::<u8>::new()));
        injector.reset(9);
        injector.inject(|_| false);
        assert_eq!(injected(&injector), frame(DATA, RST, 9, 0));
    }

    #[test]
    fn long_frames_stream_pings_and_cut_headers_are_errors() {
        let read = |wire: &[u8]| {
            let (mut frames, _) = wrap(Cursor::new(wire.to_vec()));
            block_on(frames.read_to_end(&mut Vec::new()))
                .unwrap_err()
                .kind()
        };
        assert_eq!(
            read(&frame(DATA, 0, 1, MAX_BODY + 1)),
            io::ErrorKind::InvalidData
        );
        assert_eq!(read(&frame(PING, 1, 4, 1)), io::ErrorKind::InvalidData);
        assert_eq!(
            read(&frame(DATA, 0, 1, 1)[..7]),
            io::ErrorKind::UnexpectedEof
        );
    }
}
