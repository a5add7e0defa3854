//! Bodies of requests to an agent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::body::Incoming;

/// On an API session: kubectl's body, or one of our own.
pub(crate) type ApiBody = Either<ResendableBody, Full<Bytes>>;

/// On an upgrade session: kubectl's body, or an empty one.
pub(crate) type UpgradeBody = Either<Incoming, Full<Bytes>>;

/// A request's body that can be sent again as long as it is unread. Clones share one body.
pub(crate) struct ResendableBody<B = Incoming>(Arc<Mutex<BodyState<B>>>);

struct BodyState<B> {
    body: B,
    is_read: bool,
}

impl<B> ResendableBody<B> {
    pub(crate) fn new(body: B) -> Self {
        let is_read = false;
        Self(Arc::new(Mutex::new(BodyState { body, is_read })))
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

impl<B: http_body::Body + Unpin> http_body::Body for ResendableBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut state = self.lock();
        state.is_read = true;
        Pin::new(&mut state.body).poll_frame(cx)
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
