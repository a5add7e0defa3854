//! How many carriers there may be: of all identities, and of each one.

use std::sync::Arc;

use throwline_certs::PeerIdentity;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::keyed::{KeyedLimit, Permit};

pub(crate) struct CarrierLimit {
    all: Arc<Semaphore>,
    per_identity: KeyedLimit,
}

/// The right to one carrier, until it is dropped.
pub(crate) struct CarrierPermit {
    _of_all: OwnedSemaphorePermit,
    _of_identity: Permit,
}

#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(crate) enum LimitReached {
    #[error("the relay holds as many carriers as it may")]
    Relay,
    #[error("this identity holds as many carriers as it may")]
    Identity,
}

impl CarrierLimit {
    pub(crate) fn new(all: usize, per_identity: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(all.min(Semaphore::MAX_PERMITS))),
            per_identity: KeyedLimit::new(per_identity),
        }
    }

    pub(crate) fn take(&self, peer: &PeerIdentity) -> Result<CarrierPermit, LimitReached> {
        let all = Arc::clone(&self.all);
        Ok(CarrierPermit {
            _of_all: all.try_acquire_owned().map_err(|_| LimitReached::Relay)?,
            _of_identity: self
                .per_identity
                .take(&peer.id.to_string())
                .ok_or(LimitReached::Identity)?,
        })
    }
}

impl LimitReached {
    /// The limit's name in metrics.
    pub(crate) fn limit(self) -> &'static str {
        match self {
            Self::Relay => "carriers",
            Self::Identity => "carriers-per-identity",
        }
    }
}
