//! The size of the pieces that bulk goes in, from end to end.
//!
//! What a piece costs beside its bytes, some thousand steps and a wake-up in each process, is paid
//! for each of them; and it is copied from layer to layer, which is fast while all the copies are
//! in the processor's cache. Measured on 512 KiB of second-level cache: pieces of 16 KiB take 15 %
//! more CPU than those of 32 to 128 KiB, which are alike.
//!
//! Each layer takes the piece of the layer above with its headers whole, or every piece would leave
//! a second one of a few bytes, which costs almost as much as the first.

/// Bytes of a piece: what one DATA frame of HTTP/2 holds, two full TLS records.
pub const PIECE: usize = 32 * 1024;

/// The same, sealed, with what HTTP/2, TLS and the line put before and behind it: less than 200 bytes.
/// The rest is room for what else waits to leave.
pub(crate) const SEALED: usize = 40 * 1024;

/// Bytes of one WebSocket message, which together with its header (RFC 6455 section 5.2: 14 bytes at
/// most) are three TLS records of 16 KiB.
pub(crate) const MESSAGE: usize = 48 * 1024 - 14;

const _: () = {
    assert!(PIECE + 200 <= SEALED);
    // A yamux header before it.
    assert!(SEALED + 12 <= MESSAGE);
    assert!(SEALED <= crate::proto::line::MAX_DATA);
};
