//! The first record of a TLS handshake, read before any work is done for it.

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// ContentType handshake, RFC 8446, section 5.1.
const HANDSHAKE: u8 = 22;
const HEADER: usize = 5;
/// Longest payload of a plaintext record: 2^14.
const LONGEST: usize = 16 * 1024;

/// How long the first record is, by its header; `None`: this does not begin a TLS handshake.
fn length(header: [u8; HEADER]) -> Option<usize> {
    let [kind, major, _, high, low] = header;
    let payload = usize::from(u16::from_be_bytes([high, low]));
    (kind == HANDSHAKE && major == 3 && (1..=LONGEST).contains(&payload))
        .then_some(HEADER + payload)
}

/// Reads the first record, which holds the ClientHello or its beginning. What begins no handshake is
/// given back as far as it was read, for TLS itself to reject.
///
/// # Errors
/// The connection's own, and `UnexpectedEof` where it ends within the record.
pub(crate) async fn read<T: AsyncRead + Unpin>(io: &mut T) -> std::io::Result<Bytes> {
    let mut header = [0; HEADER];
    io.read_exact(&mut header).await?;
    let Some(length) = length(header) else {
        return Ok(Bytes::copy_from_slice(&header));
    };
    let mut record = BytesMut::zeroed(length);
    record[..HEADER].copy_from_slice(&header);
    io.read_exact(&mut record[HEADER..]).await?;
    Ok(record.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_record_is_read_whole_and_no_more() {
        let wire: &[u8] = b"\x16\x03\x01\x00\x03abcbehind";
        let mut io = bytewise(wire);
        assert_eq!(read(&mut io).await.unwrap(), &wire[..8]);
        let mut rest = Vec::new();
        io.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"behind");
    }

    #[tokio::test]
    async fn what_is_no_handshake_is_left_to_tls_and_what_is_cut_is_an_error() {
        for wrong in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"\x17\x03\x03\x00\x03abc",
            b"\x16\x02\x00\x00\x03abc",
            b"\x16\x03\x01\x00\x00",
            b"\x16\x03\x01\x40\x01x",
        ] {
            assert_eq!(read(&mut bytewise(wrong)).await.unwrap(), &wrong[..5]);
        }
        for cut in [&b""[..], b"\x16\x03", b"\x16\x03\x01\x00\x03ab"] {
            let error = read(&mut bytewise(cut)).await.unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
        }
    }

    /// One byte at a time.
    fn bytewise(bytes: &'static [u8]) -> impl AsyncRead + Unpin {
        tokio_util::io::StreamReader::new(futures::stream::iter(
            bytes
                .iter()
                .map(|byte| Ok::<_, std::io::Error>(Bytes::copy_from_slice(&[*byte]))),
        ))
    }
}
