//! The authority issues and revokes identities. It has the CA in a state directory, and a small
//! database: beside it, where several processes (the relay, `throwline token create`) may have it
//! open at once, or in a PostgreSQL that several relays with the same CA share.
//!
//! A relay uses it through [`throwline_certs::directory::Directory`], commands through [`Authority`].
//!
//! **Invariant:** the CA's key is in the state directory and nowhere else.
//!
//! **Invariant:** a token's secret is never stored, and it is redeemed at most once, from
//! however many processes.

#![warn(missing_docs)]
#![warn(clippy::mod_module_files)]

mod authority;
mod ca;
mod csr;
mod directory;
mod error;
mod model;
mod name;
mod open;
mod store;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use authority::{Authority, Clock};
pub use error::{BoxError, ContentError, Error};
pub use model::{Released, Revoked, Subject, Target, Validity};
pub use open::Builder;
