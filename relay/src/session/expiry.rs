//! How long a carrier may last.

use std::time::{Duration, SystemTime};

use throwline_certs::Directory;

use crate::clock::reached;
use crate::live::EndReason;

/// How long a carrier that is for a renewal alone may last.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(60);

/// Ends when the carrier may last no longer.
pub(super) async fn expiry(
    is_for_renewal: bool,
    not_after: SystemTime,
    directory: &dyn Directory,
) -> EndReason {
    if is_for_renewal {
        tokio::time::sleep(RENEWAL_TIMEOUT).await;
        return EndReason::RenewalTimeout;
    }
    reached(not_after, || directory.now()).await;
    EndReason::CertificateExpired
}
