//! The handle on a carrier: to open streams, and to wait for its end.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::message;
use crate::mux::{self, Mux, Side, Stream, StreamPermit};
use crate::proto::close::{CloseCode, CloseReason};
use crate::proto::messages::{StreamHeader, StreamReply};
use crate::proto::wire::HEADER_CAP;
use crate::ws::{WsDriver, WsIo};

use super::driver::{Command, Driver};
use super::incoming::Incoming;
use super::shared::Shared;
use super::{OpenError, Timing};

/// Starts the driver on a connection whose handshake is done.
pub(super) fn start<T>(
    io: WsIo<T>,
    ws: WsDriver<T>,
    id: String,
    side: Side,
    config: &mux::Config,
    timing: &Timing,
) -> (Carrier, Incoming)
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let shared = Arc::new(Shared::new(id, config));
    let (commands, queued) = mpsc::unbounded_channel();
    let (streams, incoming) = mpsc::unbounded_channel();
    let mux = Mux::new(io, config, side);
    let driver = Driver::new(ws, mux, shared.clone(), timing.clone(), queued, streams);
    tokio::spawn(Box::pin(driver.run()));
    let carrier = Carrier {
        shared,
        commands,
        open_within: timing.open,
    };
    (carrier, Incoming::new(incoming))
}

/// A handle on a live carrier. When the last handle, the [`Incoming`] and all streams have been
/// dropped, the carrier closes.
#[derive(Clone)]
pub struct Carrier {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    open_within: Duration,
}

impl std::fmt::Debug for Carrier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier")
            .field("id", &self.shared.id())
            .field("streams", &self.streams())
            .finish_non_exhaustive()
    }
}

impl Carrier {
    /// Opens a stream: sends the header at once and waits for the reply, at most `Timing::open`.
    ///
    /// # Errors
    /// [`OpenError`]: refused, not answered, or the carrier has ended.
    pub async fn open(&self, header: StreamHeader) -> Result<(Stream, StreamReply), OpenError> {
        if self.is_closed() {
            return Err(OpenError::CarrierLost(self.shared.reason()));
        }
        let permit = self.shared.outgoing_permit().ok_or(OpenError::Limit)?;
        match tokio::time::timeout(self.open_within, self.exchange(header, permit)).await {
            Ok(result) => result,
            Err(_) => Err(OpenError::Timeout(self.open_within)),
        }
    }

    async fn exchange(
        &self,
        header: StreamHeader,
        permit: StreamPermit,
    ) -> Result<(Stream, StreamReply), OpenError> {
        let (reply, opened) = oneshot::channel();
        let queued = self.commands.send(Command::Open(reply, permit));
        queued.map_err(|_| OpenError::CarrierLost(self.shared.reason()))?;
        let Ok(mut stream) = opened.await else {
            // The driver publishes its reason before it drops pending requests.
            return Err(OpenError::CarrierLost(self.shared.reason()));
        };
        let exchanged = async {
            message::write(&mut stream, &header, HEADER_CAP).await?;
            message::read::<StreamReply, _>(&mut stream, HEADER_CAP).await
        };
        match exchanged.await {
            Ok(reply) => match reply.refusal {
                Some(refusal) => Err(OpenError::Refused(refusal)),
                None => Ok((stream, reply)),
            },
            Err(_) if self.is_closed() => Err(OpenError::CarrierLost(self.shared.reason())),
            Err(error) => Err(OpenError::Unanswered(Arc::new(error))),
        }
    }

    /// Ends the carrier and all its streams. Returns at once; see [`Self::closed`], and [`Self::gone`]
    /// for a process that exits then.
    pub fn close(&self, code: CloseCode, reason: &str) {
        // Fails only when it has ended already.
        let _ = self.commands.send(Command::Close(code, reason.to_owned()));
    }

    /// Waits until the carrier has ended, for whatever reason.
    pub async fn closed(&self) -> CloseReason {
        let mut ended = self.shared.ended();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(|| self.shared.reason()),
            Err(_) => self.shared.reason(),
        }
    }

    /// Waits until the carrier has ended and everything was sent: what streams had written, and
    /// the close frame. At most `Timing::close` after [`Self::closed`].
    pub async fn gone(&self) {
        // The driver closes the queue of requests when it has nothing more to do.
        self.commands.closed().await;
    }

    /// Whether the carrier has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.is_ended()
    }

    /// The newest measured round trip to the other end; `None` before the first.
    pub fn round_trip(&self) -> Option<Duration> {
        self.shared.round_trip()
    }

    /// Waits until at most `kept` streams are open, in both directions, or the carrier has ended.
    pub async fn idle(&self, kept: usize) {
        self.until(|| self.streams() <= kept).await;
    }

    /// Waits until at most `kept` streams have been open for that long, or the carrier has ended. A
    /// stream that is opened restarts the time.
    pub async fn idle_for(&self, kept: usize, duration: Duration) {
        while !self.is_closed() {
            self.idle(kept).await;
            let opened = self.shared.opened();
            let is_reopened = || self.shared.opened() != opened;
            if tokio::time::timeout(duration, self.until(is_reopened))
                .await
                .is_err()
            {
                return;
            }
        }
    }

    /// Looks after each change of the streams; ends with the carrier.
    async fn until(&self, holds: impl Fn() -> bool) {
        loop {
            let changed = self.shared.changed();
            tokio::pin!(changed);
            // Before the look, so that no change falls between.
            changed.as_mut().enable();
            if self.is_closed() || holds() {
                return;
            }
            tokio::select! {
                () = changed => {}
                _ = self.closed() => return,
            }
        }
    }

    /// When the last byte came in.
    pub fn last_received(&self) -> Instant {
        self.shared.last_received()
    }

    /// The relay's name for this carrier.
    pub fn id(&self) -> &str {
        self.shared.id()
    }

    /// Streams open now, in both directions, with those that are still being drained.
    pub fn streams(&self) -> usize {
        self.shared.streams()
    }
}
