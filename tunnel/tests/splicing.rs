//! Splices: what one side sends reaches the other, whole, and both end.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{eventually, pattern, pipe};
use throwline_tunnel::splice::{Budget, Config, End, Meter, Outcome, splice};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::task::JoinHandle;

fn spliced(config: Config) -> (DuplexStream, DuplexStream, Arc<Meter>, JoinHandle<Outcome>) {
    spliced_over(1024, config)
}

/// Between pipes that hold this many bytes.
fn spliced_over(
    capacity: usize,
    config: Config,
) -> (DuplexStream, DuplexStream, Arc<Meter>, JoinHandle<Outcome>) {
    let (a, near) = pipe(capacity);
    let (far, b) = pipe(capacity);
    let meter = Arc::new(Meter::default());
    let task = tokio::spawn({
        let meter = meter.clone();
        async move { splice(near, far, &config, &meter).await }
    });
    (a, b, meter, task)
}

#[tokio::test]
async fn bytes_pass_and_an_end_half_closes() {
    let (mut a, mut b, meter, task) = spliced(Config::default());
    let bytes = pattern(300_000);
    let send = async {
        a.write_all(&bytes).await.unwrap();
        a.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(send, b.read_to_end(&mut got));
    read.unwrap();
    assert!(got == bytes);
    // The other direction still goes.
    b.write_all(b"late answer").await.unwrap();
    b.shutdown().await.unwrap();
    got.clear();
    a.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"late answer");
    let outcome = task.await.unwrap();
    assert!(
        outcome.a_to_b.end.is_clean() && outcome.b_to_a.end.is_clean(),
        "{outcome:?}"
    );
    assert_eq!((outcome.a_to_b.bytes, outcome.b_to_a.bytes), (300_000, 11));
    assert_eq!(meter.a_to_b.load(Ordering::Relaxed), 300_000);
}

#[tokio::test]
async fn an_error_delivers_what_was_read_and_ends_both() {
    let read_fails = tokio_test_like::FailsAfter::new(b"last words".to_vec());
    let (far, mut b) = pipe(1024);
    let meter = Meter::default();
    let outcome = splice(read_fails, far, &Config::default(), &meter).await;
    assert!(
        matches!(outcome.a_to_b.end, End::ReadFailed(_)),
        "{outcome:?}"
    );
    assert!(matches!(outcome.b_to_a.end, End::Cut), "{outcome:?}");
    let mut got = Vec::new();
    b.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"last words");
}

#[tokio::test]
async fn a_side_that_takes_no_more_is_still_read_to_its_end() {
    let (mut a, near) = pipe(1024);
    let (far, mut b) = pipe(1024);
    let task = tokio::spawn(async move {
        let (config, meter) = (Config::default(), Meter::default());
        splice(near, tokio_test_like::TakesNothing(far), &config, &meter).await
    });
    a.write_all(b"a ping that comes too late").await.unwrap();
    tokio::task::yield_now().await;
    let bytes = pattern(50_000);
    let send = async {
        b.write_all(&bytes).await.unwrap();
        b.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(send, a.read_to_end(&mut got));
    read.unwrap();
    assert!(got == bytes, "{} bytes", got.len());
    let outcome = task.await.unwrap();
    assert!(
        matches!(outcome.a_to_b.end, End::WriteFailed(_)) && outcome.b_to_a.end.is_clean(),
        "{outcome:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_writer_that_takes_nothing_is_left_at_the_deadline() {
    let read_fails = tokio_test_like::FailsAfter::new(vec![1; 50_000]);
    let (far, _b) = pipe(1024);
    let config = Config {
        drain: Duration::from_secs(3),
        ..Config::default()
    };
    let began = tokio::time::Instant::now();
    let outcome = splice(read_fails, far, &config, &Meter::default()).await;
    assert!(
        began.elapsed() <= Duration::from_secs(4),
        "{:?}",
        began.elapsed()
    );
    assert!(outcome.a_to_b.bytes < 50_000, "{outcome:?}");
}

#[tokio::test(start_paused = true)]
async fn half_closed_and_silent_ends_where_asked_to() {
    let config = Config {
        half_closed: Some(Duration::from_secs(10)),
        ..Config::default()
    };
    let (mut a, mut b, _, task) = spliced(config);
    a.shutdown().await.unwrap();
    // Bytes put the end off.
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(8)).await;
        b.write_all(b"still here").await.unwrap();
        a.read_exact(&mut [0; 10]).await.unwrap();
    }
    let began = tokio::time::Instant::now();
    let outcome = task.await.unwrap();
    assert!(
        began.elapsed() <= Duration::from_secs(11),
        "{:?}",
        began.elapsed()
    );
    assert!(outcome.a_to_b.end.is_clean(), "{outcome:?}");
    assert!(matches!(outcome.b_to_a.end, End::Cut), "{outcome:?}");
}

#[tokio::test]
async fn a_side_that_is_dropped_ends_the_other() {
    let (a, mut b, _, task) = spliced(Config::default());
    drop(a);
    assert_eq!(b.read(&mut [0; 1]).await.unwrap(), 0);
    b.write_all(b"nobody reads this").await.unwrap();
    eventually("the splice ends", || task.is_finished()).await;
    let outcome = task.await.unwrap();
    assert!(
        matches!(outcome.b_to_a.end, End::WriteFailed(_)),
        "{outcome:?}"
    );
}

mod tokio_test_like {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};
    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    /// Is read like any other, and fails to be written.
    pub(crate) struct TakesNothing(pub(crate) tokio::io::DuplexStream);

    impl AsyncRead for TakesNothing {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for TakesNothing {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Gives its bytes, then an error. Takes nothing.
    pub(crate) struct FailsAfter {
        bytes: Vec<u8>,
    }

    impl FailsAfter {
        pub(crate) fn new(bytes: Vec<u8>) -> Self {
            Self { bytes }
        }
    }

    impl AsyncRead for FailsAfter {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.bytes.is_empty() {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let n = buf.remaining().min(self.bytes.len());
            buf.put_slice(&self.bytes[..n]);
            self.bytes.drain(..n);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for FailsAfter {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }
}

#[tokio::test]
async fn what_comes_in_small_pieces_takes_no_large_buffer() {
    let budget = Budget::new(u64::MAX);
    let config = Config {
        budgets: vec![budget.clone()],
        ..Config::default()
    };
    let (mut near, mut far, _, _splice) = spliced(config);
    for size in [1, 80, 1000] {
        near.write_all(&pattern(size)).await.unwrap();
        let mut got = vec![0; size];
        far.read_exact(&mut got).await.unwrap();
        assert!(got == pattern(size));
        assert_eq!(budget.used(), 0, "for {size} bytes");
    }
    near.write_all(&pattern(8_000)).await.unwrap();
    eventually("bulk has a buffer", || budget.used() == 64 * 1024).await;
}

#[tokio::test]
async fn a_budget_that_others_hold_slows_and_does_not_stop() {
    let budget = Budget::new(64 * 1024);
    let sharing = || Config {
        budgets: vec![budget.clone(), Budget::new(u64::MAX)],
        ..Config::default()
    };
    let (mut stuck, reader, _, first) = spliced(sharing());
    // The far end is not read, so its buffer fills and is held.
    stuck.write_all(&pattern(40_000)).await.unwrap();
    eventually("the first one holds the budget", || {
        budget.used() == 64 * 1024
    })
    .await;

    // What arrives at once is more than a small buffer holds.
    let (mut a, mut b, _, second) = spliced_over(8 * 1024, sharing());
    let bytes = pattern(300_000);
    let send = async {
        a.write_all(&bytes).await.unwrap();
        a.shutdown().await.unwrap();
    };
    let mut got = Vec::new();
    let (_, read) = tokio::join!(send, b.read_to_end(&mut got));
    read.unwrap();
    assert!(got == bytes);
    assert!(budget.denied() > 0);
    assert_eq!(budget.used(), 64 * 1024);

    drop((a, b, stuck, reader));
    first.await.unwrap();
    second.await.unwrap();
    assert_eq!(budget.used(), 0);
}
