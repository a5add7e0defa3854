//! What can go wrong: [`Error`] ends the proxy or a command, [`Failure`] ends one request.

use crate::{kubeconfig, login::LoginError, store::StoreError};
use std::{io, time::SystemTime};
use throwline_tunnel::proto::messages::Refusal;

/// Why `run` or `clusters` gave up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error(transparent)]
    Kubeconfig(#[from] kubeconfig::Error),
    /// The relay could not be used; says which step failed and what to do.
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
    #[error("{0} is not a cluster name: lower-case letters, digits and '-', at most 63")]
    BadClusterName(String),
    #[error(
        "the loopback certificates in {dir} cannot be used: {why}; remove the files loopback-* there and start again"
    )]
    Loopback { dir: String, why: String },
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
}

/// Why one request, line or relay call failed. Clonable, because requests that wait for the same
/// session share its outcome.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failure {
    /// The relay or the agent said no, and why.
    #[error("{}", refusal_text(cluster, refusal))]
    Refused { cluster: String, refusal: Refusal },
    /// Nobody answers at the relay, or what answers is no relay.
    #[error("the relay {relay} cannot be reached: {why}")]
    RelayUnreachable {
        relay: String,
        why: String,
        /// Whether dialling again, with nothing changed, may help.
        transient: bool,
    },
    /// The relay's TLS certificate is not one we trust.
    #[error("the relay {relay} cannot be trusted: {why}")]
    RelayNotTrusted { relay: String, why: String },
    /// The relay did not accept our identity.
    #[error(
        "the relay {relay} did not accept this machine's identity: {why}; if it was revoked, run 'throwline login' with a new token"
    )]
    RelayRefusesUs { relay: String, why: String },
    #[error("your certificate expired on {}: run 'throwline login' with a new token", rfc3339(*not_after))]
    CertificateExpired { not_after: SystemTime },
    /// The far end of the line is not the agent of that cluster, or its certificate is not from
    /// our authority. Somebody between may be tampering.
    #[error("the sealed session to cluster {cluster} failed: {why}")]
    SessionNotTrusted { cluster: String, why: String },
    /// The agent did not take our certificate.
    #[error("the agent of cluster {cluster} did not accept your certificate: {why}")]
    AgentRefusesUs { cluster: String, why: String },
    /// The line or its session ended before the answer began.
    #[error("the connection to cluster {cluster} was lost before it answered: {why}")]
    Lost { cluster: String, why: String },
    /// What had begun over a line ended with it: no way was found in time.
    #[error(
        "the connection to cluster {cluster} was lost for longer than {seconds} s (--detached-life) and was given up; run the command again ({why})"
    )]
    Expired {
        cluster: String,
        seconds: u64,
        /// Of the last attempt.
        why: String,
    },
    /// What had begun over a line ended with it, for another reason.
    #[error("the connection to cluster {cluster} has ended: {why}")]
    Ended { cluster: String, why: String },
    #[error("cluster {cluster} did not answer within {seconds} s")]
    Timeout { cluster: String, seconds: u64 },
    #[error("the local proxy is stopping")]
    Stopping,
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
}

impl Failure {
    /// Whether trying again at once, without anybody doing anything, can help.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::RelayUnreachable { transient, .. } => *transient,
            Self::Lost { .. } | Self::Timeout { .. } => true,
            _ => false,
        }
    }
}

fn refusal_text(cluster: &str, refusal: &Refusal) -> String {
    crate::status::refusal_message(cluster, refusal, SystemTime::now())
}

/// RFC 3339 in UTC, to the second.
pub(crate) fn rfc3339(at: SystemTime) -> String {
    let at = time::OffsetDateTime::from(at);
    at.replace_nanosecond(0)
        .unwrap_or(at)
        .format(&time::format_description::well_known::Rfc3339)
        .unwrap_or_else(|_| "an unknown time".to_owned())
}
