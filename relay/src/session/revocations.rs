//! Revocation at a relay: reads the list where the authority keeps it, ends the live carriers and lines
//! that it covers, and announces a newer one to agents and local proxies.

use std::sync::Arc;
use std::time::Duration;

use throwline_certs::directory::DirectoryError;
use throwline_certs::{Directory, SignedRevocations};
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::proto::messages::{Refusal, RefusalCode, RevocationList};
use throwline_tunnel::proto::wire::{self, REVOCATIONS_CAP, WireError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::answer::answer;
use crate::live::LiveRegistry;
use crate::metrics::Metrics;
use crate::refusals::refuse;

/// How often the database is asked whether something was revoked: one row by its key. A shared
/// database sends a notification at once, which can be lost.
const LOOK: Duration = Duration::from_secs(2);

/// The list of revocations, kept up to date.
pub(crate) struct RevocationFeed {
    directory: Arc<dyn Directory>,
    live: Arc<LiveRegistry>,
    metrics: Metrics,
    /// `None` while nothing was ever revoked.
    signed: watch::Sender<Option<Arc<SignedRevocations>>>,
}

/// Why the list cannot be sent.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error(transparent)]
    Encode(#[from] WireError),
}

impl RevocationFeed {
    pub(crate) fn new(
        directory: Arc<dyn Directory>,
        live: Arc<LiveRegistry>,
        metrics: Metrics,
    ) -> Self {
        Self {
            directory,
            live,
            metrics,
            signed: watch::Sender::new(None),
        }
    }

    /// Reads the list, if it has changed, and ends what it covers.
    pub(crate) async fn refresh(&self) -> Result<(), DirectoryError> {
        let Some(signed) = self.directory.refresh_revocations().await? else {
            return Ok(());
        };
        let ended = self.live.end_revoked();
        let version = self.directory.validator().revocations().version();
        info!(version, ended, "the list of revocations has changed");
        self.signed.send_replace(Some(Arc::new(signed)));
        Ok(())
    }

    /// Changes whenever there is a newer list.
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Arc<SignedRevocations>>> {
        self.signed.subscribe()
    }

    /// Keeps the list in step with the authority's database, until the relay ends.
    pub(crate) async fn run(&self, closing: CancellationToken) {
        // Covers notifications that were lost with a connection to the database.
        let mut tick = tokio::time::interval(LOOK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let notified = notification(Arc::clone(&self.directory));
        tokio::pin!(notified);
        let mut is_away = false;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                () = &mut notified => notified.set(notification(Arc::clone(&self.directory))),
                () = closing.cancelled() => return,
            }
            match self.refresh().await {
                Ok(()) => is_away = false,
                // Until the database is back, the previous list stays in force.
                Err(error) if !is_away => {
                    is_away = true;
                    warn!(%error, "cannot read the revocations; trying on");
                }
                Err(_) => {}
            }
        }
    }

    /// `FetchRevocations`: the signed list as it is.
    pub(super) async fn serve(&self, stream: IncomingStream) {
        let present = self.signed.borrow().clone();
        let signed = match present {
            Some(signed) => Ok(signed),
            None => self.directory.signed_revocations().await.map(Arc::new),
        };
        let bytes = signed.map_err(FetchError::from).and_then(|signed| {
            let message = RevocationList {
                list: signed.list.clone(),
                signature: signed.signature.clone(),
            };
            Ok(wire::encode_long(&message, REVOCATIONS_CAP)?)
        });
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                error!(%error, "the list of revocations cannot be sent");
                let refusal =
                    Refusal::new(RefusalCode::Internal, "there is no list of revocations now");
                return refuse(&self.metrics, stream, refusal).await;
            }
        };
        answer(stream, &bytes, "a list of revocations").await;
    }
}

/// Ends when another process of a shared database notifies of a revocation.
async fn notification(directory: Arc<dyn Directory>) {
    while let Err(error) = directory.revocations_changed().await {
        debug!(%error, "cannot listen for revocations");
        tokio::time::sleep(LOOK).await;
    }
}
