//! The public meeting point of agents and users: authenticates carriers, routes sealed lines.
//!
//! ```text
//! listener ─ public ─ accept ─ session ─┬ open ─ registry, policy ─ splice
//!   TCP, TLS  HTTP     who?     a carrier ├ list
//!                                        └ renew
//! peers: the same between relays, for lines to agents that are connected to another one
//! ```
//!
//! **Invariant:** a line goes where the identities say that two carriers have proved; `Host`,
//! path and everything else that a peer merely claims decide nothing.
//!
//! **Invariant:** the relay never holds a key of a sealed session, so it copies bytes that it
//! cannot read.

pub mod accept;
mod config;
mod control;
mod enrol;
mod error;
mod half_open;
mod list;
mod listener;
mod metrics;
mod open;
mod origin;
mod pace;
mod peers;
pub mod policy;
mod proxy_header;
mod public;
mod rate;
pub mod registry;
mod relay;
mod renew;
mod replay;
mod response;
mod session;
mod tally;

use throwline_certs::authority::Authority;
use throwline_ops::Shutdown;
use tokio::net::TcpListener;

pub use config::{Config, Limits, Timing, Tls};
pub use error::Error;
pub use relay::Relay;
pub use response::Body;

/// Serves agents and users on `listener`, operators on `admin`, until `shutdown`; see
/// [`Relay::run`].
pub async fn run(
    listener: TcpListener,
    admin: Option<TcpListener>,
    authority: Authority,
    config: Config,
    shutdown: Shutdown,
) -> Result<(), Error> {
    Relay::new(authority, config)
        .run(listener, admin, shutdown)
        .await
}
