//! Whether a stream carries the line, and what is lost with that stream.

use bytes::{Buf as _, Bytes};

/// Everything that belongs to one stream lives in the variant, so that it cannot outlast it.
#[derive(Debug)]
pub(super) enum Attachment {
    Attached(Attached),
    /// Payload is only kept, for the next stream.
    Detached,
}

/// The outgoing side of a stream.
#[derive(Debug, Default)]
pub(super) struct Attached {
    /// What is being handed down.
    pub(super) chunk: Bytes,
    /// Payload from this offset on is sent again before anything new.
    pub(super) retransmit_from: Option<u64>,
    /// Control frames to be sent.
    pub(super) pending: Pending,
    /// The peer has asked for the line to be resumed over another carrier.
    pub(super) move_requested: bool,
    /// Something waits to be handed down that the peer will answer, or that it acknowledges as bulk
    /// goes on.
    pub(super) expects_reply: bool,
}

impl Attached {
    /// `n` bytes of the chunk were handed down. True if the peer is expected to answer them.
    pub(super) fn on_written(&mut self, n: usize, has_more_output: bool) -> bool {
        self.chunk.advance(n);
        // A frame that only answers, a PONG or the last ACK of an idle line, is itself not answered.
        // If it were waited for, two idle ends would probe each other without end.
        let expected = self.expects_reply;
        self.expects_reply = expected
            && (!self.chunk.is_empty() || has_more_output || self.retransmit_from.is_some());
        expected
    }

    pub(super) fn has_output(&self) -> bool {
        !self.chunk.is_empty() || self.retransmit_from.is_some() || !self.pending.is_empty()
    }
}

impl Attachment {
    pub(super) fn attached(&self) -> Option<&Attached> {
        match self {
            Self::Attached(attached) => Some(attached),
            Self::Detached => None,
        }
    }

    /// Queues a control frame. Without a stream it would be lost: `attach` queues again what the next
    /// one needs.
    pub(super) fn queue(&mut self, frame: Pending) {
        if let Self::Attached(attached) = self {
            attached.pending.insert(frame);
        }
    }

    /// The same for a frame that the peer answers.
    pub(super) fn queue_request(&mut self, frame: Pending) {
        self.queue(frame);
        self.expect_reply();
    }

    pub(super) fn expect_reply(&mut self) {
        if let Self::Attached(attached) = self {
            attached.expects_reply = true;
        }
    }
}

/// A set of control frames. One of each is enough, however often it is queued.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pending(u8);

impl Pending {
    pub(super) const PONG: Self = Self(1);
    pub(super) const PING: Self = Self(1 << 1);
    pub(super) const MOVE: Self = Self(1 << 2);
    pub(super) const DONE: Self = Self(1 << 3);
    pub(super) const FIN: Self = Self(1 << 4);
    pub(super) const RESET: Self = Self(1 << 5);

    pub(super) fn insert(&mut self, frame: Self) {
        self.0 |= frame.0;
    }

    pub(super) fn contains(self, frame: Self) -> bool {
        self.0 & frame.0 != 0
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}
