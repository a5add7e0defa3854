//! The list of revocations as this agent's relays bring it.

use std::sync::Arc;

use throwline_certs::SignedRevocations;
use throwline_certs::revocation::Keeper;
use throwline_tunnel::carrier::BoxError;
use throwline_tunnel::proto::messages::RevocationList;
use throwline_tunnel::revocations::Known;

/// Lists from one carrier go to the one keeper that all carriers have: the newest counts.
pub(crate) struct Lists(pub(crate) Arc<Keeper>);

impl Known for Lists {
    fn version(&self) -> u64 {
        self.0.version()
    }

    async fn take(&self, list: RevocationList) -> Result<u64, BoxError> {
        let signed = SignedRevocations {
            list: list.list,
            signature: list.signature,
        };
        Ok(self.0.take(signed).await?)
    }
}
