//! The codecs of exec, attach, cp and port-forward: WebSocket frames and the channels in their messages,
//! SPDY frames and their headers. Decoders only: who holds the connection is not known here.

pub mod channel;
pub mod spdy;
pub mod spdy_headers;
pub mod websocket;

/// Whether a path, without its query, is that of exec or attach: what runs there ends with a `Status`.
#[must_use]
pub fn is_command(path: &str) -> bool {
    path.ends_with("/exec") || path.ends_with("/attach")
}
