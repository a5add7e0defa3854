//! The carrier: one WebSocket between a relay and its dialer, authenticated and multiplexed.
//!
//! One task drives a carrier (`driver`); streams are polled by their holders. When the
//! driver fails or panics, this carrier and its streams end and nothing else does.

mod accept;
mod config;
mod connect;
mod connection;
mod dial;
mod driver;
mod error;
mod flush_policy;
mod handle;
mod incoming;
mod proxy;
mod shared;
mod socket;
mod socket_options;
mod target;
mod timing;
mod upgrade;

pub use accept::{AcceptConfig, accept};
pub use config::{AssertFn, DialConfig, Prover, SignFn};
pub use connection::{Connection, RelayName};
pub use dial::{dial, dial_over};
pub use error::{AcceptError, BoxError, DialError, OpenError};
pub use handle::Carrier;
pub use incoming::{Incoming, IncomingStream};
pub use proxy::{BadProxy, Proxies, ProxyFault, reach};
pub use socket_options::set_socket_options;
pub use timing::Timing;
