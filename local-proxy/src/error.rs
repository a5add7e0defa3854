//! What ends the proxy or a command.

use std::io;
use std::path::PathBuf;

use crate::failure::Failure;
use crate::kubeconfig;
use crate::login::LoginError;
use crate::loopback::tls::LoopbackError;
use crate::store::StoreError;

/// Why `run` or `clusters` gave up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error(transparent)]
    Kubeconfig(#[from] kubeconfig::Error),
    /// The relay could not be used.
    #[error(transparent)]
    Relay(#[from] Failure),
    #[error(
        "no port is free on 127.0.0.1 from {first} to {last}: {source}; choose another with --port"
    )]
    Listen {
        first: u16,
        last: u16,
        source: io::Error,
    },
    #[error(
        "a local proxy with the identity in {} runs already ({holder}); use it, or stop it first; \
         another identity goes into another --state-dir",
        dir.display()
    )]
    AlreadyRuns { dir: PathBuf, holder: String },
    #[error("{0} is not a cluster name: lower-case letters, digits and '-', at most 63")]
    BadClusterName(String),
    #[error(transparent)]
    Loopback(#[from] LoopbackError),
    /// A task of ours panicked.
    #[error("a task of the local proxy failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}
