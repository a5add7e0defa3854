//! Why there is no answer from the API server.

use std::error::Error as _;
use std::io;
use std::time::Duration;

use throwline_tunnel::http2_error;

/// Why there is no answer from the API server. Each names the component at fault.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The network between agent and API server, or an API server that is down.
    #[error("the agent cannot reach its cluster's API server: {0}")]
    Connect(#[from] ConnectError),
    /// The API server's certificate, or the agent's CA for it.
    #[error("the agent and its cluster's API server cannot agree on TLS: {0}")]
    Tls(#[source] rustls::Error),
    /// The agent's own account: an exec plugin, a token file.
    #[error("the agent has no credentials for its cluster's API server: {0}")]
    Credentials(#[from] CredentialsError),
    /// Our own bound on connections.
    #[error("the agent has the most requests under way that it may have; try again")]
    Busy,
    /// The API server broke the exchange off, and the request may have been processed.
    #[error("the cluster's API server broke off the request before it answered: {0}")]
    Exchange(#[from] ExchangeError),
    /// The API server's process, or the network to it, is stuck: nothing arrives on an open connection.
    #[error("the cluster's API server does not answer: nothing arrived on its connection for {} s, not even a reply to a PING", .0.as_secs())]
    Silent(Duration),
    /// The API server violated HTTP.
    #[error("the cluster's API server gave an answer that cannot be passed on: {0}")]
    Broken(&'static str),
    #[error("the cluster's API server did not answer in time")]
    Timeout,
}

/// Why the agent's account is not authenticated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialsError {
    /// An exec plugin or a token file.
    #[error(transparent)]
    Refresh(#[from] BoxError),
    #[error("the API server does not accept them (401)")]
    Rejected,
}

/// How an exchange was broken off.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExchangeError {
    #[error("{}", describe(.0))]
    Http(#[source] hyper::Error),
    /// While an answer was read whole.
    #[error(transparent)]
    Body(BoxError),
}

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no connection to the API server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    #[error("{host}:{port}: {source}")]
    Tcp {
        host: String,
        port: u16,
        source: io::Error,
    },
    #[error("{host}:{port} does not answer within {} s", within.as_secs())]
    Timeout {
        host: String,
        port: u16,
        within: Duration,
    },
    /// Cut in the handshake of TLS.
    #[error(transparent)]
    Handshake(io::Error),
    /// Cut in the handshake of HTTP.
    #[error(transparent)]
    Http(hyper::Error),
}

fn describe(error: &hyper::Error) -> String {
    match error.source() {
        Some(cause) => match cause.downcast_ref::<h2::Error>() {
            Some(cause) => format!("{error}: {}", http2_error::describe(cause)),
            None => format!("{error}: {cause}"),
        },
        None => error.to_string(),
    }
}
