//! The body of a request on its way to the API server: bounded in time, without trailers.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

/// The body of a request: bytes of the agent, or a user's as they arrive.
pub(crate) type OutBody = Either<Full<Bytes>, Upload>;

/// A user's body on its way to the API server.
pub(crate) struct Upload {
    inner: Incoming,
    idle: Pin<Box<Sleep>>,
    limit: Duration,
    waiting: bool,
    stalled: Arc<AtomicBool>,
    /// Cancelled when the body has ended: sent, or broken off.
    _sent: DropGuard,
}

/// The state of an upload, for the wait for its answer.
#[derive(Clone)]
pub(crate) struct UploadWatch {
    stalled: Arc<AtomicBool>,
    sent: CancellationToken,
}

impl UploadWatch {
    /// Ends when there is nothing more to send.
    pub(crate) async fn sent(&self) {
        self.sent.cancelled().await;
    }

    /// Whether it was broken off because the client sent nothing.
    pub(crate) fn stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

/// Why an upload was broken off.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UploadError {
    #[error("the client broke off the request's body: {0}")]
    Client(#[source] hyper::Error),
    #[error("the client sent nothing of the request's body for {} s", .0.as_secs())]
    Stalled(Duration),
}

impl Upload {
    pub(crate) fn new(inner: Incoming, limit: Duration) -> (Self, UploadWatch) {
        let idle = Box::pin(tokio::time::sleep(limit));
        let sent = CancellationToken::new();
        let watch = UploadWatch {
            stalled: Arc::default(),
            sent: sent.clone(),
        };
        let stalled = watch.stalled.clone();
        (
            Self {
                inner,
                idle,
                limit,
                waiting: false,
                stalled,
                _sent: sent.drop_guard(),
            },
            watch,
        )
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inner.is_end_stream()
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = UploadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, UploadError>>> {
        loop {
            match Pin::new(&mut self.inner).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    self.waiting = false;
                    // Trailers could hold what the head may not (Impersonate-*).
                    if frame.is_data() {
                        return Poll::Ready(Some(Ok(frame)));
                    }
                }
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Some(Err(UploadError::Client(error))));
                }
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => break,
            }
        }
        // The limit is on idleness, so it restarts with each pause of the client.
        if !self.waiting {
            self.waiting = true;
            let deadline = Instant::now() + self.limit;
            self.idle.as_mut().reset(deadline);
        }
        ready!(self.idle.as_mut().poll(cx));
        self.stalled.store(true, Ordering::Relaxed);
        Poll::Ready(Some(Err(UploadError::Stalled(self.limit))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
