//! The control stream: small messages about the carrier itself.

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::ControlMessage;
use throwline_tunnel::proto::wire::{self, CONTROL_CAP};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How long one message may take to be written before the stream is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct ControlStream {
    stream: mux::Stream,
    buffer: BytesMut,
}

impl ControlStream {
    pub(super) fn new(stream: mux::Stream) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
        }
    }

    /// The next message, `None` at the end; never returns while there is no control stream.
    /// May be cancelled at any time without losing a byte.
    pub(super) async fn receive(control: &mut Option<Self>) -> io::Result<Option<ControlMessage>> {
        match control {
            Some(control) => control.next().await,
            None => std::future::pending().await,
        }
    }

    async fn next(&mut self) -> io::Result<Option<ControlMessage>> {
        loop {
            // A malformed message is `InvalidData`, which distinguishes it from a cut.
            if let Some(message) = wire::decode(&mut self.buffer, CONTROL_CAP)? {
                return Ok(Some(message));
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Ok(None);
            }
        }
    }

    pub(super) async fn send(&mut self, message: &ControlMessage) -> io::Result<()> {
        let bytes = wire::encode(message, CONTROL_CAP).map_err(io::Error::other)?;
        let write = async {
            self.stream.write_all(&bytes).await?;
            self.stream.flush().await
        };
        tokio::time::timeout(WRITE_TIMEOUT, write)
            .await
            .map_err(|_| io::ErrorKind::TimedOut)?
    }
}
