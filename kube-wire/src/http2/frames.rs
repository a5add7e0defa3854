//! Where frames begin in bytes that pass.

use std::io::IoSlice;

/// Length of a frame's header.
pub const HEADER: usize = 9;
/// Frame type (RFC 9113, section 6).
pub const DATA: u8 = 0;
/// Frame type.
pub const HEADERS: u8 = 1;
/// Frame type.
pub const RST_STREAM: u8 = 3;
/// Frame type.
pub const GOAWAY: u8 = 7;
/// Of HEADERS and DATA: nothing follows on the stream.
pub const END_STREAM: u8 = 1;
/// Of HEADERS: no CONTINUATION follows.
pub const END_HEADERS: u8 = 4;
/// What a client sends before its first frame.
pub const PREFACE: usize = 24;

/// The header of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The frame's type.
    pub kind: u8,
    /// The frame's flags.
    pub flags: u8,
    /// 0: the connection.
    pub stream: u32,
    /// Of its payload, bytes.
    pub length: usize,
}

impl Frame {
    /// Decodes a header.
    #[must_use]
    pub fn read(header: &[u8; HEADER]) -> Self {
        let [a, b, c, kind, flags, stream @ ..] = *header;
        Self {
            kind,
            flags,
            // The first bit is reserved.
            stream: u32::from_be_bytes(stream) & 0x7fff_ffff,
            length: usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c),
        }
    }

    /// The header of a frame of less than 16 MiB.
    #[must_use]
    pub fn header(&self) -> [u8; HEADER] {
        let [_, a, b, c] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        let [d, e, f, g] = self.stream.to_be_bytes();
        [a, b, c, self.kind, self.flags, d, e, f, g]
    }
}

/// Follows the frames of one direction through bytes that come in pieces of any size.
///
/// ```
/// use throwline_kube_wire::http2::frames::{Frame, Frames};
///
/// // A PING, in two pieces.
/// let bytes = [&[0, 0, 8, 6, 0, 0, 0, 0, 0][..], &[7; 8]].concat();
/// let mut frames = Frames::default();
/// let mut seen = Vec::new();
/// for piece in [&bytes[..5], &bytes[5..]] {
///     frames.pass(piece, |frame: Frame| seen.push((frame.kind, frame.length)));
/// }
/// assert_eq!(seen, [(6, 8)]);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Frames {
    header: [u8; HEADER],
    /// Bytes of a header that is under way.
    have: usize,
    /// Bytes of a payload that are yet to come.
    left: usize,
}

impl Frames {
    /// The first frame begins after so many bytes.
    #[must_use]
    pub fn after(bytes: usize) -> Self {
        Self {
            left: bytes,
            ..Self::default()
        }
    }

    /// Calls `each` with every frame whose header ends in `bytes`.
    pub fn pass(&mut self, mut bytes: &[u8], mut each: impl FnMut(Frame)) {
        while !bytes.is_empty() {
            let step;
            if self.left > 0 {
                step = self.left.min(bytes.len());
                self.left -= step;
            } else {
                step = (HEADER - self.have).min(bytes.len());
                self.header[self.have..self.have + step].copy_from_slice(&bytes[..step]);
                self.have += step;
                if self.have == HEADER {
                    let frame = Frame::read(&self.header);
                    (self.have, self.left) = (0, frame.length);
                    each(frame);
                }
            }
            bytes = &bytes[step..];
        }
    }

    /// How much of `bytes`, which come next, is before the first frame that is `wanted`: all of it, if
    /// there is none. A header of which a part has passed, or that is not whole, is not looked for.
    #[must_use]
    pub fn before(&self, bytes: &[u8], wanted: impl Fn(Frame) -> bool) -> usize {
        match self.find(bytes, wanted) {
            Found::Frame(at) => at,
            Found::None | Found::Part(_) => bytes.len(),
        }
    }

    /// The same, but what follows ends before a header that is not whole, too: it may be `wanted`.
    #[must_use]
    pub fn whole_before(&self, bytes: &[u8], wanted: impl Fn(Frame) -> bool) -> usize {
        match self.find(bytes, wanted) {
            Found::Frame(at) | Found::Part(at) => at,
            Found::None => bytes.len(),
        }
    }

    fn find(&self, bytes: &[u8], wanted: impl Fn(Frame) -> bool) -> Found {
        let mut at = self.left;
        if self.have > 0 {
            let mut header = self.header;
            let rest = HEADER - self.have;
            let Some(more) = bytes.get(..rest) else {
                return Found::None;
            };
            header[self.have..].copy_from_slice(more);
            at = rest + Frame::read(&header).length;
        }
        while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
            let Some(header) = rest.first_chunk() else {
                return Found::Part(at);
            };
            let frame = Frame::read(header);
            if wanted(frame) {
                return Found::Frame(at);
            }
            at += HEADER + frame.length;
        }
        Found::None
    }
}

/// What a search in bytes ends at.
enum Found {
    /// A frame that is wanted begins there.
    Frame(usize),
    /// A header begins there that is not whole.
    Part(usize),
    None,
}

/// The parts of `bufs` that a vectored write of `written` bytes has taken.
pub fn taken<'b>(bufs: &'b [IoSlice<'_>], mut written: usize) -> impl Iterator<Item = &'b [u8]> {
    bufs.iter().map(move |buf| {
        let step = written.min(buf.len());
        written -= step;
        &buf[..step]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_whatever_the_pieces() {
        let sent = [
            Frame {
                kind: HEADERS,
                flags: END_HEADERS,
                stream: 1,
                length: 3,
            },
            Frame {
                kind: DATA,
                flags: 0,
                stream: 0x7fff_ffff,
                length: 70_000,
            },
            Frame {
                kind: RST_STREAM,
                flags: 0,
                stream: 3,
                length: 4,
            },
            Frame {
                kind: GOAWAY,
                flags: 0,
                stream: 0,
                length: 0,
            },
        ];
        let mut bytes = vec![b'P'; PREFACE];
        for frame in &sent {
            bytes.extend(frame.header());
            bytes.extend(vec![1; frame.length]);
        }
        for step in [1, 4, 9, 13, 1000, bytes.len()] {
            let (mut frames, mut seen) = (Frames::after(PREFACE), Vec::new());
            for piece in bytes.chunks(step) {
                frames.pass(piece, |frame| seen.push(frame));
            }
            assert_eq!(seen, sent, "{step}");
        }
    }
}
