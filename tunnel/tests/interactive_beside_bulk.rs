//! How many bytes of bulk pass before a small frame does, where one hop is slow. Counted in bytes; no
//! clock takes part.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use support::{accept_config, dial_config, stream};
use throwline_tunnel::carrier::{self, Connection};
use throwline_tunnel::mux;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::time::sleep;

/// What the connection of a carrier holds unsent, as `TCP_NOTSENT_LOWAT` bounds it.
const SOCKET: usize = 32 * 1024;
/// Lines of bulk on one carrier.
const BULK: usize = 4;
/// A message that the WebSocket sends, and one that is gathered behind it.
const MESSAGES: usize = 2 * 48 * 1024;
/// A frame of each line of bulk, whose turn comes before: fair, and no more than one each. The multiplexer
/// has one more that it writes, and one that follows.
const FRAMES: usize = (BULK + 2) * 40 * 1024;

/// The slow hop: passes as many bytes as were granted.
#[derive(Clone, Default)]
struct Hop(Arc<Mutex<Granted>>);

#[derive(Default)]
struct Granted {
    /// `None`: any number.
    left: Option<usize>,
    waiting: Option<Waker>,
}

impl Hop {
    fn stop(&self) {
        self.0.lock().unwrap().left = Some(0);
    }

    fn grant(&self, bytes: usize) {
        let mut granted = self.0.lock().unwrap();
        granted.left = granted.left.map(|left| left + bytes);
        if let Some(waker) = granted.waiting.take() {
            waker.wake();
        }
    }
}

struct Slow<S>(S, Hop);

impl<S: AsyncRead + Unpin> AsyncRead for Slow<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let hop = self.1.clone();
        let mut granted = hop.0.lock().unwrap();
        let most = granted.left.unwrap_or(usize::MAX).min(buf.remaining());
        if most == 0 {
            granted.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
        ready!(Pin::new(&mut self.0).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        granted.left = granted.left.map(|left| left - read);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Slow<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// A carrier whose acceptor reads through the hop.
async fn pair(hop: &Hop) -> (Connection, Connection) {
    let (dialer, acceptor) = tokio::io::duplex(SOCKET);
    let (dial, accept) = (dial_config("http://localhost"), accept_config());
    let (dialled, accepted) = tokio::join!(
        carrier::dial_over(dialer, &dial),
        carrier::accept(Slow(acceptor, hop.clone()), accept, |_, _| Ok(()))
    );
    (dialled.unwrap(), accepted.unwrap().0)
}

/// Bytes after which windows and messages are as large as they become.
const WARM: usize = 16 * 1024 * 1024;

/// Lines of bulk that write without end, to readers that keep up; until the hop stops them.
async fn bulk(near: &Connection, far: &mut Connection, hop: &Hop) {
    for _ in 0..BULK {
        let (mut writer, mut reader) = stream(near, far).await;
        tokio::spawn(async move {
            let piece = vec![b'x'; 64 * 1024];
            while writer.write_all(&piece).await.is_ok() {}
        });
        tokio::spawn(async move {
            let mut piece = vec![0; 64 * 1024];
            while reader.read(&mut piece).await.is_ok_and(|read| read > 0) {}
        });
    }
    hop.stop();
    hop.grant(WARM);
    // Paused time passes when nothing moves any more: everything that can be full is full.
    sleep(Duration::from_secs(1)).await;
}

/// Writes one byte to a stopped hop, then lets bytes pass until it has arrived; how many that were.
async fn bytes_until_a_keystroke(
    (mut keyboard, mut screen): (mux::Stream, mux::Stream),
    hop: &Hop,
    most: usize,
) -> usize {
    const STEP: usize = 256;
    hop.stop();
    keyboard.write_all(b"k").await.unwrap();
    keyboard.flush().await.unwrap();
    let mut key = [0];
    let arrived = screen.read_exact(&mut key);
    tokio::pin!(arrived);
    let mut passed = 0;
    while passed < most {
        hop.grant(STEP);
        passed += STEP;
        tokio::select! {
            biased;
            read = &mut arrived => {
                read.unwrap();
                return passed;
            }
            () = sleep(Duration::from_millis(1)) => {}
        }
    }
    panic!("it has not arrived after {passed} bytes");
}

#[tokio::test(start_paused = true)]
async fn on_one_carrier_a_keystroke_waits_for_what_is_queued_only() {
    let hop = Hop::default();
    let (near, mut far) = pair(&hop).await;
    let keys = stream(&near, &mut far).await;
    bulk(&near, &mut far, &hop).await;
    let passed = bytes_until_a_keystroke(keys, &hop, SOCKET + MESSAGES + FRAMES).await;
    println!("{} KiB", passed / 1024);
}

#[tokio::test(start_paused = true)]
async fn beside_a_carrier_for_bulk_a_keystroke_waits_for_none() {
    let (hop, bulk_hop) = (Hop::default(), Hop::default());
    let (near, mut far) = pair(&hop).await;
    let keys = stream(&near, &mut far).await;
    let (near_bulk, mut far_bulk) = pair(&bulk_hop).await;
    bulk(&near_bulk, &mut far_bulk, &bulk_hop).await;
    // No byte of bulk passes from here on.
    bytes_until_a_keystroke(keys, &hop, 256).await;
}
