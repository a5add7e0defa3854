//! What users of a carrier hold: to open streams, to take streams, to watch it end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::message;
use crate::mux::{self, Mux, Side, Stream};
use crate::proto::close::{CloseCode, CloseReason, ClosedBy};
use crate::proto::messages::{Refusal, StreamHeader, StreamReply};
use crate::proto::wire::HEADER_CAP;
use crate::ws::{WsDriver, WsIo};

use super::driver::{Command, Driver};
use super::{OpenError, Timing};

/// What the driver and all handles share.
pub(super) struct Shared {
    id: String,
    outgoing: Arc<Semaphore>,
    outgoing_max: usize,
    incoming: Arc<Semaphore>,
    incoming_max: usize,
    /// Microseconds; 0 before the first pong.
    round_trip: AtomicU64,
    began: Instant,
    /// Milliseconds from `began` to the last byte that came in.
    heard: AtomicU64,
    ended: watch::Sender<Option<CloseReason>>,
}

impl Shared {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn incoming_permit(&self) -> Option<OwnedSemaphorePermit> {
        self.incoming.clone().try_acquire_owned().ok()
    }

    pub(super) fn streams(&self) -> usize {
        let outgoing = self.outgoing_max - self.outgoing.available_permits();
        let incoming = self.incoming_max - self.incoming.available_permits();
        outgoing + incoming
    }

    pub(super) fn set_round_trip(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        self.round_trip.store(micros, Ordering::Relaxed);
    }

    pub(super) fn set_heard(&self, now: Instant) {
        let millis = now.saturating_duration_since(self.began).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.heard.store(millis, Ordering::Relaxed);
    }

    pub(super) fn finish(&self, reason: CloseReason) {
        self.ended.send_replace(Some(reason));
    }

    fn reason(&self) -> CloseReason {
        let ended = self.ended.borrow().clone();
        ended.unwrap_or_else(|| CloseReason::new(ClosedBy::Us, CloseCode::Internal, ""))
    }
}

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
    let (outgoing_max, incoming_max) = (config.outgoing_permits(), config.incoming_permits());
    let shared = Arc::new(Shared {
        id,
        outgoing: Arc::new(Semaphore::new(outgoing_max)),
        outgoing_max,
        incoming: Arc::new(Semaphore::new(incoming_max)),
        incoming_max,
        round_trip: AtomicU64::new(0),
        began: Instant::now(),
        heard: AtomicU64::new(0),
        ended: watch::Sender::new(None),
    });
    let (commands, asked) = mpsc::unbounded_channel();
    let (streams, incoming) = mpsc::unbounded_channel();
    let mux = Mux::new(io, config, side);
    let driver = Driver::new(ws, mux, shared.clone(), timing.clone(), asked, streams);
    tokio::spawn(Box::pin(driver.run()));
    let carrier = Carrier {
        shared,
        commands,
        open_within: timing.open,
    };
    (carrier, Incoming(incoming))
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
            .field("id", &self.shared.id)
            .field("streams", &self.streams())
            .finish_non_exhaustive()
    }
}

impl Carrier {
    /// Opens a stream: sends the header at once and waits for the reply, at most `Timing::open`.
    pub async fn open(&self, header: StreamHeader) -> Result<(Stream, StreamReply), OpenError> {
        if self.is_closed() {
            return Err(OpenError::CarrierLost(self.shared.reason()));
        }
        let permit = self.shared.outgoing.clone().try_acquire_owned();
        let permit = permit.map_err(|_| OpenError::Limit)?;
        match tokio::time::timeout(self.open_within, self.exchange(header, permit)).await {
            Ok(result) => result,
            Err(_) => Err(OpenError::Timeout(self.open_within)),
        }
    }

    async fn exchange(
        &self,
        header: StreamHeader,
        permit: OwnedSemaphorePermit,
    ) -> Result<(Stream, StreamReply), OpenError> {
        let (reply, opened) = oneshot::channel();
        let asked = self.commands.send(Command::Open(reply, permit));
        asked.map_err(|_| OpenError::CarrierLost(self.shared.reason()))?;
        let Ok(mut stream) = opened.await else {
            // The driver publishes its reason before it lets go of what it was asked.
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
            Err(error) => Err(OpenError::Unanswered(error.to_string())),
        }
    }

    /// Ends the carrier and all its streams. Returns at once; see [`Self::closed`], and [`Self::gone`]
    /// for who exits then.
    pub fn close(&self, code: CloseCode, reason: &str) {
        // Fails only when it has ended already.
        let _ = self.commands.send(Command::Close(code, reason.to_owned()));
    }

    /// Waits until the carrier has ended, for whatever reason.
    pub async fn closed(&self) -> CloseReason {
        let mut ended = self.shared.ended.subscribe();
        match ended.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_else(|| self.shared.reason()),
            Err(_) => self.shared.reason(),
        }
    }

    /// Waits until the carrier has ended and the other end has been told: what streams had said, and
    /// the close frame. At most `Timing::close` after [`Self::closed`].
    pub async fn gone(&self) {
        // The driver lets go of what it is asked when it has nothing more to do.
        self.commands.closed().await;
    }

    pub fn is_closed(&self) -> bool {
        self.shared.ended.borrow().is_some()
    }

    /// The newest measured round trip to the other end; `None` before the first.
    pub fn round_trip(&self) -> Option<Duration> {
        match self.shared.round_trip.load(Ordering::Relaxed) {
            0 => None,
            micros => Some(Duration::from_micros(micros)),
        }
    }

    /// When the last byte came in.
    pub fn heard(&self) -> Instant {
        let millis = self.shared.heard.load(Ordering::Relaxed);
        self.shared.began + Duration::from_millis(millis)
    }

    /// The relay's name for this carrier.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Streams open now, in both directions, with those that are still being drained.
    pub fn streams(&self) -> usize {
        self.shared.streams()
    }
}

/// The streams that the other end opens.
#[derive(Debug)]
pub struct Incoming(mpsc::UnboundedReceiver<Box<IncomingStream>>);

impl Incoming {
    /// The next stream whose header has arrived; `None` when the carrier has ended. Headers are
    /// read side by side, so that a silent stream holds up nobody. The channel is bounded by the
    /// permits of incoming streams.
    pub async fn next(&mut self) -> Option<IncomingStream> {
        self.0.recv().await.map(|stream| *stream)
    }
}

/// A stream that waits to be answered. Dropping it unanswered resets it.
#[derive(Debug)]
pub struct IncomingStream {
    pub header: StreamHeader,
    stream: Stream,
    within: Duration,
}

impl IncomingStream {
    pub(super) fn new(header: StreamHeader, stream: Stream, within: Duration) -> Self {
        Self {
            header,
            stream,
            within,
        }
    }

    /// Answers, and gives the stream for what follows.
    pub async fn accept(mut self, reply: StreamReply) -> io::Result<Stream> {
        self.answer(&reply).await?;
        Ok(self.stream)
    }

    /// Answers with a refusal. The stream is over then; that the opener may have left is no error.
    pub async fn refuse(mut self, refusal: Refusal) {
        let reply = StreamReply::refused(refusal);
        if self.answer(&reply).await.is_ok() {
            // Half-closed, so that the reply is read before the stream goes.
            let _ = tokio::io::AsyncWriteExt::shutdown(&mut self.stream).await;
        }
    }

    async fn answer(&mut self, reply: &StreamReply) -> io::Result<()> {
        let write = message::write(&mut self.stream, reply, HEADER_CAP);
        match tokio::time::timeout(self.within, write).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}
