//! The public meeting point of agents and users: authenticates carriers, routes sealed lines.
//!
//! ```text
//! relay ─ http ─────── session ─ routing ─ registry ─ limits, metrics, config
//!         TCP, TLS,     a carrier  a line
//!         who is it?
//! ```
//!
//! Folders import in this order only, and each has a struct that owns its dependencies: `Listener`,
//! `Sessions`, `Router`. `relay` builds them.
//!
//! **Invariant:** a line goes where the identities say that two carriers have proved; `Host`,
//! path and everything else that a peer merely claims decide nothing.
//!
//! **Invariant:** the relay never holds a key of a sealed session, so it copies bytes that it
//! cannot read.

#![warn(clippy::mod_module_files)]

mod clock;
mod config;
mod error;
mod http;
mod lifecycle;
mod limits;
mod live;
mod metrics;
mod peer;
pub mod policy;
mod refusals;
pub mod registry;
mod relay;
mod routing;
mod session;

use std::sync::Arc;

use throwline_certs::Directory;
use throwline_ops::Shutdown;
use tokio::net::TcpListener;

pub use self::http::{AssertionError, Authenticator, Body, Denied, VerifiedAssertion};
pub use config::{Config, Limits, Timing, Tls};
pub use error::{ConfigError, Error};
pub use relay::Relay;

/// Serves agents and users on `listener`, operators on `admin`, until `shutdown`; see
/// [`Relay::run`].
pub async fn run(
    listener: TcpListener,
    admin: Option<TcpListener>,
    authority: Arc<dyn Directory>,
    config: Config,
    shutdown: Shutdown,
) -> Result<(), Error> {
    Relay::new(authority, config)
        .run(listener, admin, shutdown)
        .await
}
