//! Bodies of requests to an agent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::body::Incoming;

use crate::session::long_transfers::Transfer;

/// On an API session: kubectl's body, or one of our own.
pub(crate) type ApiBody = Either<ResendableBody, Full<Bytes>>;

/// On an upgrade session: kubectl's body, or an empty one.
pub(crate) type UpgradeBody = Either<Incoming, Full<Bytes>>;

/// A request's body that can be sent again as long as it is unread. Clones share one body.
pub(crate) struct ResendableBody<B = Incoming>(Arc<Mutex<BodyState<B>>>);

struct BodyState<B> {
    body: B,
    is_read: bool,
    /// Of the session that it goes to.
    transfer: Option<Transfer>,
}

impl<B> ResendableBody<B> {
    pub(crate) fn new(body: B) -> Self {
        let state = BodyState {
            body,
            is_read: false,
            transfer: None,
        };
        Self(Arc::new(Mutex::new(state)))
    }

    /// The same body, counted as this upload from now on.
    pub(crate) fn counted(&self, transfer: Transfer) -> Self {
        self.lock().transfer = Some(transfer);
        self.clone()
    }

    /// Whether any part of it may have been sent.
    pub(crate) fn is_read(&self) -> bool {
        self.lock().is_read
    }

    fn lock(&self) -> MutexGuard<'_, BodyState<B>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Clone for ResendableBody<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: http_body::Body<Data = Bytes> + Unpin> http_body::Body for ResendableBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut state = self.lock();
        state.is_read = true;
        let frame = ready!(Pin::new(&mut state.body).poll_frame(cx));
        if let (Some(Ok(frame)), Some(transfer)) = (&frame, &mut state.transfer) {
            transfer.count(frame.data_ref().map_or(0, Bytes::len));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.lock().body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.lock().body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn a_body_that_was_not_read_can_be_sent_again() {
        let body = ResendableBody::new(Full::new(Bytes::from_static(b"ahoy")));
        drop(body.clone());
        assert!(!body.is_read());
        let sent = body.clone().collect().await.unwrap();
        assert_eq!(sent.to_bytes(), "ahoy");
        assert!(body.is_read());
    }
}
