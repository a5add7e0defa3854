//! What a port-forward leads to in the pod: an endless source of bytes, or a sink that reports how many
//! it received.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// The first byte of a connection: what the client is about to do.
pub(super) const DOWN: u8 = b'd';
pub(super) const UP: u8 = b'u';
/// Between two reports of a sink, each the count so far, big-endian.
const REPORT: Duration = Duration::from_millis(100);
/// Read and written at once.
pub(super) const PIECE: usize = 64 * 1024;

/// In the demo cluster all pods share the ports of its machine.
pub(super) async fn bind() -> std::io::Result<TcpListener> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await
}

pub(super) async fn serve(listener: TcpListener) -> anyhow::Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        // A client that goes away in the middle is how each measurement ends.
        tokio::spawn(connection(stream));
    }
}

async fn connection(mut stream: TcpStream) -> std::io::Result<()> {
    match stream.read_u8().await? {
        DOWN => {
            let piece = vec![0; PIECE];
            loop {
                stream.write_all(&piece).await?;
            }
        }
        UP => {
            let (mut from, mut to) = stream.into_split();
            let received = Arc::new(AtomicU64::new(0));
            let reported = received.clone();
            let reporting = async move {
                loop {
                    tokio::time::sleep(REPORT).await;
                    to.write_u64(reported.load(Ordering::Relaxed)).await?;
                }
            };
            let receiving = async move {
                let mut piece = vec![0; PIECE];
                loop {
                    match from.read(&mut piece).await? {
                        0 => return Ok(()),
                        count => received.fetch_add(count as u64, Ordering::Relaxed),
                    };
                }
            };
            tokio::select! {
                ended = receiving => ended,
                ended = reporting => ended,
            }
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_source_gives_bytes_and_a_sink_counts_them() {
        let listener = bind().await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener));

        let mut down = TcpStream::connect(address).await.unwrap();
        down.write_all(&[DOWN]).await.unwrap();
        let mut got = vec![1; 3 * PIECE];
        down.read_exact(&mut got).await.unwrap();
        assert!(got.iter().all(|byte| *byte == 0));

        let mut up = TcpStream::connect(address).await.unwrap();
        up.write_all(&[UP]).await.unwrap();
        up.write_all(&[0; 1000]).await.unwrap();
        while up.read_u64().await.unwrap() < 1000 {}
    }
}
