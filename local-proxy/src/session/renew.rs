//! Renewal of the user's certificate at two thirds of its life, in the background. Live streams
//! stay as they are; only what is opened later uses the new one.

use super::link::Link;
use crate::error::Failure;
use rand::Rng as _;
use std::time::{Duration, SystemTime};
use throwline_certs::{PendingIdentity, Usage, Validator, Want};
use throwline_tunnel::{
    message,
    proto::{
        messages::{Certificate, Renew, StreamKind},
        wire::CERTIFICATE_CAP,
    },
};
use tokio::time::{sleep, timeout};

/// The clock is looked at this often: a timer set for hours is late by the time a laptop slept.
const LOOK: Duration = Duration::from_secs(30);
/// Between attempts, ± 20 %, unless the certificate's end is near.
const RETRY: Duration = Duration::from_secs(300);
const ANSWER: Duration = Duration::from_secs(15);

impl Link {
    /// Renews when it is time, for ever.
    pub(crate) async fn keep_renewed(self) {
        loop {
            let credentials = self.credentials();
            let now = SystemTime::now();
            let left = credentials.identity.not_after().duration_since(now);
            // After its end only a new token helps, and the dial says so.
            let due = now >= credentials.identity.renew_at();
            let Some(left) = left.ok().filter(|_| due) else {
                sleep(LOOK).await;
                continue;
            };
            match self.renew().await {
                Ok(()) => tracing::info!("certificate renewed"),
                Err(failure) => {
                    tracing::warn!(%failure, "certificate not renewed yet");
                    let retry = RETRY.mul_f64(rand::rng().random_range(0.8..1.2));
                    sleep(retry.min(left / 4).max(Duration::from_secs(1))).await;
                }
            }
        }
    }

    async fn renew(&self) -> Result<(), Failure> {
        let internal = |error: &dyn std::fmt::Display| Failure::Internal(error.to_string());
        let pending = PendingIdentity::generate().map_err(|e| internal(&e))?;
        let (carrier, _) = self.carrier().await?;
        let csr = pending.csr_der().to_vec();
        let (mut stream, _) = carrier
            .open(StreamKind::Renew(Renew { csr }).into())
            .await
            .map_err(|error| super::open_error("of the authority", error))?;
        let certificate: Certificate = timeout(ANSWER, message::read(&mut stream, CERTIFICATE_CAP))
            .await
            .map_err(|_| Failure::Internal("the authority did not answer in time".to_owned()))?
            .map_err(|e| internal(&e))?;

        // What a relay hands us as a certificate is believed as far as the roots we have go. Its
        // `ca` is not: a relay must not be able to make itself an authority.
        let chain: Vec<_> = certificate.chain.into_iter().map(Into::into).collect();
        let old = self.credentials();
        let domain = old.roots.trust_domain().clone();
        let want = Want {
            usage: Usage::Client,
            ..Want::SESSION_USER
        };
        let peer = Validator::new(old.roots.clone(), domain)
            .check(&chain, want, SystemTime::now())
            .map_err(|e| internal(&e))?;
        if peer.id != *old.identity.id() {
            return Err(Failure::Internal(format!(
                "the new certificate is for {}, not for {}",
                peer.id,
                old.identity.id()
            )));
        }
        let identity = pending.complete(chain).map_err(|e| internal(&e))?;
        let mut credentials = (*old).clone();
        credentials.identity = identity.clone();
        let store = self.store().clone();
        let saved = tokio::task::spawn_blocking(move || store.save_identity(&identity)).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!(%error, "the renewed certificate cannot be saved; this process uses it");
        }
        self.set_credentials(credentials);
        Ok(())
    }
}
