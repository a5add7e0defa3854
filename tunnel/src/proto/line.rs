//! Line frames and the state machine of a line.
//!
//! ```text
//! 0      1      2             4                                               12
//! | type |  0   | length u16  | value u64                                     | payload …
//! ```
//! All numbers are big-endian. `value` is the stream offset of DATA's first byte, the count of
//! bytes consumed by the reader for ACK, the final offset for FIN and DONE, the code for RESET and GONE, the epoch
//! for RESUME and OK, 0 otherwise.
//!
//! Each side numbers its own bytes from 0. An end is signalled in-band by FIN or RESET, because the
//! stream below reports a reset as an end of data: only a FIN with the right offset is a clean end.
//!
//! Here are the frames and what each half may do ([`Receiver`], [`Sender`]). [`machine`] makes a line
//! of them that can be cut and resumed, [`resume`] authenticates the resumption, [`window_autotune`]
//! grows its window and [`stall_detector`] detects a path that has stalled.

pub mod machine;
pub mod resume;
mod send_buffer;
pub mod stall_detector;
pub mod window_autotune;

use bytes::{BufMut, BytesMut};

/// The line protocol this build speaks.
pub const VERSION: u32 = 1;

/// Length of a frame's header.
pub const HEADER_LEN: usize = 12;

/// Longest payload of one DATA frame.
pub const MAX_DATA: usize = u16::MAX as usize;

/// Longest HELLO or HELLO_REPLY payload.
pub const MAX_HELLO: usize = 512;

/// Longest reason in a RESET.
pub const MAX_REASON: usize = 255;

/// Initial limit of unacknowledged bytes in one direction: 1 MiB. The throughput of a line is at most
/// one window a round trip from end to end, so a sender grows it where the path is long and the reader
/// keeps up ([`window_autotune`]). A reader that has stopped holds up at most the grown window, over
/// all hops together.
pub const WINDOW: u32 = 1024 * 1024;

/// The largest window, which a receiver announces: 16 MiB, 160 MiB/s at 100 ms.
pub const MAX_WINDOW: u32 = 16 * 1024 * 1024;

/// Bytes gathered before they are handed to the stream: one chunk of bulk (32 KiB) with what
/// HTTP/2, TLS and the line put before and behind it, less than 200 bytes, and room for frames beside
/// it. 40 KiB.
pub const SEALED_CHUNK: usize = 40 * 1024;

const _: () = assert!(SEALED_CHUNK <= MAX_DATA);

/// An acknowledgement goes out at least each so many bytes consumed: 128 KiB.
pub const ACK_EVERY: u64 = 128 * 1024;

/// Frame types on the wire.
pub mod kind {
    /// Opens a line; its first frame.
    pub const HELLO: u8 = 0x01;
    /// The agent's answer to HELLO.
    pub const HELLO_REPLY: u8 = 0x02;
    /// Payload, at the offset in the header.
    pub const DATA: u8 = 0x10;
    /// Acknowledges consumed bytes.
    pub const ACK: u8 = 0x11;
    /// The end of data, at the offset in the header.
    pub const FIN: u8 = 0x12;
    /// Ends the line in both directions.
    pub const RESET: u8 = 0x13;
    /// Acknowledges FIN and everything before it: the FIN's sender may forget the line. Only on a
    /// resumable line, as are all that follow.
    pub const DONE: u8 = 0x14;
    /// Requires a PONG.
    pub const PING: u8 = 0x15;
    /// The answer to PING.
    pub const PONG: u8 = 0x16;
    /// Asks the local proxy to resume the line over another carrier, since this one is being closed.
    pub const MOVE: u8 = 0x17;
    /// Resumes a line on a new stream; its first frame.
    pub const RESUME: u8 = 0x20;
    /// The line is resumed.
    pub const OK: u8 = 0x21;
    /// The line cannot be resumed.
    pub const GONE: u8 = 0x22;
}

/// Why a line was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ResetCode {
    /// The sender dropped the line before its end.
    Abandoned,
    /// The receiver of this code broke the protocol.
    Protocol,
    /// No common line version.
    Version,
    /// A frame that is known but not supported, such as RESUME.
    Unsupported,
    /// The sender failed.
    Internal,
    /// The sender waited too long.
    Timeout,
    /// No such line, or none that the sender of RESUME may resume; the answer does not tell which.
    Unknown,
    /// The sender's process stops, and its grace period is over.
    Stopped,
    /// The user's certificate was revoked.
    Revoked,
    /// The user's certificate has expired and was not renewed.
    Expired,
    /// A code that this version does not know.
    Other(u64),
}

impl ResetCode {
    /// The code on the wire.
    pub fn to_u64(self) -> u64 {
        match self {
            Self::Abandoned => 1,
            Self::Protocol => 2,
            Self::Version => 3,
            Self::Unsupported => 4,
            Self::Internal => 5,
            Self::Timeout => 6,
            Self::Unknown => 7,
            Self::Stopped => 8,
            Self::Revoked => 9,
            Self::Expired => 10,
            Self::Other(code) => code,
        }
    }

    /// The code for a number on the wire.
    pub fn from_u64(code: u64) -> Self {
        match code {
            1 => Self::Abandoned,
            2 => Self::Protocol,
            3 => Self::Version,
            4 => Self::Unsupported,
            5 => Self::Internal,
            6 => Self::Timeout,
            7 => Self::Unknown,
            8 => Self::Stopped,
            9 => Self::Revoked,
            10 => Self::Expired,
            other => Self::Other(other),
        }
    }
}

/// How the peer broke the line protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// A frame type that this version does not know.
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
    /// A payload length that the frame type does not allow.
    #[error("frame type {kind:#04x} with a length of {len}")]
    Length {
        /// The type of the frame.
        kind: u8,
        /// The length in bytes.
        len: usize,
    },
    /// A reserved field is set.
    #[error("the reserved byte or value of frame type {0:#04x} is not zero")]
    NotZero(u8),
    /// A frame that the state of the line does not allow.
    #[error("frame type {0:#04x} does not belong here")]
    OutOfPlace(u8),
    /// Data that does not follow the bytes before it.
    #[error("data at offset {got} where {expected} was expected")]
    Gap {
        /// The expected offset.
        expected: u64,
        /// The offset in the frame.
        got: u64,
    },
    /// An offset beyond 64 bits.
    #[error("offset overflows")]
    Overflow,
    /// More data than the receive window allows.
    #[error("data beyond the window")]
    Window,
    /// Data or FIN behind a FIN.
    #[error("a frame after the end of data")]
    AfterFin,
    /// A FIN at another offset than the data's end.
    #[error("the end of data is given as {got}, but {received} bytes were received")]
    WrongEnd {
        /// The bytes received.
        received: u64,
        /// The offset in the frame.
        got: u64,
    },
    /// An acknowledgement of bytes that were not sent.
    #[error("{got} bytes acknowledged, but {sent} sent")]
    AckBeyondSent {
        /// The bytes sent.
        sent: u64,
        /// The offset in the frame.
        got: u64,
    },
    /// An acknowledgement below an earlier one.
    #[error("acknowledgement goes back from {acked} to {got}")]
    AckBackwards {
        /// The bytes acknowledged before.
        acked: u64,
        /// The offset in the frame.
        got: u64,
    },
    /// A HELLO or its reply that cannot be decoded or has invalid values.
    #[error("malformed hello")]
    Hello,
    /// A RESUME that cannot be decoded.
    #[error("malformed resumption")]
    Resume,
    /// A resumption at a position that contradicts earlier acknowledgements.
    #[error("resumed at an impossible position")]
    Position,
}

/// A decoded header. `len` bytes of payload follow where there is one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// See [`kind::HELLO`].
    Hello {
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::HELLO_REPLY`].
    HelloReply {
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::DATA`].
    Data {
        /// The offset of its first byte.
        offset: u64,
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::ACK`]. The offset counts consumed bytes.
    Ack {
        /// The bytes received.
        received: u64,
    },
    /// See [`kind::FIN`].
    Fin {
        /// The number of bytes before the end.
        end: u64,
    },
    /// See [`kind::RESET`]; its text follows.
    Reset {
        /// The code.
        code: ResetCode,
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::DONE`].
    Done {
        /// The number of bytes before the end.
        end: u64,
    },
    /// See [`kind::PING`].
    Ping,
    /// See [`kind::PONG`].
    Pong,
    /// See [`kind::MOVE`].
    Move,
    /// See [`kind::RESUME`].
    Resume {
        /// The epoch of the stream.
        epoch: u64,
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::OK`].
    Ok {
        /// The epoch of the stream.
        epoch: u64,
        /// The length in bytes.
        len: usize,
    },
    /// See [`kind::GONE`]; its text follows.
    Gone {
        /// The code.
        code: ResetCode,
        /// The length in bytes.
        len: usize,
    },
}

/// Decodes the header at the front of `buf`; `None` asks for more bytes. Takes nothing off.
///
/// # Errors
/// The header is invalid.
pub fn parse(buf: &[u8]) -> Result<Option<Header>, Violation> {
    let Some(head) = buf.first_chunk::<HEADER_LEN>() else {
        return Ok(None);
    };
    let [kind, reserved, len0, len1, value @ ..] = *head;
    let len = usize::from(u16::from_be_bytes([len0, len1]));
    let value = u64::from_be_bytes(value);
    let length = |is_valid: bool| {
        if is_valid {
            Ok(())
        } else {
            Err(Violation::Length { kind, len })
        }
    };
    let known = matches!(
        kind,
        kind::HELLO | kind::HELLO_REPLY | kind::DATA..=kind::MOVE | kind::RESUME..=kind::GONE
    );
    // Of known types only: in a later version the byte may have a meaning for the types that are
    // unknown here, and the type itself is the violation to report.
    if known && reserved != 0 {
        return Err(Violation::NotZero(kind));
    }
    let header = match kind {
        kind::HELLO | kind::HELLO_REPLY => {
            // HELLO arrives before the peer is authenticated: its length is bounded before its
            // payload is allocated.
            length(len <= MAX_HELLO)?;
            if value != 0 {
                return Err(Violation::NotZero(kind));
            }
            match kind {
                kind::HELLO => Header::Hello { len },
                _ => Header::HelloReply { len },
            }
        }
        kind::DATA => {
            // Empty DATA would use no window, so a peer could have headers processed without end.
            length(len > 0)?;
            Header::Data { offset: value, len }
        }
        kind::ACK => {
            length(len == 0)?;
            Header::Ack { received: value }
        }
        kind::FIN => {
            length(len == 0)?;
            Header::Fin { end: value }
        }
        kind::RESET => {
            length(len <= MAX_REASON)?;
            let code = ResetCode::from_u64(value);
            Header::Reset { code, len }
        }
        kind::DONE => {
            length(len == 0)?;
            Header::Done { end: value }
        }
        kind::PING | kind::PONG | kind::MOVE => {
            length(len == 0)?;
            if value != 0 {
                return Err(Violation::NotZero(kind));
            }
            match kind {
                kind::PING => Header::Ping,
                kind::PONG => Header::Pong,
                _ => Header::Move,
            }
        }
        kind::RESUME | kind::OK => {
            // As with HELLO: the MAC is in the payload, so the length is bounded before it is
            // verified.
            length(len <= MAX_HELLO)?;
            match kind {
                kind::RESUME => Header::Resume { epoch: value, len },
                _ => Header::Ok { epoch: value, len },
            }
        }
        kind::GONE => {
            length(len <= MAX_REASON)?;
            let code = ResetCode::from_u64(value);
            Header::Gone { code, len }
        }
        other => return Err(Violation::UnknownType(other)),
    };
    Ok(Some(header))
}

/// Appends a header.
pub fn put(out: &mut BytesMut, kind: u8, len: u16, value: u64) {
    out.put_u8(kind);
    out.put_u8(0);
    out.put_u16(len);
    out.put_u64(value);
}

/// Appends a RESET, its reason cut to what fits.
pub fn put_reset(out: &mut BytesMut, code: ResetCode, reason: &str) {
    put_end(out, kind::RESET, code, reason);
}

/// Appends a GONE, its reason cut to what fits.
pub fn put_gone(out: &mut BytesMut, code: ResetCode, reason: &str) {
    put_end(out, kind::GONE, code, reason);
}

fn put_end(out: &mut BytesMut, kind: u8, code: ResetCode, reason: &str) {
    let mut cut = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(cut) {
        cut -= 1;
    }
    // `cut` is at most 255.
    put(out, kind, cut as u16, code.to_u64());
    out.put_slice(&reason.as_bytes()[..cut]);
}

/// How many of the other side's bytes a side has, as exchanged when a line is resumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Bytes that have arrived; the next one is expected.
    pub received: u64,
    /// Bytes taken by the reader: an acknowledgement, since the last one may be lost.
    pub consumed: u64,
    /// The FIN has arrived.
    pub ended: bool,
}

/// How far the peer is with its end of data. A RESET ends both halves, see [`machine::Ended`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvState {
    /// More data may follow.
    Open,
    /// FIN has arrived, and no payload is valid behind it.
    Fin {
        /// The number of bytes before the end.
        end: u64,
    },
}

/// The receiving half: which bytes are valid, and what to acknowledge.
#[derive(Debug)]
pub struct Receiver {
    window: u64,
    /// Announced by DATA headers.
    received: u64,
    /// Taken by the reader.
    consumed: u64,
    acked: u64,
    state: RecvState,
}

impl Receiver {
    /// A receiver that has announced this window.
    pub fn new(window: u32) -> Self {
        Self {
            window: u64::from(window),
            received: 0,
            consumed: 0,
            acked: 0,
            state: RecvState::Open,
        }
    }

    /// A DATA header has arrived.
    ///
    /// # Errors
    /// The header breaks order, window or end.
    pub fn on_data(&mut self, offset: u64, len: usize) -> Result<(), Violation> {
        if self.has_fin() {
            return Err(Violation::AfterFin);
        }
        let end = offset.checked_add(len as u64).ok_or(Violation::Overflow)?;
        if offset != self.received {
            return Err(Violation::Gap {
                expected: self.received,
                got: offset,
            });
        }
        if end - self.acked > self.window {
            return Err(Violation::Window);
        }
        self.received = end;
        Ok(())
    }

    /// A FIN has arrived.
    ///
    /// # Errors
    /// There was one before, or it is not at the end of the data.
    pub fn on_fin(&mut self, end: u64) -> Result<(), Violation> {
        if self.has_fin() {
            return Err(Violation::AfterFin);
        }
        if end != self.received {
            return Err(Violation::WrongEnd {
                received: self.received,
                got: end,
            });
        }
        self.state = RecvState::Fin { end };
        Ok(())
    }

    /// The reader took `n` bytes.
    pub fn consume(&mut self, n: usize) {
        self.consumed += n as u64;
        debug_assert!(self.consumed <= self.received);
    }

    /// The offset to acknowledge, when enough has been consumed to be worth a frame.
    pub fn take_ack(&mut self) -> Option<u64> {
        let every = ACK_EVERY.min(self.window / 2);
        if self.consumed - self.acked < every.max(1) || self.has_fin() {
            return None;
        }
        self.acked = self.consumed;
        Some(self.acked)
    }

    /// The offset to acknowledge, however little was consumed since the last time. For when it
    /// rides on another write, or the line is idle.
    pub fn take_small_ack(&mut self) -> Option<u64> {
        if self.consumed == self.acked || self.has_fin() {
            return None;
        }
        self.acked = self.consumed;
        Some(self.acked)
    }

    /// The stream below is lost, and with it the last `missing` bytes of payload that a header had
    /// announced. The position goes to the peer, so it counts as acknowledged.
    pub fn interrupt(&mut self, missing: usize) -> Position {
        self.received -= missing as u64;
        self.acked = self.consumed;
        Position {
            received: self.received,
            consumed: self.consumed,
            ended: self.has_fin(),
        }
    }

    /// FIN has arrived, and everything before it was consumed.
    pub fn is_finished(&self) -> bool {
        let end = self.consumed;
        self.state == RecvState::Fin { end }
    }

    /// Bytes of payload received.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// FIN has arrived.
    pub fn has_fin(&self) -> bool {
        matches!(self.state, RecvState::Fin { .. })
    }
}

/// The sending half: how much may go out.
#[derive(Debug)]
pub struct Sender {
    /// The window in use, and the one that the peer has announced.
    window: u64,
    max_window: u64,
    sent: u64,
    acked: u64,
}

impl Sender {
    /// `max_window`: the peer's, of which [`WINDOW`] is used at first.
    pub fn new(max_window: u32) -> Self {
        Self {
            window: u64::from(max_window.min(WINDOW)),
            max_window: u64::from(max_window),
            sent: 0,
            acked: 0,
        }
    }

    /// Bytes that the peer has acknowledged.
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// Bytes by which the window grows next: to four times its size, as far as the peer allows.
    pub fn growth(&self) -> u64 {
        (3 * self.window).min(self.max_window - self.window)
    }

    /// Grows the window, at most to the peer's.
    pub fn grow(&mut self, by: u64) {
        self.window = (self.window + by).min(self.max_window);
    }

    /// Back to the initial window, if that covers the bytes in flight.
    pub fn shrink(&mut self) -> bool {
        let initial = self.max_window.min(u64::from(WINDOW));
        let fits = self.sent - self.acked <= initial;
        if fits {
            self.window = initial;
        }
        fits
    }

    /// Bytes that may be sent now.
    pub fn room(&self) -> usize {
        let room = self.window.saturating_sub(self.sent - self.acked);
        usize::try_from(room).unwrap_or(usize::MAX)
    }

    /// Half of the window or more is in flight.
    pub fn is_half_used(&self) -> bool {
        2 * (self.sent - self.acked) >= self.window
    }

    /// Bytes sent.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// `n` bytes, at most [`Self::room`], were put into DATA frames.
    pub fn advance(&mut self, n: usize) {
        debug_assert!(n <= self.room());
        self.sent += n as u64;
    }

    /// An acknowledgement has arrived.
    ///
    /// # Errors
    /// It is beyond what was sent, or below an earlier one.
    pub fn on_ack(&mut self, received: u64) -> Result<(), Violation> {
        if received > self.sent {
            return Err(Violation::AckBeyondSent {
                sent: self.sent,
                got: received,
            });
        }
        if received < self.acked {
            return Err(Violation::AckBackwards {
                acked: self.acked,
                got: received,
            });
        }
        self.acked = received;
        Ok(())
    }

    /// The peer's position when the line is resumed.
    ///
    /// # Errors
    /// The position is not possible.
    pub fn on_position(&mut self, at: Position) -> Result<(), Violation> {
        let is_possible =
            self.acked <= at.consumed && at.consumed <= at.received && at.received <= self.sent;
        if !is_possible {
            return Err(Violation::Position);
        }
        self.acked = at.consumed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: u8, len: u16, value: u64) -> BytesMut {
        let mut out = BytesMut::new();
        put(&mut out, kind, len, value);
        out
    }

    #[test]
    fn golden_bytes() {
        let data = header(kind::DATA, 0x0102, 0x0a0b_0c0d);
        assert_eq!(data.as_ref(), b"\x10\0\x01\x02\0\0\0\0\x0a\x0b\x0c\x0d");
        let mut reset = BytesMut::new();
        put_reset(&mut reset, ResetCode::Protocol, "no");
        assert_eq!(reset.as_ref(), b"\x13\0\0\x02\0\0\0\0\0\0\0\x02no");
        let fin = header(kind::FIN, 0, u64::MAX);
        assert_eq!(parse(&fin), Ok(Some(Header::Fin { end: u64::MAX })));
    }

    #[test]
    fn one_byte_at_a_time_with_trailing_bytes() {
        let mut wire = header(kind::ACK, 0, 77);
        for len in 0..HEADER_LEN {
            assert_eq!(parse(&wire[..len]), Ok(None), "{len} bytes");
        }
        wire.put_slice(b"behind");
        assert_eq!(parse(&wire), Ok(Some(Header::Ack { received: 77 })));
    }

    #[test]
    fn headers_that_no_honest_peer_sends() {
        let wrong = |kind, len, value| parse(&header(kind, len, value)).unwrap_err();
        assert!(matches!(wrong(kind::DATA, 0, 0), Violation::Length { .. }));
        assert!(matches!(wrong(kind::ACK, 1, 0), Violation::Length { .. }));
        assert!(matches!(wrong(kind::FIN, 9, 0), Violation::Length { .. }));
        assert!(matches!(
            wrong(kind::RESET, 256, 0),
            Violation::Length { .. }
        ));
        assert!(matches!(
            wrong(kind::HELLO, 513, 0),
            Violation::Length { .. }
        ));
        assert_eq!(wrong(kind::HELLO, 5, 1), Violation::NotZero(kind::HELLO));
        assert_eq!(wrong(0x7f, 0, 0), Violation::UnknownType(0x7f));
        for kind in [kind::PING, kind::PONG, kind::MOVE] {
            assert_eq!(wrong(kind, 0, 1), Violation::NotZero(kind));
            assert!(matches!(wrong(kind, 1, 0), Violation::Length { .. }));
        }
        for kind in [kind::RESUME, kind::OK] {
            assert!(matches!(wrong(kind, 513, 1), Violation::Length { .. }));
        }
        assert!(matches!(
            wrong(kind::GONE, 256, 7),
            Violation::Length { .. }
        ));
        let mut reserved = header(kind::DATA, 1, 0);
        reserved[1] = 1;
        assert_eq!(parse(&reserved), Err(Violation::NotZero(kind::DATA)));
    }

    #[test]
    fn gaps_overflow_window_and_data_after_the_end_are_violations() {
        let mut recv = Receiver::new(100);
        recv.on_data(0, 60).unwrap();
        let gap = Violation::Gap {
            expected: 60,
            got: 61,
        };
        assert_eq!(recv.on_data(61, 1), Err(gap));
        assert!(matches!(recv.on_data(59, 1), Err(Violation::Gap { .. })));
        assert_eq!(recv.on_data(u64::MAX, 1), Err(Violation::Overflow));
        assert_eq!(recv.on_data(60, 41), Err(Violation::Window));
        assert!(matches!(recv.on_fin(59), Err(Violation::WrongEnd { .. })));
        recv.on_fin(60).unwrap();
        assert_eq!(recv.on_data(60, 1), Err(Violation::AfterFin));
        assert_eq!(recv.on_fin(60), Err(Violation::AfterFin));
        assert!(!recv.is_finished());
        recv.consume(60);
        assert!(recv.is_finished());
    }

    #[test]
    fn acknowledges_in_steps_and_not_after_the_end() {
        let mut recv = Receiver::new(WINDOW);
        recv.on_data(0, MAX_DATA).unwrap();
        recv.consume(MAX_DATA);
        assert_eq!(recv.take_ack(), None);
        recv.on_data(MAX_DATA as u64, MAX_DATA).unwrap();
        recv.consume(MAX_DATA);
        recv.on_data(2 * MAX_DATA as u64, 2).unwrap();
        assert_eq!(recv.take_ack(), None, "two bytes were not consumed yet");
        recv.consume(2);
        assert_eq!(recv.take_ack(), Some(ACK_EVERY));
        assert_eq!(recv.take_ack(), None);
    }

    #[test]
    fn acks_move_forward_and_never_beyond_what_was_sent() {
        let mut send = Sender::new(100);
        assert_eq!(send.room(), 100);
        send.advance(100);
        assert_eq!(send.room(), 0);
        assert!(matches!(
            send.on_ack(101),
            Err(Violation::AckBeyondSent { .. })
        ));
        send.on_ack(40).unwrap();
        assert_eq!(send.room(), 40);
        assert!(matches!(
            send.on_ack(39),
            Err(Violation::AckBackwards { .. })
        ));
        assert!(matches!(
            send.on_ack(u64::MAX),
            Err(Violation::AckBeyondSent { .. })
        ));
    }

    #[test]
    fn reset_codes_go_there_and_back() {
        for code in 0..20 {
            assert_eq!(ResetCode::from_u64(code).to_u64(), code);
        }
        let mut out = BytesMut::new();
        put_reset(&mut out, ResetCode::Internal, &"é".repeat(200));
        assert_eq!(out.len(), HEADER_LEN + 254);
    }

    proptest::proptest! {
        #[test]
        fn hostile_headers_never_panic(bytes in proptest::array::uniform12(0u8..)) {
            let mut recv = Receiver::new(WINDOW);
            let mut send = Sender::new(WINDOW);
            send.advance(1000);
            match parse(&bytes) {
                Ok(Some(Header::Data { offset, len })) => drop(recv.on_data(offset, len)),
                Ok(Some(Header::Ack { received })) => drop(send.on_ack(received)),
                Ok(Some(Header::Fin { end })) => drop(recv.on_fin(end)),
                _ => {}
            }
        }

        #[test]
        fn sender_and_receiver_agree(steps in proptest::collection::vec((1usize..70_000, 0usize..200_000), 0..200)) {
            let (mut send, mut recv) = (Sender::new(WINDOW), Receiver::new(WINDOW));
            let mut waiting = 0;
            for (write, read) in steps {
                let n = write.min(send.room()).min(MAX_DATA);
                if n > 0 {
                    let offset = send.sent();
                    send.advance(n);
                    proptest::prop_assert_eq!(recv.on_data(offset, n), Ok(()));
                    waiting += n;
                }
                let taken = read.min(waiting);
                waiting -= taken;
                recv.consume(taken);
                if let Some(ack) = recv.take_ack() {
                    proptest::prop_assert_eq!(send.on_ack(ack), Ok(()));
                }
                proptest::prop_assert!(waiting <= WINDOW as usize);
                // Whatever was read, a writer without room has something to wait for.
                proptest::prop_assert!(send.room() > 0 || waiting > 0);
            }
        }
    }
}
