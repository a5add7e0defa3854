//! What the HTTP/1.1 hops at both ends of a session share around the parser.

pub mod framing;
pub mod gate;
pub mod head;
pub mod interim;
pub mod request_line;
pub mod target;
