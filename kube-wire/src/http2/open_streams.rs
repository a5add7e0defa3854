//! The streams that a client has opened and that are not over yet.

use std::collections::HashMap;

use super::frames::{Frame, HEADERS, RST_STREAM};

/// The open streams of a connection, with a value for each.
#[derive(Debug)]
pub struct OpenStreams<T> {
    open: HashMap<u32, T>,
    /// The last stream that was opened.
    last: u32,
    most: usize,
}

impl<T> OpenStreams<T> {
    /// Holds `most` streams at once; those beyond are not tracked.
    #[must_use]
    pub fn bounded(most: usize) -> Self {
        Self {
            open: HashMap::new(),
            last: 0,
            most,
        }
    }

    /// A frame that the client sends: it opens a stream, with this value, or resets one.
    pub fn client_sends(&mut self, frame: Frame, value: T) {
        match frame.kind {
            // Trailers open nothing.
            HEADERS if frame.stream > self.last => {
                self.last = frame.stream;
                if self.open.len() < self.most {
                    self.open.insert(frame.stream, value);
                }
            }
            RST_STREAM => drop(self.open.remove(&frame.stream)),
            _ => {}
        }
    }

    /// The stream is over; its value, if it was open.
    pub fn remove(&mut self, stream: u32) -> Option<T> {
        self.open.remove(&stream)
    }

    /// The value of a stream that is open.
    pub fn get_mut(&mut self, stream: u32) -> Option<&mut T> {
        self.open.get_mut(&stream)
    }

    /// Whether no stream is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, stream: u32) -> Frame {
        Frame {
            kind,
            flags: 0,
            stream,
            length: 0,
        }
    }

    #[test]
    fn a_stream_is_open_once_until_its_reset() {
        let mut streams = OpenStreams::bounded(usize::MAX);
        streams.client_sends(frame(HEADERS, 1), 'a');
        streams.client_sends(frame(HEADERS, 3), 'b');
        // Trailers, and a late reset.
        streams.client_sends(frame(HEADERS, 1), 'c');
        streams.client_sends(frame(RST_STREAM, 3), 'd');
        streams.client_sends(frame(HEADERS, 3), 'e');
        assert_eq!(streams.get_mut(3), None);
        assert_eq!(streams.remove(1), Some('a'));
        assert!(streams.is_empty());
    }

    #[test]
    fn no_more_streams_are_tracked_than_the_bound() {
        let mut streams = OpenStreams::bounded(2);
        for stream in [1, 3, 5] {
            streams.client_sends(frame(HEADERS, stream), ());
        }
        assert_eq!((streams.remove(3), streams.remove(5)), (Some(()), None));
        streams.client_sends(frame(HEADERS, 7), ());
        assert_eq!(streams.remove(7), Some(()));
    }
}
