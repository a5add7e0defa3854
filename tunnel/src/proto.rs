//! The wire format and its state machines, without I/O.
//!
//! **Invariant:** nothing here reads a clock, a socket or a source of randomness; time and seeds are
//! arguments. Nothing here imports from the rest of the crate, or panics on bytes from a peer.

pub mod assertion;
pub mod backoff;
pub mod busy;
pub mod challenge;
pub mod close;
pub mod cluster_list;
pub mod line;
pub mod liveness;
pub mod messages;
pub mod origin;
pub mod pacer;
pub mod traffic;
pub mod wire;

/// The newest carrier protocol this build speaks.
pub const VERSION: u32 = 1;

/// The oldest carrier protocol this build still speaks.
pub const VERSION_MIN: u32 = 1;

/// WebSocket sub-protocol of carrier version 1. A peer that offers none that the relay
/// supports is answered 426 with the list of those it supports.
pub const SUBPROTOCOL: &str = "throwline.v1";

/// Path of the carrier endpoint below the relay's public URL.
pub const CARRIER_PATH: &str = "v1/carrier";
