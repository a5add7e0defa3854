//! The body of an answer on its way to the user: every chunk at once, cut where the API server's was
//! cut, without trailers.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use throwline_ops::Share;

use crate::audit::Record;
use crate::live::{EndReason, Permission};
use crate::metrics::Metrics;
use crate::quotas::{SendPermit, SendQuota};
use crate::upstream::Lease;

/// The API server's body on its way to the user; holds the request's audit record and its place in the
/// pool.
pub(crate) struct Download {
    /// Was read before; goes first.
    first: Bytes,
    inner: Incoming,
    lease: Option<Lease>,
    record: Record,
    quota: SendQuota,
    /// For the next chunk; kept while the API server has none.
    permit: Option<SendPermit>,
    /// The end of the permission; `None` where it lasts as long as the session.
    expiry: Option<BoxFuture<'static, EndReason>>,
    metrics: Metrics,
    end: End,
    _share: Share,
}

/// Why an answer was cut. hyper turns it into a reset (HTTP/2) or a cut connection (HTTP/1.1).
#[derive(Debug, thiserror::Error)]
pub(crate) enum DownloadError {
    #[error("the API server broke off the answer: {0}")]
    Upstream(#[source] hyper::Error),
    #[error("{}", .0.text())]
    Ended(EndReason),
}

/// What a request holds until its answer has ended.
pub(super) struct Held {
    pub(super) share: Share,
    pub(super) quota: SendQuota,
    pub(super) permission: Permission,
}

#[derive(PartialEq, Eq)]
enum End {
    NotYet,
    Clean,
    Cut,
}

impl Download {
    pub(super) fn new(
        inner: Incoming,
        lease: Option<Lease>,
        record: Record,
        held: Held,
        metrics: Metrics,
    ) -> Self {
        let Held {
            share,
            quota,
            permission,
        } = held;
        let expiry = permission
            .is_limited()
            .then(|| async move { permission.ended().await }.boxed());
        Self {
            first: Bytes::new(),
            inner,
            lease,
            record,
            quota,
            permit: None,
            expiry,
            metrics,
            end: End::NotYet,
            _share: share,
        }
    }

    /// The same with these bytes before it, which were read already.
    pub(super) fn after(mut self, first: Bytes) -> Self {
        self.first = first;
        self
    }
}

impl Body for Download {
    type Data = Bytes;
    type Error = DownloadError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, DownloadError>>> {
        let this = &mut *self;
        if let Some(expiry) = &mut this.expiry
            && let Poll::Ready(reason) = expiry.as_mut().poll(cx)
        {
            this.expiry = None;
            this.end = End::Cut;
            this.record.cut(reason.label());
            return Poll::Ready(Some(Err(DownloadError::Ended(reason))));
        }
        if !this.first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut this.first)))));
        }
        loop {
            // Memory is reserved before the frame is read: an answer without a reader must not fill
            // it.
            if this.permit.is_none() {
                this.permit = Some(ready!(this.quota.poll_permit(cx)));
            }
            match ready!(Pin::new(&mut this.inner).poll_frame(cx)) {
                // Trailers are left out.
                Some(Ok(frame)) => {
                    if let (Ok(bytes), Some(permit)) = (frame.into_data(), this.permit.take()) {
                        let counted = this.quota.count(bytes, permit);
                        return Poll::Ready(Some(Ok(Frame::data(counted))));
                    }
                }
                Some(Err(error)) => {
                    tracing::debug!(%error, audit_id = this.record.id(), "the API server cut an answer");
                    this.end = End::Cut;
                    this.record.cut("api-server");
                    this.metrics.cut_answers.inc();
                    return Poll::Ready(Some(Err(DownloadError::Upstream(error))));
                }
                None => {
                    this.end = End::Clean;
                    return Poll::Ready(None);
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (first, rest) = (self.first.len() as u64, self.inner.size_hint());
        let mut all = SizeHint::new();
        all.set_lower(rest.lower().saturating_add(first));
        if let Some(upper) = rest.upper().and_then(|upper| upper.checked_add(first)) {
            all.set_upper(upper);
        }
        all
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
