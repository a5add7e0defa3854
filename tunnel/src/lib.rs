//! The transport that relay, agent and local proxy share.
//!
//! ```text
//! session (TLS 1.3)  ─ session   end to end, opaque to the relay
//! line               ─ line      offsets, acknowledgements, an explicit end
//! stream             ─ mux       yamux, one stream a line and hop
//! carrier            ─ carrier   WebSocket over TLS, pings, authentication of the dialer
//! ```
//!
//! `proto` is the wire format and its state machines: no I/O, no clock, no chance but what is
//! passed in. Only `ws` names tungstenite, only `mux` names yamux. The bytes are described in
//! `docs/protocol.md`.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

pub mod bdp;
pub mod budget;
pub mod carrier;
pub mod http2_error;
pub mod line;
pub mod message;
pub mod mux;
mod prefixed;
pub mod proto;
pub mod read_ahead;
pub mod renewal;
pub mod revocations;
pub mod session;
pub mod sizes;
mod slow_start;
pub mod splice;
pub mod ws;

pub use prefixed::PrefixedIo;
