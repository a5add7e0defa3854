//! Why a relay could not start or had to end.

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Ours to be told differently: the configuration does not fit.
    #[error("the relay's configuration is wrong: {0}")]
    Config(String),
    /// The certificate, the key or their files.
    #[error("the relay has no usable TLS certificate: {0}")]
    Tls(#[source] throwline_certs::Error),
    #[error("the metrics could not be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the admin listener failed: {0}")]
    Admin(#[source] io::Error),
}
