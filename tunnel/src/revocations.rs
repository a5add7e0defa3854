//! The dialer's side of the list of revocations: fetches it over a carrier whenever the relay tells of
//! a newer one than is known.
//!
//! A relay only carries the list. The caller decodes it, verifies the authority's signature and decides
//! which of two lists is the newer.

use std::io;
use std::time::Duration;

use tokio::sync::watch;

use crate::carrier::{BoxError, Carrier, OpenError};
use crate::message;
use crate::proto::messages::{FetchRevocations, RevocationList, StreamKind};
use crate::proto::wire::REVOCATIONS_CAP;

/// For a list of 2 MiB over a poor connection.
const ANSWER: Duration = Duration::from_secs(30);
/// Between two requests on one carrier, whatever its relay tells.
const PAUSE: Duration = Duration::from_secs(1);
/// The longest pause after requests in a row that brought nothing: a relay may tell of a version that
/// it never gives.
const LONGEST: Duration = Duration::from_secs(60);

/// Where lists go.
pub trait Known: Send + Sync {
    /// The version of the list that is in use; 0 while there is none.
    fn version(&self) -> u64;

    /// Checks a list and uses it if it is newer than the one in use; its version.
    ///
    /// # Errors
    /// It is not the authority's.
    fn take(&self, list: RevocationList) -> impl Future<Output = Result<u64, BoxError>> + Send;
}

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("the relay did not give it: {0}")]
    Open(#[from] OpenError),
    #[error("the relay's answer was cut: {0}")]
    Cut(#[from] io::Error),
    #[error("the relay did not answer within {} s", ANSWER.as_secs())]
    Timeout,
    #[error("{0}")]
    List(BoxError),
    #[error("the relay announced version {announced} and sent {given}")]
    Older { announced: u64, given: u64 },
}

/// Fetches the list whenever the relay of this carrier announces a newer one than is known:
/// `announced` holds the newest version that it announced. Ends with the carrier.
pub async fn follow(carrier: Carrier, mut announced: watch::Receiver<u64>, known: impl Known) {
    let mut pause = PAUSE;
    loop {
        let version = *announced.borrow_and_update();
        if version > known.version() {
            match fetch(&carrier, version, &known).await {
                Ok(()) => pause = PAUSE,
                Err(error) => {
                    tracing::warn!(%error, version, "the list of revocations was not fetched");
                    // The relay announces changes only: a failed fetch would otherwise wait for the
                    // next revocation.
                    announced.mark_changed();
                    pause = (pause * 2).min(LONGEST);
                }
            }
            // After a success too: a relay that announces ever higher versions causes one fetch a
            // second at most.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = carrier.closed() => return,
            }
        }
        tokio::select! {
            changed = announced.changed() => if changed.is_err() {
                return;
            },
            _ = carrier.closed() => return,
        }
    }
}

async fn fetch(carrier: &Carrier, announced: u64, known: &impl Known) -> Result<(), FetchError> {
    let asking = async {
        let header = StreamKind::FetchRevocations(FetchRevocations {});
        let (mut stream, _) = carrier.open(header.into()).await?;
        let list = message::read_long::<RevocationList, _>(&mut stream, REVOCATIONS_CAP).await?;
        Ok::<_, FetchError>(list)
    };
    let answer = tokio::time::timeout(ANSWER, asking).await;
    let list = answer.map_err(|_| FetchError::Timeout)??;
    // The version in the signed list counts; the announced one is only the relay's.
    let given = known.take(list).await.map_err(FetchError::List)?;
    if given < announced {
        Err(FetchError::Older { announced, given })
    } else {
        Ok(())
    }
}
