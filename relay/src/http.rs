//! From an accepted TCP connection to an authenticated carrier, or to the answer to one request.
//!
//! ```text
//! listener ─┬ caller ─ client_addr, proxy_header
//!   TCP, TLS ├ client_hello
//!           └ requests ─┬ authenticator ─ denied ─ response
//!                       └ enrolment
//! ```

mod authenticator;
mod caller;
mod client_addr;
mod client_hello;
mod denied;
mod enrolment;
mod listener;
mod proxy_header;
mod requests;
mod response;

pub use authenticator::{Authenticator, VerifiedAssertion};
pub(crate) use caller::{Callers, ListenerKind};
pub(crate) use client_addr::TrustedProxies;
pub use denied::{AssertionError, Denied};
pub(crate) use enrolment::Enrolment;
pub(crate) use listener::Listener;
pub(crate) use requests::Requests;
pub use response::Body;
