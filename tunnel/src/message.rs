//! Reading and writing length-prefixed messages on a stream, exactly: no byte behind the message
//! is taken off the stream.

use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::proto::wire::{self, WireError};

impl From<WireError> for io::Error {
    fn from(error: WireError) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, error)
    }
}

/// Reads one message with a 16-bit length. An end before the first byte is `UnexpectedEof`, like
/// an end in the middle. Put a deadline around it.
///
/// # Errors
/// The stream fails or ends, or the message is malformed or longer than `cap`.
pub async fn read<M, S>(stream: &mut S, cap: usize) -> io::Result<M>
where
    M: prost::Message + Default,
    S: AsyncRead + Unpin,
{
    let len = usize::from(stream.read_u16().await?);
    let bytes = bytes(stream, len, cap).await?;
    M::decode(bytes).map_err(|error| WireError::Malformed(error).into())
}

/// Reads one message with a 32-bit length.
///
/// # Errors
/// As [`read`].
pub async fn read_long<M, S>(stream: &mut S, cap: usize) -> io::Result<M>
where
    M: prost::Message + Default,
    S: AsyncRead + Unpin,
{
    let bytes = read_long_bytes(stream, cap).await?;
    M::decode(bytes).map_err(|error| WireError::Malformed(error).into())
}

/// Reads the bytes of one message with a 32-bit length, to be decoded with more care.
///
/// # Errors
/// As [`read`], without decoding.
pub async fn read_long_bytes<S: AsyncRead + Unpin>(
    stream: &mut S,
    cap: usize,
) -> io::Result<BytesMut> {
    let len = stream.read_u32().await?;
    bytes(stream, usize::try_from(len).unwrap_or(usize::MAX), cap).await
}

/// Writes one message with a 16-bit length, and flushes.
///
/// # Errors
/// The stream fails, or the message is longer than `cap`.
pub async fn write<M, S>(stream: &mut S, message: &M, cap: usize) -> io::Result<()>
where
    M: prost::Message,
    S: AsyncWrite + Unpin,
{
    let bytes = wire::encode(message, cap)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Writes one message with a 32-bit length, and flushes.
///
/// # Errors
/// As [`write()`].
pub async fn write_long<M, S>(stream: &mut S, message: &M, cap: usize) -> io::Result<()>
where
    M: prost::Message,
    S: AsyncWrite + Unpin,
{
    let bytes = wire::encode_long(message, cap)?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

async fn bytes<S: AsyncRead + Unpin>(
    stream: &mut S,
    len: usize,
    cap: usize,
) -> io::Result<BytesMut> {
    if len > cap {
        return Err(WireError::TooLarge { len, cap }.into());
    }
    // Grows with what arrives, so that a length alone allocates little.
    let mut buf = BytesMut::with_capacity(len.min(4096));
    let mut limited = stream.take(len as u64);
    while buf.len() < len {
        if limited.read_buf(&mut buf).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(buf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::messages::{Refusal, RefusalCode};

    #[tokio::test]
    async fn takes_exactly_its_message() {
        let refusal = Refusal::new(RefusalCode::Limit, "full");
        let mut wire = Vec::new();
        write(&mut wire, &refusal, 4096).await.unwrap();
        write_long(&mut wire, &refusal, 4096).await.unwrap();
        wire.extend_from_slice(b"rest");
        let mut reader = &wire[..];
        assert_eq!(
            read::<Refusal, _>(&mut reader, 4096).await.unwrap(),
            refusal
        );
        assert_eq!(
            read_long::<Refusal, _>(&mut reader, 4096).await.unwrap(),
            refusal
        );
        assert_eq!(reader, b"rest");
    }

    #[tokio::test]
    async fn a_cut_and_a_long_length_are_errors() {
        let mut cut = &b"\x00\x08\x08\x03"[..];
        let error = read::<Refusal, _>(&mut cut, 4096).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        let mut long = &b"\x20\x00"[..];
        let error = read::<Refusal, _>(&mut long, 4096).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
