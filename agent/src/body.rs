//! Bodies on their way: every chunk at once, never a clean end where there was a cut, no trailers.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::audit::Record;
use crate::metrics::Metrics;
use crate::upstream::Lease;

/// A user's body on its way up.
pub(crate) struct Upload {
    inner: Incoming,
    idle: Pin<Box<Sleep>>,
    limit: Duration,
    waiting: bool,
    stalled: Arc<AtomicBool>,
    /// Cancelled when the body is gone: sent to its end, or given up.
    _sent: DropGuard,
}

/// What is known of an upload by those who wait for its answer.
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
                    // Trailers could say again what the head may not (Impersonate-*).
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

/// The API server's body on its way down; holds the request's audit record and its place in the pool.
pub(crate) struct Download {
    inner: Incoming,
    lease: Option<Lease>,
    record: Record,
    metrics: Metrics,
    end: End,
}

#[derive(PartialEq, Eq)]
enum End {
    NotYet,
    Clean,
    Cut,
}

impl Download {
    pub(crate) fn new(
        inner: Incoming,
        lease: Option<Lease>,
        record: Record,
        metrics: Metrics,
    ) -> Self {
        Self {
            inner,
            lease,
            record,
            metrics,
            end: End::NotYet,
        }
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        loop {
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)) {
                Some(Ok(frame)) if frame.is_data() => return Poll::Ready(Some(Ok(frame))),
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    // hyper turns this error into a reset (HTTP/2) or a cut connection (HTTP/1.1).
                    tracing::debug!(%error, audit_id = self.record.id(), "the API server cut an answer");
                    self.end = End::Cut;
                    self.record.cut("api-server");
                    self.metrics.cut_answers.inc();
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.end = End::Clean;
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if self.end == End::Clean || self.inner.is_end_stream() {
            if let Some(lease) = self.lease.take() {
                lease.give_back();
            }
        } else if self.end == End::NotYet {
            self.record.cut("client");
        }
    }
}
