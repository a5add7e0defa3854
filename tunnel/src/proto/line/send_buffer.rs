//! Payload that was sent and is not yet acknowledged, for a retransmission on the next stream.

use std::collections::VecDeque;

use bytes::Bytes;

/// Shorter pieces are copied, so that a small one does not keep the large buffer it is a slice of.
const SMALL: usize = 4 * 1024;

/// The bytes from the last acknowledgement on, bounded by the sender's window.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    /// Each with the offset of its first byte; contiguous.
    pieces: VecDeque<(u64, Bytes)>,
    start: u64,
    end: u64,
}

impl SendBuffer {
    pub(super) fn push(&mut self, piece: Bytes) {
        let piece = match piece.len() {
            0 => return,
            len if len < SMALL => Bytes::copy_from_slice(&piece),
            _ => piece,
        };
        let at = self.end;
        self.end += piece.len() as u64;
        self.pieces.push_back((at, piece));
    }

    /// Everything before `offset` is no longer needed.
    pub(super) fn free_to(&mut self, offset: u64) {
        while let Some((at, piece)) = self.pieces.front_mut() {
            let end = *at + piece.len() as u64;
            if end > offset {
                // A piece is freed as a whole, by a later acknowledgement.
                break;
            }
            self.pieces.pop_front();
        }
        self.start = self.start.max(offset.min(self.end));
    }

    /// The bytes from `offset` on, as far as they lie in one piece; `None` at the end and before
    /// what is kept.
    pub(super) fn piece(&self, offset: u64) -> Option<Bytes> {
        if offset < self.start || offset >= self.end {
            return None;
        }
        let after = self.pieces.partition_point(|(at, _)| *at <= offset);
        let (at, piece) = self.pieces.get(after.checked_sub(1)?)?;
        let from = usize::try_from(offset - at).ok()?;
        Some(piece.slice(from..))
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Bytes held.
    pub(super) fn len(&self) -> u64 {
        self.end - self.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_found_by_offset_until_they_are_freed() {
        let mut buffer = SendBuffer::default();
        buffer.push(Bytes::from_static(b"abc"));
        buffer.push(Bytes::new());
        buffer.push(Bytes::from(vec![b'x'; SMALL]));
        assert_eq!(buffer.piece(0).unwrap(), "abc");
        assert_eq!(buffer.piece(2).unwrap(), "c");
        assert_eq!(buffer.piece(3).unwrap().len(), SMALL);
        assert_eq!(buffer.end(), 3 + SMALL as u64);
        assert!(buffer.piece(buffer.end()).is_none());

        buffer.free_to(2);
        assert!(buffer.piece(1).is_none());
        assert_eq!(buffer.piece(2).unwrap(), "c");
        buffer.free_to(4);
        assert!(buffer.piece(3).is_none());
        assert_eq!(buffer.piece(4).unwrap().len(), SMALL - 1);
        assert_eq!(buffer.len(), SMALL as u64 - 1);
        buffer.free_to(u64::MAX);
        assert_eq!(buffer.len(), 0);
    }
}
