//! port-forward: each pair of streams becomes one TCP connection to a port of this machine, where
//! a pod's process listens.

use std::{
    collections::HashMap,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, tcp::OwnedReadHalf},
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;

use super::{
    connection::{Connection, Stream},
    transport::{self, Io},
};
use crate::{Cluster, api::Call, json::text, runtime, status::Failure};

/// Bytes read at once from the backend: one SPDY frame.
const READ: usize = 32 << 10;
/// A stream whose partner does not come is given up after this.
const PAIR: Duration = Duration::from_secs(30);
/// Streams that wait for their partners.
const MAX_UNPAIRED: usize = 1024;

pub(super) struct Forward {
    killed: CancellationToken,
    /// For clients that name the ports in the query (`v4.channel.k8s.io`).
    ports: Vec<u16>,
}

pub(super) fn prepare(cluster: &Cluster, call: &Call) -> Result<Forward, Failure> {
    let (object, pod) = runtime::find(cluster, &call.target)?;
    if text(&object, "/status/phase") != "Running" {
        let phase = text(&object, "/status/phase");
        return Err(Failure::bad_request(format!(
            "unable to forward port because pod is not running. Current status={phase}"
        )));
    }
    let ports = call
        .query
        .all("ports")
        .into_iter()
        .flat_map(|list| list.split(','));
    let ports: Result<Vec<u16>, _> = ports.map(str::parse).collect();
    let ports =
        ports.map_err(|_| Failure::bad_request("a port is not a number between 1 and 65535"))?;
    Ok(Forward {
        killed: pod.killed.clone(),
        ports,
    })
}

impl Forward {
    pub(super) async fn run(self, mut connection: Connection) {
        let mut waiting: HashMap<String, (Instant, Stream)> = HashMap::new();
        let mut running = JoinSet::new();
        loop {
            let stream = tokio::select! {
                () = self.killed.cancelled() => break,
                Some(_) = running.join_next() => continue,
                stream = connection.accept() => match stream {
                    Some(stream) => stream,
                    None => break,
                },
            };
            // Old clients send no request id: their error stream is first, their data stream next.
            let id = match stream.header("requestid") {
                "" => format!("port {}", stream.header("port")),
                id => id.to_owned(),
            };
            waiting.retain(|_, (since, _)| since.elapsed() < PAIR);
            match waiting.remove(&id) {
                None if waiting.len() < MAX_UNPAIRED => {
                    waiting.insert(id, (Instant::now(), stream));
                }
                // The drop resets it.
                None => drop(stream),
                Some((_, first)) => {
                    let (error, data) = if first.header("streamtype") == "error" {
                        (first, stream)
                    } else {
                        (stream, first)
                    };
                    running.spawn(pair(error, data));
                }
            }
        }
        // Dropping the set ends every forwarded connection.
        drop(running);
        connection.close().await;
    }

    /// The older form: two channels for each port, the first message on each is the port.
    pub(super) async fn run_channels(self, io: Io) {
        let (mut sink, mut stream) = transport::websocket(io).await.split();
        let (sender, mut outgoing) = mpsc::channel::<BytesMut>(16);
        let mut backends: Vec<mpsc::Sender<Bytes>> = Vec::new();
        let mut running = JoinSet::new();
        for (index, port) in self.ports.iter().enumerate().take(64) {
            let channel = u8::try_from(index * 2).unwrap_or(0);
            for channel in [channel, channel + 1] {
                let mut hello = BytesMut::with_capacity(3);
                hello.put_u8(channel);
                hello.put_u16_le(*port);
                let _ = sink.send(Message::Binary(hello.freeze())).await;
            }
            let (data, received) = mpsc::channel(16);
            backends.push(data);
            running.spawn(channels(*port, channel, received, sender.clone()));
        }
        drop(sender);
        loop {
            tokio::select! {
                () = self.killed.cancelled() => break,
                message = stream.next() => match message {
                    Some(Ok(Message::Binary(bytes))) => {
                        let Some(channel) = bytes.first().copied() else { break };
                        let backend = (channel % 2 == 0).then(|| backends.get(usize::from(channel / 2))).flatten();
                        if let Some(backend) = backend {
                            let _ = backend.send(bytes.slice(1..)).await;
                        }
                    }
                    Some(Ok(_)) => {}
                    Some(Err(_)) | None => break,
                },
                bytes = outgoing.recv() => match bytes {
                    Some(bytes) => if sink.send(Message::Binary(bytes.freeze())).await.is_err() { break },
                    None => break,
                },
            }
        }
        let _ = sink.close().await;
    }
}

async fn pair(mut error: Stream, data: Stream) {
    let connected = connect(data.header("port")).await;
    let Stream {
        data: mut from_client,
        writer: mut to_client,
        ..
    } = data;
    match connected {
        Ok(tcp) => {
            let (mut read, mut write) = tcp.into_split();
            let up = async {
                while let Some(bytes) = from_client.recv().await {
                    if write.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
                let _ = write.shutdown().await;
            };
            let down = async {
                let mut buffer = BytesMut::new();
                while let Ok(true) = fill(&mut read, &mut buffer).await {
                    if to_client.send(buffer.split().freeze()).await.is_err() {
                        return;
                    }
                }
            };
            // The backend's end is the end of it all: nothing can answer the client any more.
            tokio::pin!(up);
            tokio::pin!(down);
            tokio::select! {
                () = &mut down => {}
                () = &mut up => down.await,
            }
        }
        Err(message) => {
            let _ = error.writer.send(message.into()).await;
        }
    }
    let _ = to_client.finish().await;
    let _ = error.writer.finish().await;
}

async fn connect(port: &str) -> Result<TcpStream, String> {
    let number: u16 = port
        .parse()
        .map_err(|_| format!("{port:?} is not a port"))?;
    let tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, number))
        .await
        .map_err(|error| format!("error forwarding port {number} to pod: failed to connect to localhost:{number}: {error}"))?;
    // Only a matter of speed.
    let _ = tcp.set_nodelay(true);
    Ok(tcp)
}

/// False at the end.
async fn fill(read: &mut OwnedReadHalf, buffer: &mut BytesMut) -> std::io::Result<bool> {
    buffer.reserve(READ);
    Ok(read.read_buf(buffer).await? > 0)
}

async fn channels(
    port: u16,
    channel: u8,
    mut from_client: mpsc::Receiver<Bytes>,
    to_client: mpsc::Sender<BytesMut>,
) {
    let tcp = match connect(&port.to_string()).await {
        Ok(tcp) => tcp,
        Err(message) => {
            let mut buffer = BytesMut::from(&[channel + 1][..]);
            buffer.extend_from_slice(message.as_bytes());
            let _ = to_client.send(buffer).await;
            return;
        }
    };
    let (mut read, mut write) = tcp.into_split();
    let up = async {
        while let Some(bytes) = from_client.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    let down = async {
        loop {
            let mut buffer = BytesMut::with_capacity(READ + 1);
            buffer.put_u8(channel);
            match read.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            if to_client.send(buffer).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = up => {}, () = down => {} }
}
