//! Where WebSocket frames begin and end in bytes that pass (RFC 6455, section 5.2). Headers are
//! read; payloads are stepped over by their length, whatever they hold.

/// Opcodes.
const CONTINUATION: u8 = 0x0;
const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xa;

/// Longest header of a server: two bytes and a length of eight. Only clients mask.
const HEADER: usize = 10;
/// Longest payload of a control frame.
const CONTROL: u64 = 125;

/// What a server has sent so far.
#[derive(Debug, Clone)]
pub struct Frames {
    at: At,
    /// A message was begun and its last frame has not come.
    in_message: bool,
    is_closed: bool,
    /// The bytes are no WebSocket, or it has extensions: no frame can be found.
    is_lost: bool,
    /// Messages with something in them whose first byte, the channel, is this one have come.
    channel: u8,
    is_spoken: bool,
}

#[derive(Debug, Clone)]
enum At {
    Header {
        bytes: [u8; HEADER],
        have: usize,
    },
    Payload {
        left: u64,
        /// The first byte to come is a message's first, which has more than that one byte.
        begins: bool,
    },
}

const BETWEEN: At = At::Header {
    bytes: [0; HEADER],
    have: 0,
};

impl Frames {
    /// Listens for messages on that channel.
    pub fn new(channel: u8) -> Self {
        Self {
            at: BETWEEN,
            in_message: false,
            is_closed: false,
            is_lost: false,
            channel,
            is_spoken: false,
        }
    }

    /// Whether a control frame may follow.
    pub fn may_close(&self) -> bool {
        matches!(self.at, At::Header { have: 0, .. }) && !self.is_closed && !self.is_lost
    }

    /// Whether a message may follow.
    pub fn may_speak(&self) -> bool {
        self.may_close() && !self.in_message
    }

    /// Whether the channel has carried data.
    pub fn is_spoken(&self) -> bool {
        self.is_spoken
    }

    /// Takes the next bytes that passed.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.is_lost {
            match &mut self.at {
                At::Payload { left, begins } => {
                    if std::mem::take(begins) && bytes.first() == Some(&self.channel) {
                        self.is_spoken = true;
                    }
                    let step =
                        usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                    *left -= step as u64;
                    bytes = bytes.get(step..).unwrap_or_default();
                    if *left == 0 {
                        self.at = BETWEEN;
                    }
                }
                At::Header { bytes: head, have } => {
                    let (Some(slot), Some((byte, rest))) =
                        (head.get_mut(*have), bytes.split_first())
                    else {
                        self.is_lost = true;
                        return;
                    };
                    *slot = *byte;
                    *have += 1;
                    bytes = rest;
                    if *have >= header_len(head[1]) && *have >= 2 {
                        let head = *head;
                        self.begin(&head);
                    }
                }
            }
        }
    }

    /// A header is whole.
    fn begin(&mut self, head: &[u8; HEADER]) {
        let [first, second, rest @ ..] = head;
        let (is_final, reserved, opcode) = (first & 0x80 != 0, first & 0x70, first & 0x0f);
        let [a, b, c, d, e, f, g, h] = *rest;
        let len = match second & 0x7f {
            126 => u64::from(u16::from_be_bytes([a, b])),
            127 => u64::from_be_bytes([a, b, c, d, e, f, g, h]),
            len => u64::from(len),
        };
        let is_masked = second & 0x80 != 0;
        let is_control = opcode & 0x8 != 0;
        let in_order = match opcode {
            CONTINUATION => self.in_message,
            TEXT | BINARY => !self.in_message,
            CLOSE | PING | PONG => is_final && len <= CONTROL,
            _ => false,
        };
        if !in_order || is_masked || reserved != 0 || len > u64::MAX >> 1 {
            self.is_lost = true;
            return;
        }
        self.is_closed |= opcode == CLOSE;
        if !is_control {
            self.in_message = !is_final;
        }
        let begins = matches!(opcode, TEXT | BINARY) && (len > 1 || !is_final);
        self.at = match len {
            0 => BETWEEN,
            left => At::Payload { left, begins },
        };
    }
}

/// By its second byte.
fn header_len(second: u8) -> usize {
    match second & 0x7f {
        126 => 4,
        127 => 10,
        _ => 2,
    }
}

/// An unfragmented frame of a server; `payload` must be below 64 KiB and is cut there.
pub fn frame(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let payload = payload.get(..usize::from(u16::MAX)).unwrap_or(payload);
    let opcode = match opcode {
        Opcode::Binary => BINARY,
        Opcode::Close => CLOSE,
    };
    let mut out = vec![0x80 | opcode];
    match u8::try_from(payload.len()) {
        Ok(len @ ..126) => out.push(len),
        _ => {
            out.push(126);
            // Cut above to what fits.
            let len = u16::try_from(payload.len()).unwrap_or(u16::MAX);
            out.extend_from_slice(&len.to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
    out
}

/// The kinds of frame that are written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// A binary message, whole.
    Binary,
    /// The end.
    Close,
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, RngCore as _, SeedableRng, rngs::StdRng};

    const CHANNEL: u8 = 3;

    fn raw(first: u8, payload: &[u8], form: u8) -> Vec<u8> {
        let len = payload.len() as u64;
        let mut out = vec![first, form.min(127)];
        match form {
            126 => out.extend_from_slice(&(len as u16).to_be_bytes()),
            127 => out.extend_from_slice(&len.to_be_bytes()),
            _ => out[1] = len as u8,
        }
        out.extend_from_slice(payload);
        out
    }

    fn after(bytes: &[u8]) -> Frames {
        let mut frames = Frames::new(CHANNEL);
        frames.pass(bytes);
        frames
    }

    /// May speak, may only close, may do neither.
    fn place(frames: &Frames) -> (bool, bool) {
        (frames.may_speak(), frames.may_close())
    }

    #[test]
    fn cut_at_every_byte_it_is_at_a_boundary_only_between_frames() {
        let pieces = [
            raw(0x82, b"\x01hello", 0),
            raw(0x89, b"ping", 0),
            raw(0x02, b"\x01first", 0),
            // Control frames come between the parts of a message.
            raw(0x8a, b"", 0),
            raw(0x00, b"more", 126),
            raw(0x80, b"last", 127),
            raw(0x82, &vec![1; 300], 126),
            raw(0x82, &vec![1; 70_000], 127),
            raw(0x82, b"\x01", 0),
        ];
        let in_message = [false, false, true, true, true, false, false, false, false];
        let mut all = Vec::new();
        let mut ends = vec![(0, false)];
        for (piece, inside) in pieces.iter().zip(in_message) {
            all.extend_from_slice(piece);
            ends.push((all.len(), inside));
        }
        let mut whole = Frames::new(CHANNEL);
        for cut in 0..=all.len() {
            if cut > 0 {
                whole.pass(&all[cut - 1..cut]);
            }
            let expected = match ends.iter().rfind(|(end, _)| *end == cut) {
                Some((_, inside)) => (!inside, true),
                None => (false, false),
            };
            assert_eq!(place(&whole), expected, "byte for byte, after {cut}");
            // In one piece: enough around the headers, for the payloads are long.
            if cut < 80 || ends.iter().any(|(end, _)| end.abs_diff(cut) < 14) {
                assert_eq!(place(&after(&all[..cut])), expected, "at once, after {cut}");
            }
        }
        assert!(!whole.is_spoken());
    }

    #[test]
    fn what_is_said_on_the_channel_is_noticed_and_an_empty_message_is_not() {
        assert!(!after(&raw(0x82, b"\x03", 0)).is_spoken());
        assert!(after(&raw(0x82, b"\x03{}", 0)).is_spoken());
        assert!(!after(&raw(0x82, b"\x01\x03", 0)).is_spoken());
        let mut split = raw(0x02, b"\x03", 0);
        split.extend(raw(0x80, b"{}", 0));
        assert!(after(&split).is_spoken());
        // A continuation's first byte is no channel.
        let mut other = raw(0x02, b"\x01", 0);
        other.extend(raw(0x80, b"\x03{}", 0));
        assert!(!after(&other).is_spoken());
    }

    #[test]
    fn after_a_close_nothing_may_follow() {
        let frames = after(&raw(0x88, &1000u16.to_be_bytes(), 0));
        assert_eq!(place(&frames), (false, false));
    }

    #[test]
    fn what_is_no_websocket_of_a_server_is_left_alone_for_good() {
        let wrong = [
            vec![0x82, 0x80, 0, 0, 0, 0],
            raw(0xc2, b"deflated", 0),
            raw(0x83, b"unknown", 0),
            raw(0x80, b"continues nothing", 0),
            raw(0x09, b"a fragmented ping", 0),
            raw(0x89, &[0; 126], 126),
            vec![0x82, 127, 0x80, 0, 0, 0, 0, 0, 0, 0],
        ];
        for mut bytes in wrong {
            assert_eq!(place(&after(&bytes)), (false, false), "{bytes:?}");
            bytes.extend(raw(0x82, b"\x01fine", 0));
            assert_eq!(place(&after(&bytes)), (false, false), "{bytes:?}");
        }
        let mut message_in_message = raw(0x02, b"\x01a", 0);
        message_in_message.extend(raw(0x82, b"\x01b", 0));
        assert_eq!(place(&after(&message_in_message)), (false, false));
    }

    #[test]
    fn rubbish_in_any_pieces_is_survived_and_means_the_same() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..2000 {
            let mut bytes = vec![0; rng.random_range(0..64)];
            rng.fill_bytes(&mut bytes);
            let whole = after(&bytes);
            let mut pieces = Frames::new(CHANNEL);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at(rng.random_range(1..=rest.len()));
                pieces.pass(piece);
                rest = behind;
            }
            assert_eq!(place(&whole), place(&pieces), "{bytes:?}");
            assert_eq!(whole.is_spoken(), pieces.is_spoken(), "{bytes:?}");
        }
    }

    #[test]
    fn our_own_frames_are_frames() {
        for len in [0, 1, 125, 126, 70_000] {
            let frames = after(&frame(Opcode::Binary, &vec![CHANNEL; len]));
            assert!(frames.may_speak(), "{len}");
            assert_eq!(frames.is_spoken(), len > 1);
        }
        assert!(!after(&frame(Opcode::Close, &[3, 243])).may_close());
    }
}
