//! How sessions are opened, and what they depend on.

use std::time::Duration;

use futures::future::BoxFuture;
use throwline_tunnel::line::Handle;
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::LineKind;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::failure::Failure;

/// A sealed session's byte stream.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A session fresh from its handshake.
pub(crate) struct Dialed {
    pub(crate) io: Box<dyn Io>,
    /// When it was dialled; see [`Dial::epoch`].
    pub(crate) epoch: Epoch,
    /// The line below, if that outlives its carrier.
    pub(crate) line: Option<Handle<mux::Stream>>,
    /// From end to end, as measured by the line's hello.
    pub(crate) round_trip: Duration,
}

/// Identity and carrier of a session. A session of an earlier epoch finishes its requests and receives no new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Epoch {
    /// Rises with the user's identity.
    pub(crate) generation: u64,
    /// Rises with each carrier, so that a draining one receives no new requests. Sessions on resumable
    /// lines are not bound to it.
    pub(crate) carrier: u64,
}

/// What a session depends on: its epoch and its line.
pub(crate) struct SessionBasis {
    epoch: Epoch,
    pub(super) line: Option<Handle<mux::Stream>>,
}

impl SessionBasis {
    pub(super) fn of(dialed: &Dialed) -> Self {
        Self {
            epoch: dialed.epoch,
            line: dialed.line.clone(),
        }
    }

    pub(super) fn is_current(&self, now: Epoch) -> bool {
        self.epoch.generation == now.generation
            && (self.line.is_some() || self.epoch.carrier == now.carrier)
    }

    /// A detached line will be resumed, but a new request is better served by another session, or
    /// fails at once with the reason.
    pub(super) fn is_connected(&self) -> bool {
        let line = self.line.as_ref();
        line.is_none_or(|line| line.phase().attached)
    }
}

/// Opens sealed sessions.
pub(crate) trait Dial: Send + Sync + 'static {
    fn dial<'a>(
        &'a self,
        cluster: &'a str,
        kind: LineKind,
    ) -> BoxFuture<'a, Result<Dialed, Failure>>;

    fn epoch(&self) -> Epoch;
}
