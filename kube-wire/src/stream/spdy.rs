//! The frames of SPDY/3.1, as far as Kubernetes uses it. Header blocks stay compressed here.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// The longest frame that is taken: Go's client writes at most 32 KiB at once.
const MAX_FRAME: usize = 1 << 20;
/// The longest control frame.
const MAX_CONTROL: usize = 64 << 10;
const HEADER: usize = 8;
const VERSION: u16 = 3;
const FIN: u8 = 1;

/// Why bytes are not a frame. Always the peer's fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length is over the limit.
    #[error("a frame of {0} bytes is too long")]
    TooLong(usize),
    /// The version is not 3.
    #[error("version {0} is not spoken here")]
    Version(u16),
    /// The frame is shorter than its kind needs.
    #[error("a frame of kind {0} is too short")]
    Truncated(u16),
    /// The headers cannot be read.
    #[error("a header block is malformed")]
    Headers,
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(
    missing_docs,
    reason = "the fields are those of the SPDY specification, section 2.6"
)]
pub enum Frame {
    SynStream {
        id: u32,
        fin: bool,
        headers: Bytes,
    },
    SynReply {
        id: u32,
        fin: bool,
        headers: Bytes,
    },
    Reset {
        id: u32,
        status: u32,
    },
    Ping {
        id: u32,
    },
    GoAway {
        last: u32,
        status: u32,
    },
    Headers {
        id: u32,
        fin: bool,
        headers: Bytes,
    },
    Data {
        id: u32,
        fin: bool,
        bytes: Bytes,
    },
    /// Settings, window updates and kinds that are not known: Kubernetes ignores them all.
    Ignored {
        kind: u16,
    },
}

/// Reads one frame from the front of `input`, with its length; `None` when it is not complete yet.
pub fn decode(input: &[u8]) -> Result<Option<(Frame, usize)>, FrameError> {
    let Some(length) = frame_length(input)? else {
        return Ok(None);
    };
    match input.get(..length) {
        Some(frame) => Ok(Some((parse(Bytes::copy_from_slice(frame))?, length))),
        None => Ok(None),
    }
}

/// The same without copying what a data frame carries.
pub fn take(input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    match frame_length(input)? {
        Some(length) if input.len() >= length => parse(input.split_to(length).freeze()).map(Some),
        Some(length) => {
            input.reserve(length - input.len());
            Ok(None)
        }
        None => Ok(None),
    }
}

fn frame_length(input: &[u8]) -> Result<Option<usize>, FrameError> {
    let Some(header) = input.get(..HEADER) else {
        return Ok(None);
    };
    let length =
        usize::from(header[5]) << 16 | usize::from(header[6]) << 8 | usize::from(header[7]);
    let control = header[0] & 0x80 != 0;
    let version = u16::from_be_bytes([header[0] & 0x7f, header[1]]);
    if control && version != VERSION {
        return Err(FrameError::Version(version));
    }
    if length > if control { MAX_CONTROL } else { MAX_FRAME } {
        return Err(FrameError::TooLong(length));
    }
    Ok(Some(HEADER + length))
}

/// A whole frame, header and all.
fn parse(mut frame: Bytes) -> Result<Frame, FrameError> {
    let first = frame.get_u32();
    let flags = frame.get_u8();
    frame.advance(3);
    let fin = flags & FIN != 0;
    if first & 0x8000_0000 == 0 {
        return Ok(Frame::Data {
            id: first,
            fin,
            bytes: frame,
        });
    }
    let kind = (first & 0xffff) as u16;
    let need = |bytes: usize| {
        if frame.len() < bytes {
            Err(FrameError::Truncated(kind))
        } else {
            Ok(())
        }
    };
    let id = |frame: &mut Bytes| frame.get_u32() & 0x7fff_ffff;
    match kind {
        1 => {
            need(10)?;
            let id = id(&mut frame);
            frame.advance(6);
            Ok(Frame::SynStream {
                id,
                fin,
                headers: frame,
            })
        }
        2 | 8 => {
            need(4)?;
            let id = id(&mut frame);
            Ok(match kind {
                2 => Frame::SynReply {
                    id,
                    fin,
                    headers: frame,
                },
                _ => Frame::Headers {
                    id,
                    fin,
                    headers: frame,
                },
            })
        }
        3 => {
            need(8)?;
            Ok(Frame::Reset {
                id: id(&mut frame),
                status: frame.get_u32(),
            })
        }
        6 => {
            need(4)?;
            Ok(Frame::Ping {
                id: frame.get_u32(),
            })
        }
        7 => {
            need(8)?;
            Ok(Frame::GoAway {
                last: id(&mut frame),
                status: frame.get_u32(),
            })
        }
        kind => Ok(Frame::Ignored { kind }),
    }
}

impl Frame {
    /// Appends the frame as it goes over the wire.
    pub fn encode(&self, out: &mut BytesMut) {
        let fin = |fin: bool| if fin { FIN } else { 0 };
        let mut control = |kind: u16, flags: u8, length: usize| {
            out.put_u16(0x8000 | VERSION);
            out.put_u16(kind);
            out.put_u8(flags);
            out.put_uint(length as u64, 3);
        };
        match self {
            Self::SynStream {
                id,
                fin: end,
                headers,
            } => {
                control(1, fin(*end), 10 + headers.len());
                out.put_u32(*id);
                out.put_bytes(0, 6);
                out.put_slice(headers);
            }
            Self::SynReply {
                id,
                fin: end,
                headers,
            } => {
                control(2, fin(*end), 4 + headers.len());
                out.put_u32(*id);
                out.put_slice(headers);
            }
            Self::Headers {
                id,
                fin: end,
                headers,
            } => {
                control(8, fin(*end), 4 + headers.len());
                out.put_u32(*id);
                out.put_slice(headers);
            }
            Self::Reset { id, status } => {
                control(3, 0, 8);
                out.put_u32(*id);
                out.put_u32(*status);
            }
            Self::Ping { id } => {
                control(6, 0, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last, status } => {
                control(7, 0, 8);
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Self::Data {
                id,
                fin: end,
                bytes,
            } => {
                out.put_u32(*id & 0x7fff_ffff);
                out.put_u8(fin(*end));
                out.put_uint(bytes.len() as u64, 3);
                out.put_slice(bytes);
            }
            Self::Ignored { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        let headers = Bytes::from_static(b"compressed");
        vec![
            Frame::SynStream {
                id: 1,
                fin: false,
                headers: headers.clone(),
            },
            Frame::SynReply {
                id: 1,
                fin: true,
                headers: headers.clone(),
            },
            Frame::Headers {
                id: 3,
                fin: false,
                headers,
            },
            Frame::Reset { id: 5, status: 1 },
            Frame::Ping { id: 7 },
            Frame::GoAway { last: 9, status: 0 },
            Frame::Data {
                id: 1,
                fin: true,
                bytes: Bytes::from_static(b"data"),
            },
        ]
    }

    #[test]
    fn frames_come_back_one_byte_at_a_time() {
        let mut wire = BytesMut::new();
        frames().iter().for_each(|frame| frame.encode(&mut wire));
        let mut buffer = BytesMut::new();
        let mut seen = Vec::new();
        for byte in wire {
            buffer.put_u8(byte);
            if let Some(frame) = take(&mut buffer).unwrap() {
                seen.push(frame);
            }
        }
        assert_eq!(seen, frames());
        assert!(buffer.is_empty());
    }

    #[test]
    fn golden_bytes_of_a_data_frame_and_a_ping() {
        let wire = [
            0, 0, 0, 5, 1, 0, 0, 2, b'h', b'i', 0x80, 3, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1,
        ];
        let (data, used) = decode(&wire).unwrap().unwrap();
        assert_eq!(
            (data, used),
            (
                Frame::Data {
                    id: 5,
                    fin: true,
                    bytes: Bytes::from_static(b"hi")
                },
                10
            )
        );
        assert_eq!(
            decode(&wire[10..]).unwrap(),
            Some((Frame::Ping { id: 1 }, 12))
        );
    }

    #[test]
    fn hostile_frames_are_refused_before_they_are_held() {
        assert_eq!(
            decode(&[0, 0, 0, 1, 0, 0xff, 0xff, 0xff]),
            Err(FrameError::TooLong(0xff_ffff))
        );
        assert_eq!(
            decode(&[0x80, 2, 0, 1, 0, 0, 0, 0]),
            Err(FrameError::Version(2))
        );
        assert_eq!(
            decode(&[0x80, 3, 0, 1, 0, 0, 0, 1, 0]),
            Err(FrameError::Truncated(1))
        );
        assert_eq!(
            decode(&[0x80, 3, 0, 1, 0, 1, 0, 1]),
            Err(FrameError::TooLong(0x1_0001))
        );
        assert_eq!(decode(&[0x80]), Ok(None));
    }
}
