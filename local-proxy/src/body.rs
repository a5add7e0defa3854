//! Bodies: of answers, those that pass through and our own short ones; of requests, those that can
//! be sent once more as long as nobody has read them.

use crate::{forward::lost, last_words};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use std::{
    any::Any,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use throwline_tunnel::{line::Handle, mux};

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
            watch: Option<Watch>,
        },
    }
}

/// A watch's events, which are lines.
pub(crate) struct Watch {
    cluster: String,
    line: Option<Handle<mux::Stream>>,
    /// The last byte ended an event.
    is_between: bool,
    is_over: bool,
}

impl Watch {
    fn pass(&mut self, frame: &Frame<Bytes>) {
        if let Some(last) = frame.data_ref().and_then(|data| data.last()) {
            self.is_between = *last == b'\n';
        }
    }

    /// The last event, if there may be one.
    fn end(&mut self, error: &hyper::Error) -> Option<Frame<Bytes>> {
        if !std::mem::replace(&mut self.is_between, false) {
            return None;
        }
        self.is_over = true;
        let line = self.line.as_ref().and_then(Handle::failed);
        let failure = match line {
            Some(error) => last_words::why(&self.cluster, &error),
            None => lost(&self.cluster, error),
        };
        Some(Frame::data(last_words::last_event(&failure)))
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
        watch: None,
    }
}

/// The same of a watch whose events are lines of JSON. A loss becomes its last event, which is how
/// an API server ends one too: a reset behind it could overtake it.
pub(crate) fn watch(
    incoming: Incoming,
    held: impl Any + Send + Sync,
    cluster: String,
    line: Option<Handle<mux::Stream>>,
) -> Body {
    Body::Passing {
        incoming,
        held: Some(Box::new(held)),
        watch: Some(Watch {
            cluster,
            line,
            is_between: true,
            is_over: false,
        }),
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
            BodyProj::Passing {
                incoming,
                held,
                watch,
            } => {
                if watch.as_ref().is_some_and(|watch| watch.is_over) {
                    return Poll::Ready(None);
                }
                let frame = incoming.poll_frame(cx);
                if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
                    held.take();
                }
                match (&frame, watch) {
                    (Poll::Ready(Some(Ok(frame))), Some(watch)) => watch.pass(frame),
                    (Poll::Ready(Some(Err(error))), Some(watch)) => {
                        if let Some(event) = watch.end(error) {
                            return Poll::Ready(Some(Ok(event)));
                        }
                    }
                    _ => {}
                }
                frame
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own { full } => full.is_end_stream(),
            Self::Passing {
                incoming, watch, ..
            } => match watch {
                Some(watch) => watch.is_over || incoming.is_end_stream(),
                None => incoming.is_end_stream(),
            },
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own { full } => full.size_hint(),
            Self::Passing { incoming, .. } => incoming.size_hint(),
        }
    }
}

/// A request's body. Clones are the same body; one is read, the others only know whether it was.
pub(crate) struct Upload<B = Incoming>(Arc<Mutex<Kept<B>>>);

struct Kept<B> {
    body: B,
    is_read: bool,
}

impl<B> Upload<B> {
    pub(crate) fn new(body: B) -> Self {
        let is_read = false;
        Self(Arc::new(Mutex::new(Kept { body, is_read })))
    }

    /// Whether anything of it may have left.
    pub(crate) fn is_read(&self) -> bool {
        self.lock().is_read
    }

    fn lock(&self) -> MutexGuard<'_, Kept<B>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> Clone for Upload<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: http_body::Body + Unpin> http_body::Body for Upload<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut kept = self.lock();
        kept.is_read = true;
        Pin::new(&mut kept.body).poll_frame(cx)
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
    use super::*;
    use http_body_util::BodyExt;

    #[tokio::test]
    async fn a_body_that_was_not_read_can_be_sent_again() {
        let upload = Upload::new(Full::new(Bytes::from_static(b"ahoy")));
        drop(upload.clone());
        assert!(!upload.is_read());
        let sent = upload.clone().collect().await.unwrap();
        assert_eq!(sent.to_bytes(), "ahoy");
        assert!(upload.is_read());
    }
}
