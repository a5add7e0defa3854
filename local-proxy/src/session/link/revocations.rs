//! The list of revocations, as the relay delivers it over the control stream.

use std::sync::Arc;

use throwline_certs::SignedRevocations;
use throwline_certs::revocation::Keeper;
use throwline_tunnel::carrier::BoxError;
use throwline_tunnel::proto::messages::RevocationList;
use throwline_tunnel::revocations::Known;

use super::Link;

/// Lists go to the keeper of the authority that the carrier was dialled for.
pub(super) struct Lists {
    keeper: Arc<Keeper>,
    link: Link,
}

impl Lists {
    pub(super) fn of(link: &Link) -> Self {
        Self {
            keeper: link.revocations(),
            link: link.clone(),
        }
    }
}

impl Known for Lists {
    fn version(&self) -> u64 {
        self.keeper.version()
    }

    async fn take(&self, list: RevocationList) -> Result<u64, BoxError> {
        let signed = SignedRevocations {
            list: list.list,
            signature: list.signature,
        };
        let version = self.keeper.take(signed).await?;
        self.link.end_revoked(&self.keeper);
        Ok(version)
    }
}
