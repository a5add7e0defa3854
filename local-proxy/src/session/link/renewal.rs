//! Renewal of the user's certificate at two thirds of its life, in the background. Live streams stay
//! as they are; only what is opened later uses the new one.

use std::time::{Duration, SystemTime};

use rand::Rng as _;
use throwline_tunnel::proto::traffic::TrafficClass;
use tokio::time::sleep;

use super::Link;
use crate::failure::Failure;
use crate::session::renew::{renewed_over, save};
use crate::store::Credentials;

/// Interval of looks at the clock: a timer of hours is late by the time that a laptop slept.
const CLOCK_POLL: Duration = Duration::from_secs(30);

impl Link {
    /// Renews the certificate whenever it is due. Never ends.
    pub(crate) async fn keep_renewed(self) {
        loop {
            let credentials = self.credentials();
            let now = SystemTime::now();
            let left = credentials.identity.not_after().duration_since(now);
            // After its end it is renewed by the next dial.
            let due = now >= credentials.identity.renew_at();
            let Some(left) = left.ok().filter(|_| due) else {
                sleep(CLOCK_POLL).await;
                continue;
            };
            match self.renew().await {
                Ok(()) => tracing::info!("certificate renewed"),
                Err(failure) => {
                    tracing::warn!(%failure, "certificate not renewed yet");
                    let retry = self
                        .0
                        .timing
                        .renew_retry
                        .mul_f64(rand::rng().random_range(0.8..1.2));
                    sleep(retry.min(left / 4).max(Duration::from_secs(1))).await;
                }
            }
        }
    }

    async fn renew(&self) -> Result<(), Failure> {
        let (carrier, _) = self.carrier(TrafficClass::Interactive).await?;
        let mut successor = self.0.successor.lock().await;
        let old = self.credentials();
        if SystemTime::now() < old.identity.renew_at() {
            // A dial was faster.
            return Ok(());
        }
        let identity = renewed_over(&carrier, &old, &mut successor).await?;
        save(&self.0.store, &identity).await;
        self.set_credentials(Credentials {
            identity,
            ..(*old).clone()
        });
        Ok(())
    }
}
