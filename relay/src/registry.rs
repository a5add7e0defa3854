//! Which cluster's tunnels are where.

pub(crate) mod duplicates;
mod membership;
mod memory;
pub mod postgres;
mod route;
mod table;
mod tunnel;

pub use membership::{Membership, Registry};
pub use memory::Memory;
pub use route::{PeerRelay, Presence, Remote, Route};
pub use tunnel::{Status, Tunnel};
