//! The part of Throwline on the user's machine.
//!
//! kubectl speaks HTTPS to [`run()`] on a loopback port; each request travels on a sealed session to
//! the agent of the cluster that its path names. The crate also owns the user's identity
//! ([`store`], [`login()`]) and our entries in the kubeconfig ([`kubeconfig`]).
//!
//! **Invariant:** only holders of the kubeconfig's client certificate get past the loopback TLS.
//! **Invariant:** a stream that was cut reaches kubectl as a cut or with an error of its protocol's own,
//! never as a clean, short end.
//! **Invariant:** only [`status`] turns errors into HTTP responses.

#![warn(clippy::mod_module_files)]

mod cluster_name;
mod clusters;
mod config;
mod contexts;
mod error;
mod failure;
mod instance_lock;
pub mod kubeconfig;
mod login;
mod loopback;
mod metrics;
mod mutex;
mod refusal_text;
mod request;
mod run;
mod session;
pub mod status;
pub mod store;
#[cfg(test)]
mod testing;
mod text;

pub use clusters::clusters;
pub use config::{
    Config, DEFAULT_PORT, Limits, LoopbackLimits, Outbound, SessionLimits, Timing,
    default_kubeconfig, default_state_dir,
};
pub use error::Error;
pub use failure::Failure;
pub use login::{LoginError, LoginOutcome, login};
pub use loopback::tls::{CertificateError, LoopbackError};
pub use metrics::Metrics;
pub use run::{Ready, run};
pub use store::{Damage, Store, StoreError};
