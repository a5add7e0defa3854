//! Bodies of answers: those that pass through, and short ones of our own.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use throwline_kube_wire::Status;
use throwline_tunnel::line::Handle;
use throwline_tunnel::mux;

use crate::request::goaway::GoawayReason;
use crate::request::proxy::InFlight;
use crate::request::stream_error;
use crate::session::{Lease, UpgradeSession, lost};

/// Released when the body ends or is dropped: its session and its place among open requests.
pub(crate) type Guards = (Either<Lease, UpgradeSession>, InFlight);

pin_project! {
    /// The body of an answer to kubectl. A pass-through body forwards each frame on arrival, and an
    /// error as an error, which hyper turns into a reset or an aborted connection.
    #[project = BodyProj]
    pub(crate) enum Body {
        Own { #[pin] full: Full<Bytes> },
        Passing {
            #[pin] incoming: Incoming,
            guards: Option<Box<Guards>>,
            watch: Option<Watch>,
            line_end: Option<LineEnd>,
        },
    }
}

/// Where the reason goes when the line below has ended under an answer that has no place for it.
pub(crate) struct LineEnd {
    cluster: String,
    line: Handle<mux::Stream>,
    goaway: GoawayReason,
}

impl LineEnd {
    fn report(&self) {
        // Only what ends all that runs over the line: other answers of the connection go on otherwise.
        if let Some(error) = self.line.failure() {
            let failure = stream_error::line_failure(&self.cluster, &error);
            self.goaway.set(Status::from(&failure).message);
        }
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
    fn end(&mut self, error: hyper::Error) -> Result<Frame<Bytes>, hyper::Error> {
        if !std::mem::replace(&mut self.is_between, false) {
            return Err(error);
        }
        self.is_over = true;
        let line = self.line.as_ref().and_then(Handle::failure);
        let failure = match line {
            Some(error) => stream_error::line_failure(&self.cluster, &error),
            None => lost(&self.cluster, error),
        };
        Ok(Frame::data(stream_error::error_event(&failure)))
    }
}

/// A body of our own.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Body::Own {
        full: Full::new(bytes.into()),
    }
}

/// A body from the cluster; `guards` are dropped at its end.
pub(crate) fn passing(incoming: Incoming, guards: Guards) -> Body {
    Body::Passing {
        incoming,
        guards: Some(Box::new(guards)),
        watch: None,
        line_end: None,
    }
}

impl Body {
    /// The same, with a place for the reason where its line ends under it.
    pub(crate) fn with_goaway(
        mut self,
        cluster: String,
        line: Option<Handle<mux::Stream>>,
        goaway: Option<GoawayReason>,
    ) -> Self {
        if let (Self::Passing { line_end, .. }, Some(line), Some(goaway)) =
            (&mut self, line, goaway)
        {
            *line_end = Some(LineEnd {
                cluster,
                line,
                goaway,
            });
        }
        self
    }
}

/// The same of a watch whose events are lines of JSON. A loss becomes its last event, which is how
/// an API server ends one too: a reset behind it could overtake it.
pub(crate) fn watch(
    incoming: Incoming,
    guards: Guards,
    cluster: String,
    line: Option<Handle<mux::Stream>>,
) -> Body {
    Body::Passing {
        incoming,
        guards: Some(Box::new(guards)),
        watch: Some(Watch {
            cluster,
            line,
            is_between: true,
            is_over: false,
        }),
        line_end: None,
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
                guards,
                watch,
                line_end,
            } => {
                if watch.as_ref().is_some_and(|watch| watch.is_over) {
                    return Poll::Ready(None);
                }
                let frame = incoming.poll_frame(cx);
                // Released with the last frame, not with the body, which hyper may hold longer.
                if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
                    guards.take();
                }
                let frame = ready!(frame);
                if let (Some(Ok(frame)), Some(guards)) = (&frame, guards.as_mut())
                    && let Either::Left(lease) = &mut guards.0
                {
                    lease.received(frame.data_ref().map_or(0, Bytes::len));
                }
                match (frame, watch) {
                    (Some(Ok(frame)), Some(watch)) => {
                        watch.pass(&frame);
                        Poll::Ready(Some(Ok(frame)))
                    }
                    // A watch has a place for the reason between two events; other bodies end with
                    // the error.
                    (Some(Err(error)), Some(watch)) => Poll::Ready(Some(watch.end(error))),
                    (Some(Err(error)), None) => {
                        if let Some(line_end) = line_end {
                            line_end.report();
                        }
                        Poll::Ready(Some(Err(error)))
                    }
                    (frame, _) => Poll::Ready(frame),
                }
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
