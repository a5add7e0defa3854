//! Sizes of the chunks that bulk data moves in, matched from layer to layer.
//!
//! Each chunk costs some thousand instructions and a wake-up in each process, whatever its size, and
//! is copied from layer to layer, which is cheap while all the copies fit in the processor's cache.
//! Measured with 512 KiB of second-level cache: chunks of 16 KiB take 15 % more CPU than those of 32
//! to 128 KiB, which are alike.
//!
//! Each layer takes a whole chunk of the layer above with its headers. Otherwise every chunk would
//! leave a second one of a few bytes, which costs almost as much as the first.

pub(crate) use crate::proto::line::SEALED_CHUNK;

/// Bytes in one DATA frame of HTTP/2: two full TLS records.
pub const BULK_CHUNK: usize = 32 * 1024;

/// Bytes of one WebSocket message, which together with its header (RFC 6455 section 5.2: 14 bytes at
/// most) are three TLS records of 16 KiB.
pub(crate) const WS_MESSAGE: usize = 48 * 1024 - 14;

const _: () = {
    // HTTP/2, TLS and the line add less than 200 bytes.
    assert!(BULK_CHUNK + 200 <= SEALED_CHUNK);
    // A yamux header before it.
    assert!(SEALED_CHUNK + 12 <= WS_MESSAGE);
};
