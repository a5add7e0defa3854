//! The streams that the other end of a carrier opens.

use std::io;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::message;
use crate::mux::Stream;
use crate::proto::messages::{Refusal, StreamHeader, StreamReply};
use crate::proto::wire::HEADER_CAP;

/// The streams that the other end opens.
#[derive(Debug)]
pub struct Incoming(mpsc::UnboundedReceiver<Box<IncomingStream>>);

impl Incoming {
    pub(super) fn new(streams: mpsc::UnboundedReceiver<Box<IncomingStream>>) -> Self {
        Self(streams)
    }

    /// The next stream whose header has arrived; `None` when the carrier has ended. Headers are
    /// read side by side, so that a silent stream holds up no other. The channel is bounded by the
    /// permits of incoming streams.
    pub async fn next(&mut self) -> Option<IncomingStream> {
        self.0.recv().await.map(|stream| *stream)
    }
}

/// A stream that waits to be answered. Dropping it unanswered resets it.
#[derive(Debug)]
pub struct IncomingStream {
    /// The stream's first message.
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
    ///
    /// # Errors
    /// The stream or its carrier has ended.
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
