//! A loopback proxy in front of a relay that keeps all that passes, as the relay sees it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// Both directions of one connection.
#[derive(Debug, Default, Clone)]
pub struct Tape {
    pub to_relay: Vec<u8>,
    pub from_relay: Vec<u8>,
}

pub struct Recorder {
    pub address: SocketAddr,
    tapes: Arc<Mutex<Vec<Arc<Mutex<Tape>>>>>,
    task: JoinHandle<()>,
}

impl Recorder {
    pub async fn start(relay: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let tapes: Arc<Mutex<Vec<Arc<Mutex<Tape>>>>> = Arc::default();
        let shelf = tapes.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let tape = Arc::new(Mutex::new(Tape::default()));
                lock(&shelf).push(tape.clone());
                tokio::spawn(async move {
                    // A connection that ends, for whatever reason, ends its tape.
                    let _ = record(client, relay, &tape).await;
                });
            }
        });
        Ok(Self {
            address,
            tapes,
            task,
        })
    }

    /// All connections so far.
    pub fn tapes(&self) -> Vec<Tape> {
        lock(&self.tapes)
            .iter()
            .map(|tape| lock(tape).clone())
            .collect()
    }

    /// The carriers among them.
    pub fn carriers(&self) -> Vec<Tape> {
        let carrier = |tape: &Tape| find(&tape.to_relay, b"/v1/carrier HTTP/1.1").is_some();
        self.tapes().into_iter().filter(carrier).collect()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn record(client: TcpStream, relay: SocketAddr, tape: &Mutex<Tape>) -> Result<()> {
    let relay = TcpStream::connect(relay).await?;
    client.set_nodelay(true)?;
    relay.set_nodelay(true)?;
    let (client_read, client_write) = client.into_split();
    let (relay_read, relay_write) = relay.into_split();
    let up = copy(client_read, relay_write, |bytes| {
        lock(tape).to_relay.extend_from_slice(bytes)
    });
    let down = copy(relay_read, client_write, |bytes| {
        lock(tape).from_relay.extend_from_slice(bytes)
    });
    tokio::try_join!(up, down)?;
    Ok(())
}

async fn copy(
    mut from: impl tokio::io::AsyncRead + Unpin,
    mut to: impl tokio::io::AsyncWrite + Unpin,
    mut keep: impl FnMut(&[u8]),
) -> Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            to.shutdown().await?;
            return Ok(());
        }
        // Kept before it is passed on, so that what a client has seen is on the tape.
        keep(&buffer[..count]);
        to.write_all(&buffer[..count]).await?;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The payloads of all WebSocket frames behind an HTTP head, unmasked and joined: the byte stream
/// that the relay's mux reads. A frame that has not wholly passed yet is left out.
pub fn unwrap_websocket(direction: &[u8]) -> Vec<u8> {
    let mut payload = Vec::new();
    let Some(head) = find(direction, b"\r\n\r\n") else {
        return payload;
    };
    let mut rest = &direction[head + 4..];
    while let Some((frame, next)) = frame(rest) {
        payload.extend(frame);
        rest = next;
    }
    payload
}

/// RFC 6455, section 5.2.
fn frame(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let masked = bytes.get(1)? & 0x80 != 0;
    let (length, mut at) = match bytes[1] & 0x7f {
        126 => (
            u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)),
            4,
        ),
        127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?), 10),
        short => (u64::from(short), 2),
    };
    let mut mask = [0; 4];
    if masked {
        mask.copy_from_slice(bytes.get(at..at + 4)?);
        at += 4;
    }
    let length = usize::try_from(length).ok()?;
    let body = bytes.get(at..at.checked_add(length)?)?;
    let unmasked = body
        .iter()
        .zip(mask.iter().cycle())
        .map(|(byte, mask)| byte ^ mask)
        .collect();
    Some((unmasked, &bytes[at + length..]))
}

/// Where `needle` begins in `hay`.
pub fn find(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masked_frames_are_unmasked_and_joined() {
        let mut tape = b"GET / HTTP/1.1\r\n\r\n".to_vec();
        tape.extend([0x82, 0x83, 1, 2, 3, 4, b'a' ^ 1, b'b' ^ 2, b'c' ^ 3]);
        tape.extend([0x82, 0x02, b'd', b'e']);
        tape.extend([0x82, 0x05, b'c', b'u', b't']);
        assert_eq!(unwrap_websocket(&tape), b"abcde");
    }

    #[test]
    fn long_frames_are_read_by_their_long_length() {
        let mut tape = b"\r\n\r\n\x82\x7e\x01\x00".to_vec();
        tape.extend([7; 256]);
        assert_eq!(unwrap_websocket(&tape), [7; 256]);
    }
}
