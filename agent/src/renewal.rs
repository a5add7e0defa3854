//! The agent's certificate, renewed by `throwline-uplink`, saved and put to use.

use std::path::Path;
use std::time::{Duration, SystemTime};

use throwline_tunnel::carrier::Carrier;
use throwline_uplink::{DialFailure as _, Successor};

use crate::connect_error::ConnectError;
use crate::identity::AgentIdentity;

#[derive(Debug, thiserror::Error)]
pub(crate) enum RenewalError {
    #[error(transparent)]
    Renewal(#[from] throwline_uplink::RenewalError),
    /// There is no carrier for it.
    #[error(transparent)]
    Dial(#[from] ConnectError),
    #[error(transparent)]
    Own(#[from] throwline_certs::Error),
}

impl RenewalError {
    /// The wait that the relay asks for.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Renewal(error) => error.retry_after(),
            Self::Dial(failure) => failure.retry_after(),
            Self::Own(_) => None,
        }
    }

    /// Whether the authority does not renew this identity, now or later.
    pub(crate) fn is_final(&self) -> bool {
        matches!(self, Self::Renewal(error) if error.is_final())
    }
}

/// Renews, saves and puts to use; on any failure the old identity stays as it is.
pub(crate) async fn renew(
    agent: &AgentIdentity,
    carrier: &Carrier,
    state_dir: &Path,
    successor: &mut Successor,
) -> Result<SystemTime, RenewalError> {
    let old = agent.identity();
    let identity = successor.renew(carrier, &old, agent.validator()).await?;
    identity.save(state_dir)?;
    let not_after = identity.not_after();
    agent.replace(identity)?;
    Ok(not_after)
}
