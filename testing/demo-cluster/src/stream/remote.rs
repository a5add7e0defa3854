//! The client of an exec or attach, whichever protocol it speaks: it sends input and receives output
//! and one status.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use serde_json::Value;
use throwline_kube_wire::stream::channel::{self, ChannelFrame, decode_channel, terminal_size};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{CloseFrame, frame::coding::CloseCode},
};
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Connection, Stream, StreamWriter},
    transport::{self, Io},
};
use crate::runtime::{Channel, process::Input};

/// A client that has asked for streams but does not open them all is given up.
const OPEN: Duration = Duration::from_secs(30);
/// How long a client may take to close after it was sent the status.
const GOODBYE: Duration = Duration::from_secs(2);

/// The streams that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Streams {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
    pub(super) tty: bool,
}

pub(super) struct Remote {
    pub(super) input: mpsc::Receiver<Input>,
    /// Cancelled when the client has gone.
    pub(super) gone: CancellationToken,
    pub(super) output: Output,
}

pub(super) enum Output {
    WebSocket {
        messages: mpsc::Sender<Message>,
        writer: tokio::task::JoinHandle<()>,
    },
    Spdy {
        connection: Connection,
        error: StreamWriter,
        stdout: Option<StreamWriter>,
        stderr: Option<StreamWriter>,
        json: bool,
    },
}

impl Output {
    /// An empty buffer for output of that channel, with what must stand in front of it.
    pub(super) fn buffer(&self, channel: Channel, size: usize) -> BytesMut {
        let mut buffer = BytesMut::with_capacity(size + 1);
        if let Self::WebSocket { .. } = self {
            buffer.extend_from_slice(&[match channel {
                Channel::Stdout => channel::STDOUT,
                Channel::Stderr => channel::STDERR,
            }]);
        }
        buffer
    }

    /// Sends a buffer made by [`Output::buffer`]; false when the client has gone.
    pub(super) async fn send(&self, channel: Channel, buffer: BytesMut) -> bool {
        match self {
            Self::WebSocket { messages, .. } => messages
                .send(Message::Binary(buffer.freeze()))
                .await
                .is_ok(),
            Self::Spdy { stdout, stderr, .. } => {
                let stream = if channel == Channel::Stdout {
                    stdout
                } else {
                    stderr
                };
                match stream {
                    Some(stream) => stream.send(buffer.freeze()).await.is_ok(),
                    // Output that the client did not ask for.
                    None => true,
                }
            }
        }
    }

    /// Sends the status, then ends everything in good order.
    pub(super) async fn finish(self, status: &Value) {
        match self {
            Self::WebSocket { messages, writer } => {
                let mut message = vec![channel::STATUS];
                message.extend_from_slice(status.to_string().as_bytes());
                let _ = messages.send(Message::Binary(message.into())).await;
                let close = CloseFrame {
                    code: CloseCode::Normal,
                    reason: "".into(),
                };
                let _ = messages.send(Message::Close(Some(close))).await;
                drop(messages);
                let _ = writer.await;
            }
            Self::Spdy {
                connection,
                mut error,
                stdout,
                stderr,
                json,
            } => {
                let success = status["status"] == "Success";
                if json {
                    let _ = error.send(status.to_string().into()).await;
                } else if !success {
                    let _ = error
                        .send(Bytes::from(
                            status["message"].as_str().unwrap_or_default().to_owned(),
                        ))
                        .await;
                }
                for mut stream in [stdout, stderr].into_iter().flatten() {
                    let _ = stream.finish().await;
                }
                let _ = error.finish().await;
                connection.close().await;
            }
        }
    }
}

pub(super) async fn over_websocket(io: Io, protocol: &'static str) -> Remote {
    let closing = protocol == "v5.channel.k8s.io";
    let (mut sink, mut stream) = transport::websocket(io).await.split();
    let (messages, mut outgoing) = mpsc::channel::<Message>(4);
    let (sender, input) = mpsc::channel(8);
    let gone = CancellationToken::new();
    let guard = gone.clone().drop_guard();
    let reader = tokio::spawn(async move {
        let _guard = guard;
        while let Some(Ok(message)) = stream.next().await {
            let Message::Binary(bytes) = message else {
                continue;
            };
            let input = match decode_channel(&bytes, closing) {
                Ok(ChannelFrame::Stdin([])) => continue,
                Ok(ChannelFrame::Stdin(_)) => Input::Data(bytes.slice(1..)),
                Ok(ChannelFrame::Resize { rows, columns }) => Input::Resize { rows, columns },
                Ok(ChannelFrame::Close(channel::STDIN)) => Input::End,
                Ok(ChannelFrame::Close(_)) => continue,
                Err(error) => return tracing::debug!(%error, "channel protocol error"),
            };
            if sender.send(input).await.is_err() {
                // The process no longer reads, but pings and the close must still be answered.
                while let Some(Ok(_)) = stream.next().await {}
                return;
            }
        }
    });
    let writer = tokio::spawn(async move {
        let _abort = AbortOnDrop(reader.abort_handle());
        let mut closed = false;
        while let Some(message) = outgoing.recv().await {
            closed = message.is_close();
            if sink.send(message).await.is_err() {
                return;
            }
        }
        if closed {
            // Until the client has closed as well, so that nothing of ours is lost to a reset.
            let _ = tokio::time::timeout(GOODBYE, reader).await;
        }
    });
    Remote {
        input,
        gone,
        output: Output::WebSocket { messages, writer },
    }
}

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits for the streams that the request announced; `None` when they do not come.
pub(super) async fn over_spdy(io: Io, wanted: Streams, protocol: &'static str) -> Option<Remote> {
    let (source, drain) = transport::raw(io);
    let mut connection = Connection::start(source, drain);
    let resizes = wanted.tty && matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let expected = 1 + [
        wanted.stdin,
        wanted.stdout,
        wanted.stderr && !wanted.tty,
        resizes,
    ]
    .into_iter()
    .filter(|one| *one)
    .count();
    let mut streams: Vec<Stream> = Vec::new();
    let gather = async {
        while streams.len() < expected {
            streams.push(connection.accept().await?);
        }
        Some(())
    };
    if tokio::time::timeout(OPEN, gather)
        .await
        .ok()
        .flatten()
        .is_none()
    {
        tracing::debug!("the client did not open the streams that it asked for");
        return None;
    }
    let (sender, input) = mpsc::channel(8);
    let (mut error, mut stdout, mut stderr) = (None, None, None);
    for stream in streams {
        match stream.header("streamtype").to_owned().as_str() {
            "error" => error = Some(keep(stream)),
            "stdout" => stdout = Some(keep(stream)),
            "stderr" => stderr = Some(keep(stream)),
            kind @ ("stdin" | "resize") => {
                let resize = kind == "resize";
                tokio::spawn(feed(stream, resize, sender.clone()));
            }
            other => tracing::debug!(kind = other, "unknown stream"),
        }
    }
    drop(sender);
    let json = protocol == "v4.channel.k8s.io";
    let gone = connection.gone();
    Some(Remote {
        input,
        gone,
        output: Output::Spdy {
            connection,
            error: error?,
            stdout,
            stderr,
            json,
        },
    })
}

/// A stream on which the client has nothing to say.
fn keep(stream: Stream) -> StreamWriter {
    stream.writer
}

async fn feed(mut stream: Stream, resize: bool, sender: mpsc::Sender<Input>) {
    while let Some(bytes) = stream.data.recv().await {
        if resize {
            // One JSON object a line.
            let mut lines = bytes
                .rsplit(|byte| *byte == b'\n')
                .filter_map(terminal_size);
            if let Some((columns, rows)) = lines.next()
                && sender.send(Input::Resize { rows, columns }).await.is_err()
            {
                break;
            }
        } else if sender.send(Input::Data(bytes)).await.is_err() {
            break;
        }
    }
    if !resize {
        let _ = sender.send(Input::End).await;
    }
    // Further input has no reader.
    while stream.data.recv().await.is_some() {}
    let _ = stream.writer.finish().await;
}
