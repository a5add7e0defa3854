//! What was sent and not yet acknowledged, for when the stream below is lost.

use std::collections::VecDeque;

use bytes::Bytes;

/// Shorter pieces are copied: a small one must not keep the large buffer that it was cut from.
const SMALL: usize = 4 * 1024;

/// The bytes from the last acknowledgement on. Bounded by the window that the sender keeps to.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// With the offset of the first byte of each; contiguous.
    pieces: VecDeque<(u64, Bytes)>,
    start: u64,
    end: u64,
}

impl Replay {
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
                // What is left of it keeps its buffer a little longer; the next one frees it.
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
        let mut replay = Replay::default();
        replay.push(Bytes::from_static(b"abc"));
        replay.push(Bytes::new());
        replay.push(Bytes::from(vec![b'x'; SMALL]));
        assert_eq!(replay.piece(0).unwrap(), "abc");
        assert_eq!(replay.piece(2).unwrap(), "c");
        assert_eq!(replay.piece(3).unwrap().len(), SMALL);
        assert_eq!(replay.end(), 3 + SMALL as u64);
        assert!(replay.piece(replay.end()).is_none());

        replay.free_to(2);
        assert!(replay.piece(1).is_none());
        assert_eq!(replay.piece(2).unwrap(), "c");
        replay.free_to(4);
        assert!(replay.piece(3).is_none());
        assert_eq!(replay.piece(4).unwrap().len(), SMALL - 1);
        assert_eq!(replay.len(), SMALL as u64 - 1);
        replay.free_to(u64::MAX);
        assert_eq!(replay.len(), 0);
    }
}
