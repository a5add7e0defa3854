//! Lines of users: from a relay's stream to a session, and the lines that outlive their streams.

mod accept;
mod bulk;
pub mod line_registry;

pub(crate) use accept::{LineAcceptor, UserOptions};
pub(crate) use bulk::BulkCarrier;
pub(crate) use line_registry::LineRegistry;
