//! Length-prefixed protobuf messages.
//!
//! A message is a big-endian length followed by that many bytes. The length is checked before
//! anything is allocated or decoded. Too few bytes are `Ok(None)`, never an error; bytes after the
//! message stay in the buffer.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Challenge, Proof, Welcome; 4 KiB.
pub const HANDSHAKE_CAP: usize = 4096;
/// `StreamHeader` and `StreamReply`; 4 KiB.
pub const HEADER_CAP: usize = 4096;
/// `ControlMessage`; 4 KiB.
pub const CONTROL_CAP: usize = 4096;
/// The messages of a renewal; 16 KiB holds a chain of eight.
pub const CERTIFICATE_CAP: usize = 16 * 1024;
/// `ClusterList`, which alone has a 32-bit length; 4 MiB.
pub const CLUSTER_LIST_CAP: usize = 4 * 1024 * 1024;

/// `RevocationList`, which has a 32-bit length too; 4 MiB.
pub const REVOCATIONS_CAP: usize = 4 * 1024 * 1024;
/// `LineCredentials` and its reply; 60 KiB hold a thousand lines.
pub const CREDENTIALS_CAP: usize = 60 * 1024;

/// Why bytes are not a message, or a message cannot be bytes.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The sender's fault: the length exceeds what the reader accepts.
    #[error("message of {len} bytes is over the limit of {cap}")]
    TooLarge {
        /// The length in bytes.
        len: usize,
        /// The limit in bytes.
        cap: usize,
    },
    /// The sender's fault: more of something than the reader is willing to hold.
    #[error("message has more than {cap} entries")]
    TooMany {
        /// The limit in bytes.
        cap: usize,
    },
    /// The sender's fault: the bytes are not the message that belongs here.
    #[error("message is malformed: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// Encodes with a 16-bit length. A message over `cap` is refused here rather than by the peer.
///
/// # Errors
/// The message is longer than `cap`.
pub fn encode<M: prost::Message>(message: &M, cap: usize) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    let cap = cap.min(usize::from(u16::MAX));
    let prefix = u16::try_from(len).ok().filter(|_| len <= cap);
    let prefix = prefix.ok_or(WireError::TooLarge { len, cap })?;
    let mut out = BytesMut::with_capacity(2 + len);
    out.put_u16(prefix);
    message.encode_raw(&mut out);
    Ok(out.freeze())
}

/// Takes one message with a 16-bit length off the front of `buf`.
///
/// # Errors
/// The message is malformed or longer than `cap`.
pub fn decode<M: prost::Message + Default>(
    buf: &mut BytesMut,
    cap: usize,
) -> Result<Option<M>, WireError> {
    let Some(prefix) = buf.first_chunk::<2>() else {
        return Ok(None);
    };
    take(buf, 2, usize::from(u16::from_be_bytes(*prefix)), cap)
}

/// Encodes with a 32-bit length.
///
/// # Errors
/// The message is longer than `cap`.
pub fn encode_long<M: prost::Message>(message: &M, cap: usize) -> Result<Bytes, WireError> {
    let len = message.encoded_len();
    let prefix = u32::try_from(len).ok().filter(|_| len <= cap);
    let prefix = prefix.ok_or(WireError::TooLarge { len, cap })?;
    let mut out = BytesMut::with_capacity(4 + len);
    out.put_u32(prefix);
    message.encode_raw(&mut out);
    Ok(out.freeze())
}

/// Takes one message with a 32-bit length off the front of `buf`.
///
/// # Errors
/// The message is malformed or longer than `cap`.
pub fn decode_long<M: prost::Message + Default>(
    buf: &mut BytesMut,
    cap: usize,
) -> Result<Option<M>, WireError> {
    let Some(prefix) = buf.first_chunk::<4>() else {
        return Ok(None);
    };
    let len = usize::try_from(u32::from_be_bytes(*prefix)).unwrap_or(usize::MAX);
    take(buf, 4, len, cap)
}

fn take<M: prost::Message + Default>(
    buf: &mut BytesMut,
    prefix: usize,
    len: usize,
    cap: usize,
) -> Result<Option<M>, WireError> {
    if len > cap {
        return Err(WireError::TooLarge { len, cap });
    }
    if buf.len() < prefix + len {
        return Ok(None);
    }
    buf.advance(prefix);
    Ok(Some(M::decode(buf.split_to(len))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::messages::{Challenge, Refusal, RefusalCode};
    use prost::Message as _;

    fn refusal() -> Refusal {
        Refusal::new(RefusalCode::Offline, "gone")
    }

    #[test]
    fn golden_bytes() {
        let bytes = encode(&refusal(), HEADER_CAP).unwrap();
        assert_eq!(bytes.as_ref(), b"\x00\x08\x08\x03\x12\x04gone");
        let long = encode_long(&refusal(), HEADER_CAP).unwrap();
        assert_eq!(long.as_ref(), b"\x00\x00\x00\x08\x08\x03\x12\x04gone");
    }

    #[test]
    fn one_byte_at_a_time_with_trailing_bytes() {
        let mut wire = encode(&refusal(), HEADER_CAP).unwrap().to_vec();
        let complete = wire.len();
        wire.extend_from_slice(b"tail");
        let mut buf = BytesMut::new();
        for (index, byte) in wire.iter().enumerate() {
            buf.put_u8(*byte);
            let got: Option<Refusal> = decode(&mut buf, HEADER_CAP).unwrap();
            if index + 1 == complete {
                assert_eq!(got, Some(refusal()));
                break;
            }
            assert_eq!(got, None);
        }
        buf.extend_from_slice(&wire[complete..]);
        assert_eq!(buf.as_ref(), b"tail");
    }

    #[test]
    fn length_over_the_cap_is_refused_before_the_body_arrives() {
        let mut buf = BytesMut::from(&b"\xff\xff"[..]);
        let got = decode::<Refusal>(&mut buf, HEADER_CAP);
        assert!(matches!(got, Err(WireError::TooLarge { len: 65535, .. })));
        let mut buf = BytesMut::from(&b"\xff\xff\xff\xff"[..]);
        assert!(decode_long::<Refusal>(&mut buf, CLUSTER_LIST_CAP).is_err());
        let big = Refusal {
            message: "x".repeat(5000),
            ..refusal()
        };
        assert!(encode(&big, HEADER_CAP).is_err());
    }

    #[test]
    fn newer_fields_are_skipped_and_nonsense_is_malformed() {
        // Field 15, varint: a newer peer's addition.
        let mut body = refusal().encode_to_vec();
        body.extend_from_slice(&[0x78, 0x01]);
        let mut buf = BytesMut::new();
        buf.put_u16(u16::try_from(body.len()).unwrap());
        buf.extend_from_slice(&body);
        assert_eq!(decode(&mut buf, HEADER_CAP).unwrap(), Some(refusal()));

        let mut buf = BytesMut::from(&b"\x00\x02\x0a\xff"[..]);
        let got = decode::<Refusal>(&mut buf, HEADER_CAP);
        assert!(matches!(got, Err(WireError::Malformed(_))));
    }

    proptest::proptest! {
        #[test]
        fn hostile_bytes_never_panic_and_never_grow(bytes in proptest::collection::vec(0u8.., 0..600)) {
            let mut buf = BytesMut::from(&bytes[..]);
            let before = buf.len();
            let _ = decode::<Challenge>(&mut buf, HANDSHAKE_CAP);
            proptest::prop_assert!(buf.len() <= before);
            let mut buf = BytesMut::from(&bytes[..]);
            let _ = decode_long::<Refusal>(&mut buf, HANDSHAKE_CAP);
        }

        #[test]
        fn what_is_encoded_is_decoded(message in ".{0,200}", code in 0i32..20, ms in 0u64..) {
            let refusal = Refusal { code, message, retry_after_ms: ms, since_unix_ms: ms };
            let mut buf = BytesMut::from(encode(&refusal, HEADER_CAP).unwrap().as_ref());
            proptest::prop_assert_eq!(decode(&mut buf, HEADER_CAP).unwrap(), Some(refusal));
            proptest::prop_assert!(buf.is_empty());
        }
    }
}
