//! The transport that relay, agent and local proxy share.
//!
//! ```text
//! session (TLS 1.3)  ─ session   end to end, the relay never sees inside
//! line               ─ line      offsets, acknowledgements, an explicit end
//! stream             ─ mux       yamux, one stream a line and hop
//! carrier            ─ carrier   WebSocket over TLS, pings, the proof of who dials
//! ```
//!
//! `proto` is the wire format and its state machines: no I/O, no clock, no chance but what is
//! passed in. Only `ws` names tungstenite, only `mux` names yamux. The bytes are described in
//! `docs/protocol.md`.

pub mod carrier;
pub mod far;
pub mod http1;
pub mod line;
pub mod message;
pub mod mux;
pub mod piece;
pub mod proto;
mod ramp;
pub mod read_ahead;
pub mod session;
pub mod splice;
pub mod ws;
