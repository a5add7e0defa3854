//! The part of Throwline on the user's machine.
//!
//! kubectl speaks HTTPS to [`run`] on a loopback port; each request travels on a sealed session to
//! the agent of the cluster that its path names. The crate also owns the user's identity
//! ([`store`], [`login()`]) and our entries in the kubeconfig ([`kubeconfig`]).
//!
//! **Invariant:** only holders of the kubeconfig's client certificate get past the loopback TLS.
//! **Invariant:** a stream that was cut reaches kubectl as a cut or with an error of its protocol's own,
//! never as a clean, short end.
//! **Invariant:** only [`status`] turns errors into HTTP responses.

mod body;
mod clusters;
mod config;
mod error;
mod forward;
mod headers;
pub mod kubeconfig;
mod last_words;
mod login;
mod loopback;
mod metrics;
mod route;
mod run;
mod server;
mod session;
pub mod status;
pub mod store;
#[cfg(test)]
mod testing;
mod upgrade;

pub use clusters::clusters;
pub use config::{Config, DEFAULT_PORT, Outbound, Timing, default_kubeconfig, default_state_dir};
pub use error::{Error, Failure};
pub use login::{LoginError, LoginOutcome, login};
pub use metrics::Metrics;
pub use run::{Ready, run};
pub use store::{Store, StoreError};
