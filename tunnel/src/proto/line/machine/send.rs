//! The sending half: payload is gathered into frames, and kept until the peer acknowledges it.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::super::send_buffer::SendBuffer;
use super::super::{HEADER_LEN, MAX_DATA, ResetCode, SEALED_CHUNK, Sender, kind, put};

/// Bytes gathered before they must be handed down: a whole chunk of bulk.
const CORK: usize = SEALED_CHUNK;

/// Least capacity of a buffer for frames; most hold one request.
const MIN_CAPACITY: usize = 4 * 1024;

/// How far this side is with its own end of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SendState {
    Open,
    /// FIN goes out behind everything that was written, on each stream until it is acknowledged.
    FinSent,
    /// The peer has the FIN and everything before it.
    FinAcked,
    /// RESET goes out behind everything that was written, on each stream.
    Reset {
        code: ResetCode,
    },
}

#[derive(Debug)]
pub(super) struct SendHalf {
    pub(super) sender: Sender,
    pub(super) state: SendState,
    /// Payload kept for a retransmission. `None`: the line ends with its stream.
    pub(super) buffer: Option<SendBuffer>,
    /// Frames to be handed down.
    output: BytesMut,
    /// Where in `output` the header of the DATA frame is that writes are still added to.
    open_frame: Option<usize>,
    /// Payload in `output` that goes to `buffer` when it is handed down.
    payloads: Vec<Range<usize>>,
    retransmitted: u64,
}

impl SendHalf {
    pub(super) fn new(peer_window: u32, resumable: bool) -> Self {
        Self {
            sender: Sender::new(peer_window),
            state: SendState::Open,
            buffer: resumable.then(SendBuffer::default),
            output: BytesMut::new(),
            open_frame: None,
            payloads: Vec::new(),
            retransmitted: 0,
        }
    }

    pub(super) fn is_resumable(&self) -> bool {
        self.buffer.is_some()
    }

    pub(super) fn retransmitted(&self) -> u64 {
        self.retransmitted
    }

    /// How many of `len` bytes window, frame and cork allow.
    pub(super) fn room(&self, len: usize) -> usize {
        if self.state != SendState::Open {
            return 0;
        }
        let max = self
            .sender
            .room()
            .min(CORK.saturating_sub(self.output.len()))
            .min(MAX_DATA);
        len.min(max)
    }

    /// Adds payload to the open frame. False: it does not fit there.
    pub(super) fn append(&mut self, payload: &[u8]) -> bool {
        let Some(at) = self.open_frame else {
            return false;
        };
        let fits = payload.len() <= MAX_DATA - (self.output.len() - at - HEADER_LEN);
        if fits {
            self.output.extend_from_slice(payload);
            self.sender.advance(payload.len());
        }
        fits
    }

    /// Begins a DATA frame with room for `len` bytes, behind an acknowledgement if there is one.
    pub(super) fn begin_frame(&mut self, len: usize, ack: Option<u64>) {
        self.close_frame();
        let need = len + 2 * HEADER_LEN;
        if self.output.capacity() - self.output.len() < need {
            // Bulk arrives in chunks: a buffer that grew with each of them would be copied each time.
            let capacity = if len < MIN_CAPACITY {
                MIN_CAPACITY
            } else {
                CORK
            };
            self.output.reserve(need.max(capacity));
        }
        if let Some(received) = ack {
            put(&mut self.output, kind::ACK, 0, received);
        }
        self.open_frame = Some(self.output.len());
        put(&mut self.output, kind::DATA, 0, self.sender.sent());
    }

    /// Closes the open frame: no more payload is added to it.
    fn close_frame(&mut self) {
        if let Some(at) = self.open_frame.take() {
            let payload = at + HEADER_LEN..self.output.len();
            // `append` keeps it within MAX_DATA.
            let len = (payload.len() as u16).to_be_bytes();
            self.output[at + 2..at + 4].copy_from_slice(&len);
            if self.buffer.is_some() {
                self.payloads.push(payload);
            }
        }
    }

    /// Where a control frame is to be written, behind everything so far.
    pub(super) fn control(&mut self) -> &mut BytesMut {
        self.close_frame();
        &mut self.output
    }

    pub(super) fn has_open_frame(&self) -> bool {
        self.open_frame.is_some()
    }

    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    pub(super) fn is_corked(&self) -> bool {
        self.output.len() + HEADER_LEN >= CORK
    }

    /// Everything before this offset has arrived at the peer.
    pub(super) fn on_arrived(&mut self, offset: u64) {
        if let Some(buffer) = &mut self.buffer {
            buffer.free_to(offset);
        }
    }

    /// Takes all frames gathered so far, and keeps their payload if it may have to be sent again.
    pub(super) fn flush_to_buffer(&mut self) -> Bytes {
        self.close_frame();
        let frames = self.output.split().freeze();
        if let Some(buffer) = &mut self.buffer {
            for payload in self.payloads.drain(..) {
                buffer.push(frames.slice(payload));
            }
        }
        frames
    }

    /// Frames with payload that is sent again from `from` on, and where to go on after them.
    pub(super) fn retransmit(&mut self, from: u64) -> (Bytes, Option<u64>) {
        let Some(buffer) = &self.buffer else {
            return (Bytes::new(), None);
        };
        let mut out = BytesMut::with_capacity(CORK + HEADER_LEN);
        let mut at = from;
        while out.len() < CORK
            && let Some(piece) = buffer.piece(at)
        {
            let n = piece.len().min(CORK);
            // At most CORK, which is below MAX_DATA.
            put(&mut out, kind::DATA, n as u16, at);
            out.extend_from_slice(&piece[..n]);
            at += n as u64;
        }
        self.retransmitted += at - from;
        (out.freeze(), (at < buffer.end()).then_some(at))
    }

    /// Frees all capacity that holds nothing.
    pub(super) fn release_memory(&mut self) {
        if self.output.is_empty() {
            self.output = BytesMut::new();
        }
    }
}
