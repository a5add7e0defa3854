//! Why a relay could not start or had to end.

use std::io;

use throwline_certs::NameError;
use throwline_certs::directory::DirectoryError;
use throwline_certs::tls::CertifyError;
use url::Url;

/// Why a relay could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operator has to change the configuration.
    #[error("the relay's configuration is wrong: {0}")]
    Config(#[from] ConfigError),
    /// The certificate, the key or their files.
    #[error("the relay has no usable TLS certificate: {0}")]
    Tls(#[source] throwline_certs::Error),
    #[error("the authority's list of revocations cannot be read: {0}")]
    Revocations(#[source] DirectoryError),
    #[error("the authority issues no certificate to this relay: {0}")]
    Certificate(#[source] CertifyError),
    #[error(transparent)]
    Database(#[from] throwline_database::Error),
    #[error("the metrics could not be registered: {0}")]
    Metrics(#[from] prometheus::Error),
    #[error("the threads for handshakes could not be started: {0}")]
    Threads(#[source] io::Error),
    #[error("the admin listener failed: {0}")]
    Admin(#[source] io::Error),
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Relays are reached by this URL.
    #[error("the public URL {0} is not https://HOST[:PORT]")]
    PublicUrl(Url),
    /// The other relays reach this one at this address.
    #[error("the address for peers {0:?} is not HOST:PORT, by which other relays reach this one")]
    PeerAddress(String),
    /// The name of this relay is not one label.
    #[error(transparent)]
    Instance(NameError),
    /// A heartbeat would expire before the next one.
    #[error("a heartbeat's life must be at least twice its interval")]
    HeartbeatLife,
    /// A limit is 0.
    #[error("a relay without carriers or streams cannot serve any agent or user")]
    NoCapacity,
    /// The header is accepted from named balancers only.
    #[error(
        "the PROXY protocol is accepted only from named balancers; name them with --trust-proxy"
    )]
    NoTrustedProxies,
}
