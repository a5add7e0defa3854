//! A SPDY connection, the server's side: the client opens streams, each with its headers.
//!
//! There is no flow control, as in Go's implementation, which ignores windows: a stream whose
//! data has no reader blocks the connection once its queue is full.

use std::{collections::HashMap, io, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use throwline_kube_wire::stream::{
    spdy::{Frame, FrameError, take},
    spdy_headers::{Decoder, Encoder},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::transport::{Drain, Source};

/// Frames that wait in each stream before the connection waits.
const QUEUE: usize = 32;
/// Streams open at once: twice what 4,000 forwarded connections need.
const MAX_STREAMS: usize = 16_384;
/// Bytes gathered before they are written.
const CORK: usize = 64 << 10;
/// How long a client may take to close after it was sent all.
const GOODBYE: Duration = Duration::from_secs(2);
const PROTOCOL_ERROR: u32 = 1;
const REFUSED: u32 = 3;
const CANCEL: u32 = 5;

pub(super) struct Connection {
    opened: mpsc::Receiver<Stream>,
    frames: mpsc::Sender<Frame>,
    reader: JoinHandle<()>,
    writer: JoinHandle<()>,
    gone: CancellationToken,
}

/// A stream that the client opened.
pub(super) struct Stream {
    headers: Vec<(String, String)>,
    /// What the client sends; ends with its FIN, or when it resets the stream.
    pub(super) data: mpsc::Receiver<Bytes>,
    pub(super) writer: StreamWriter,
}

/// Our half of a stream. Dropped before it was finished, it resets the stream.
pub(super) struct StreamWriter {
    id: u32,
    frames: mpsc::Sender<Frame>,
    finished: bool,
}

impl Stream {
    pub(super) fn header(&self, name: &str) -> &str {
        self.headers
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value.as_str())
    }
}

impl StreamWriter {
    pub(super) async fn send(&self, bytes: Bytes) -> io::Result<()> {
        self.push(Frame::Data {
            id: self.id,
            fin: false,
            bytes,
        })
        .await
    }

    pub(super) async fn finish(&mut self) -> io::Result<()> {
        if self.finished {
            return Ok(());
        }
        self.finished = true;
        self.push(Frame::Data {
            id: self.id,
            fin: true,
            bytes: Bytes::new(),
        })
        .await
    }

    async fn push(&self, frame: Frame) -> io::Result<()> {
        self.frames
            .send(frame)
            .await
            .map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        if !self.finished {
            // A full queue means that the connection is in no state to care.
            let _ = self.frames.try_send(Frame::Reset {
                id: self.id,
                status: CANCEL,
            });
        }
    }
}

impl Connection {
    pub(super) fn start(source: Source, drain: Drain) -> Self {
        let (frames, outgoing) = mpsc::channel(64);
        let (sender, opened) = mpsc::channel(16);
        let gone = CancellationToken::new();
        let reader = tokio::spawn(read(
            source,
            sender,
            frames.clone(),
            gone.clone().drop_guard(),
        ));
        let writer = tokio::spawn(write(drain, outgoing));
        Self {
            opened,
            frames,
            reader,
            writer,
            gone,
        }
    }

    /// Cancelled when the client has gone.
    pub(super) fn gone(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// The next stream; `None` when the connection has ended.
    pub(super) async fn accept(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Sends GOAWAY after everything else, and lets the client close first, so that no
    /// byte of ours is lost to a reset.
    pub(super) async fn close(mut self) {
        let _ = self.frames.send(Frame::GoAway { last: 0, status: 0 }).await;
        self.opened.close();
        // However long a slow client takes; one that is gone ends the writer as well.
        let _ = (&mut self.writer).await;
        let _ = tokio::time::timeout(GOODBYE, &mut self.reader).await;
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

async fn read(
    mut source: Source,
    opened: mpsc::Sender<Stream>,
    frames: mpsc::Sender<Frame>,
    _gone: DropGuard,
) {
    let mut buffer = BytesMut::new();
    let mut streams: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    let mut decoder = Decoder::new();
    let mut encoder = Encoder::new();
    loop {
        let frame = match take(&mut buffer) {
            Ok(Some(frame)) => frame,
            Ok(None) => match source.next().await {
                Some(Ok(bytes)) if buffer.is_empty() => {
                    // Taken over without a copy where the bytes have no other holder.
                    buffer = bytes
                        .try_into_mut()
                        .unwrap_or_else(|shared| BytesMut::from(&shared[..]));
                    continue;
                }
                Some(Ok(bytes)) => {
                    buffer.extend_from_slice(&bytes);
                    continue;
                }
                Some(Err(error)) => return tracing::debug!(%error, "spdy connection broke"),
                None => return,
            },
            Err(error) => {
                let _ = frames
                    .send(Frame::GoAway {
                        last: 0,
                        status: PROTOCOL_ERROR,
                    })
                    .await;
                return tracing::debug!(%error, "spdy protocol error");
            }
        };
        match frame {
            Frame::SynStream { id, fin, headers } => {
                let headers = match decoder.decode(&headers) {
                    Ok(headers) => headers,
                    Err(error) => return bad_headers(&frames, error).await,
                };
                if streams.contains_key(&id) || streams.len() >= MAX_STREAMS {
                    let _ = frames
                        .send(Frame::Reset {
                            id,
                            status: REFUSED,
                        })
                        .await;
                    continue;
                }
                let (sender, data) = mpsc::channel(QUEUE);
                if !fin {
                    streams.insert(id, sender);
                }
                let reply = encoder.encode(&[]);
                if frames
                    .send(Frame::SynReply {
                        id,
                        fin: false,
                        headers: reply,
                    })
                    .await
                    .is_err()
                {
                    return;
                }
                let writer = StreamWriter {
                    id,
                    frames: frames.clone(),
                    finished: false,
                };
                // New streams have no receiver any more: the drop resets it.
                let _ = opened
                    .send(Stream {
                        headers,
                        data,
                        writer,
                    })
                    .await;
            }
            Frame::Headers { headers, .. } => {
                // They belong to the shared compression state even when they are not used.
                if let Err(error) = decoder.decode(&headers) {
                    return bad_headers(&frames, error).await;
                }
            }
            Frame::Data { id, fin, bytes } => {
                if let Some(stream) = streams.get(&id) {
                    // Data for a stream without a reader is discarded.
                    let gone = !bytes.is_empty() && stream.send(bytes).await.is_err();
                    if fin || gone {
                        streams.remove(&id);
                    }
                }
            }
            Frame::Reset { id, .. } => {
                streams.remove(&id);
            }
            Frame::Ping { id } => {
                if id % 2 == 1 && frames.send(Frame::Ping { id }).await.is_err() {
                    return;
                }
            }
            Frame::GoAway { .. } | Frame::SynReply { .. } | Frame::Ignored { .. } => {}
        }
    }
}

async fn bad_headers(frames: &mpsc::Sender<Frame>, error: FrameError) {
    let _ = frames
        .send(Frame::GoAway {
            last: 0,
            status: PROTOCOL_ERROR,
        })
        .await;
    tracing::debug!(%error, "spdy headers cannot be read");
}

/// Writes frames, as many at once as wait, up to a GOAWAY.
async fn write(mut drain: Drain, mut frames: mpsc::Receiver<Frame>) {
    let mut buffer = BytesMut::with_capacity(2 * CORK);
    let mut is_last = false;
    while !is_last && let Some(frame) = frames.recv().await {
        is_last = matches!(frame, Frame::GoAway { .. });
        frame.encode(&mut buffer);
        while !is_last
            && buffer.len() < CORK
            && let Ok(frame) = frames.try_recv()
        {
            is_last = matches!(frame, Frame::GoAway { .. });
            frame.encode(&mut buffer);
        }
        if let Err(error) = drain.send(buffer.split().freeze()).await {
            return tracing::debug!(%error, "spdy connection cannot be written");
        }
        buffer.reserve(2 * CORK);
    }
}
