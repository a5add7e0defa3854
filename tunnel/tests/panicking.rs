//! Case 25: a driver that panics ends its own carrier, and no other.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use support::{accept_config, dial_config, gone, pair, pattern, stream};
use throwline_tunnel::carrier;
use throwline_tunnel::proto::close::{CloseCode, ClosedBy};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf};

/// A connection whose next read panics when it is set to: it stands for any fault of ours below.
struct Faulty {
    io: DuplexStream,
    panics: Arc<AtomicBool>,
}

impl AsyncRead for Faulty {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        assert!(!self.panics.load(Ordering::SeqCst), "told to panic");
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for Faulty {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[tokio::test]
async fn one_carrier_dies_and_the_other_goes_on() {
    let panics = Arc::new(AtomicBool::new(false));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let faulty = Faulty {
        io: far,
        panics: panics.clone(),
    };
    let dial = dial_config("http://localhost");
    let (dialed, accepted) = tokio::join!(
        carrier::dial_over(near, &dial),
        carrier::accept(faulty, accept_config(), |_, _| Ok(()))
    );
    let (dialed, mut accepted) = (dialed.unwrap(), accepted.unwrap().0);
    let (mut here, mut there) = stream(&dialed, &mut accepted).await;
    let (healthy, mut other) = pair(64 * 1024).await;

    panics.store(true, Ordering::SeqCst);
    here.write_all(b"ahoy").await.unwrap();
    let reason = accepted.carrier.closed().await;
    assert_eq!(
        (reason.by, reason.code),
        (ClosedBy::Us, CloseCode::Internal)
    );
    // No reader hangs, at either end. To tell a cut from an end is the line's task.
    let _ = there.read_to_end(&mut Vec::new()).await;
    dialed.carrier.closed().await;
    let _ = here.read_to_end(&mut Vec::new()).await;
    drop((here, there, dialed, accepted));

    let (mut out, mut back) = stream(&healthy, &mut other).await;
    let sent = pattern(100_000);
    let write = async {
        out.write_all(&sent).await.unwrap();
        out.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let ((), read) = tokio::join!(write, back.read_to_end(&mut got));
    read.unwrap();
    assert!(got == sent);
    drop((out, back));
    gone(healthy, other).await;
}
