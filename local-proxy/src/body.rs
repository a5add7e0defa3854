//! Response bodies: those that pass through, and our own short ones.

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use std::{
    any::Any,
    pin::Pin,
    task::{Context, Poll},
};

pin_project! {
    /// What kubectl is answered with. A pass-through body hands on each frame as it comes, and an
    /// error as an error, which hyper turns into a reset or an aborted connection.
    #[project = BodyProj]
    pub(crate) enum Body {
        Own { #[pin] full: Full<Bytes> },
        Passing {
            #[pin] incoming: Incoming,
            // Given back when the body ends or is dropped: the session's stream, the gauges.
            held: Option<Box<dyn Any + Send + Sync>>,
        },
    }
}

/// A body of our own.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Body::Own {
        full: Full::new(bytes.into()),
    }
}

/// A body from the cluster; `held` is dropped with its end.
pub(crate) fn passing(incoming: Incoming, held: impl Any + Send + Sync) -> Body {
    Body::Passing {
        incoming,
        held: Some(Box::new(held)),
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.project() {
            BodyProj::Own { full } => full.poll_frame(cx).map_err(|never| match never {}),
            BodyProj::Passing { incoming, held } => {
                let frame = incoming.poll_frame(cx);
                if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
                    held.take();
                }
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own { full } => full.is_end_stream(),
            Self::Passing { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own { full } => full.size_hint(),
            Self::Passing { incoming, .. } => incoming.size_hint(),
        }
    }
}
