//! What SPDY runs on: the bare connection, or the binary messages of a WebSocket.

use std::{io, pin::Pin};

use bytes::{Bytes, BytesMut};
use futures::{Sink, SinkExt as _, Stream, StreamExt as _, sink, stream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{Role, WebSocketConfig},
    },
};

/// A connection after its upgrade.
pub(super) trait Connected: AsyncRead + AsyncWrite + Send {}

impl<T: AsyncRead + AsyncWrite + Send> Connected for T {}

pub(super) type Io = Pin<Box<dyn Connected>>;
pub(super) type Source = Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;
pub(super) type Drain = Pin<Box<dyn Sink<Bytes, Error = io::Error> + Send>>;

/// Bytes read at once.
const READ: usize = 64 << 10;
/// The longest message that is taken: kubectl writes at most 32 KiB at once.
const MAX_MESSAGE: usize = 1 << 20;

pub(super) fn raw(io: Io) -> (Source, Drain) {
    let (read, write) = tokio::io::split(io);
    let source = stream::unfold(
        (read, BytesMut::new()),
        |(mut read, mut buffer)| async move {
            buffer.reserve(READ);
            match read.read_buf(&mut buffer).await {
                Ok(0) => None,
                Ok(_) => {
                    let bytes = buffer.split().freeze();
                    Some((Ok(bytes), (read, buffer)))
                }
                Err(error) => Some((Err(error), (read, buffer))),
            }
        },
    );
    let drain = sink::unfold(write, |mut write, bytes: Bytes| async move {
        write.write_all(&bytes).await?;
        write.flush().await?;
        Ok::<_, io::Error>(write)
    });
    (Box::pin(source), Box::pin(drain))
}

pub(super) async fn tunnelled(io: Io) -> (Source, Drain) {
    let (sink, stream) = websocket(io).await.split();
    let source = stream.filter_map(|message| async move {
        match message {
            Ok(Message::Binary(bytes)) => Some(Ok(bytes)),
            Ok(Message::Text(_)) => Some(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "text in a binary stream",
            ))),
            Ok(_) => None,
            Err(error) => Some(Err(io::Error::other(error))),
        }
    });
    let drain = sink.with(|bytes: Bytes| async move {
        Ok::<_, tokio_tungstenite::tungstenite::Error>(Message::Binary(bytes))
    });
    (
        Box::pin(source),
        Box::pin(drain.sink_map_err(io::Error::other)),
    )
}

pub(super) async fn websocket(io: Io) -> WebSocketStream<Io> {
    let config = WebSocketConfig::default()
        .read_buffer_size(READ)
        .write_buffer_size(READ)
        .max_write_buffer_size(4 * MAX_MESSAGE)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}
