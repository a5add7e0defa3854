//! Lines of users: from a relay's stream to a session, and the lines that outlive their streams.

mod accept;
pub mod line_registry;

pub(crate) use accept::{LineAcceptor, UserOptions};
pub(crate) use line_registry::LineRegistry;
