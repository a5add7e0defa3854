//! The receiving half: frames as they arrive, and payload until the reader takes it.

use std::collections::VecDeque;

use bytes::{Buf as _, BufMut, Bytes, BytesMut};

use super::super::{HEADER_LEN, Header, Position, Receiver, Violation, parse};

/// Capacity that the input may keep while the line waits for more.
const MAX_IDLE_CAPACITY: usize = 64 * 1024;

#[derive(Debug)]
pub(super) struct RecvHalf {
    pub(super) receiver: Receiver,
    /// Bytes of frames, as they arrive.
    pub(super) input: BytesMut,
    /// Bytes of payload still expected of the DATA frame at the front of `input`.
    payload_left: usize,
    /// Payload moved out of the way of the frames behind it; at most a window.
    unread: VecDeque<Bytes>,
    unread_bytes: usize,
}

impl RecvHalf {
    pub(super) fn new(window: u32) -> Self {
        Self {
            receiver: Receiver::new(window),
            input: BytesMut::new(),
            payload_left: 0,
            unread: VecDeque::new(),
            unread_bytes: 0,
        }
    }

    /// Hands out payload that was buffered, which was sent before everything in the input.
    pub(super) fn read_unread(&mut self, out: &mut impl BufMut) -> usize {
        let mut taken = 0;
        while let Some(front) = self.unread.front_mut()
            && out.has_remaining_mut()
        {
            let n = front.len().min(out.remaining_mut());
            out.put_slice(&front[..n]);
            front.advance(n);
            taken += n;
            if front.is_empty() {
                self.unread.pop_front();
            }
        }
        self.unread_bytes -= taken;
        taken
    }

    /// Hands out payload of the frame at the front of the input.
    pub(super) fn read_payload(&mut self, out: &mut impl BufMut) -> usize {
        let n = self
            .payload_left
            .min(self.input.len())
            .min(out.remaining_mut());
        if n > 0 {
            out.put_slice(&self.input[..n]);
            self.input.advance(n);
            self.payload_left -= n;
        }
        n
    }

    /// Takes one header off the input, with its type. `None`: it is not complete, or payload stands
    /// before it. A RESET is taken only when its reason is complete, too.
    pub(super) fn next_header(&mut self) -> Result<Option<(Header, u8)>, Violation> {
        if self.payload_left > 0 {
            return Ok(None);
        }
        let Some(header) = parse(&self.input)? else {
            return Ok(None);
        };
        if let Header::Reset { len, .. } = header
            && self.input.len() < HEADER_LEN + len
        {
            return Ok(None);
        }
        let kind = self.input[0];
        self.input.advance(HEADER_LEN);
        Ok(Some((header, kind)))
    }

    /// A DATA header was taken off; its payload follows.
    pub(super) fn on_data(&mut self, offset: u64, len: usize) -> Result<(), Violation> {
        // Payload counts only behind a header that is allowed here.
        self.receiver.on_data(offset, len)?;
        self.payload_left = len;
        Ok(())
    }

    /// Moves payload out of the way of the frames behind it. The window bounds how much. True if
    /// some was moved.
    pub(super) fn buffer_unread(&mut self) -> bool {
        let n = self.payload_left.min(self.input.len());
        if n > 0 {
            self.payload_left -= n;
            self.unread_bytes += n;
            let payload = self.input.split_to(n).freeze();
            self.unread.push_back(payload);
        }
        n > 0
    }

    /// Drops what was buffered, as if it had been read.
    pub(super) fn discard_unread(&mut self) {
        self.unread.clear();
        let discarded = std::mem::take(&mut self.unread_bytes);
        if discarded > 0 {
            self.receiver.consume(discarded);
        }
    }

    pub(super) fn unread_bytes(&self) -> usize {
        self.unread_bytes
    }

    pub(super) fn has_unread(&self) -> bool {
        !self.unread.is_empty()
    }

    /// There is payload that a reader could take now.
    pub(super) fn is_readable(&self) -> bool {
        self.has_unread() || (self.payload_left > 0 && !self.input.is_empty())
    }

    /// The stream is gone: the rest of a frame that has arrived in part will be sent again.
    pub(super) fn interrupt(&mut self) -> Position {
        self.input = BytesMut::new();
        let missing = std::mem::take(&mut self.payload_left);
        self.receiver.interrupt(missing)
    }

    /// Frees the input's capacity after a burst.
    pub(super) fn shrink_input(&mut self) {
        if self.input.is_empty() && self.input.capacity() > MAX_IDLE_CAPACITY {
            self.input = BytesMut::new();
        }
    }

    /// Frees all capacity that holds nothing.
    pub(super) fn release_memory(&mut self) {
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
        if self.unread.is_empty() {
            self.unread = VecDeque::new();
        }
    }
}
