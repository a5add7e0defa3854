//! Where the body of an HTTP/1.1 request ends (RFC 9112, section 6), for finding the next head.

/// What is left of a body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing(Left);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Left {
    Done,
    Length(u64),
    /// In a line with a chunk's size.
    Size {
        size: u64,
        digits: u8,
        /// Behind the digits; what is there counts for nothing.
        is_over: bool,
    },
    Data(u64),
    /// The line's end behind a chunk's data: so many bytes of it have come.
    DataEnd(usize),
    /// Behind the last chunk; whether the line has a byte yet.
    Trailer {
        is_empty: bool,
    },
    /// It does not follow the rules; its end cannot be determined.
    Lost,
}

/// Of a chunk's size; more would overflow 64 bits.
const DIGITS: u8 = 15;

const SIZE: Left = Left::Size {
    size: 0,
    digits: 0,
    is_over: false,
};

impl Framing {
    /// No body.
    pub const NONE: Self = Self(Left::Done);
    /// A chunked body (RFC 9112, section 7.1).
    pub const CHUNKED: Self = Self(SIZE);

    /// A body of this length.
    pub fn length(length: u64) -> Self {
        Self(match length {
            0 => Left::Done,
            length => Left::Length(length),
        })
    }

    /// Whether the body is complete.
    pub fn is_done(&self) -> bool {
        self.0 == Left::Done
    }

    /// Whether the body is malformed, so that its end cannot be determined.
    pub fn is_lost(&self) -> bool {
        self.0 == Left::Lost
    }

    /// Takes what has come; how many of the bytes belong to the body. All of them, if it is lost.
    pub fn eat(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = bytes.len() - at;
            let byte = bytes[at];
            self.0 = match self.0 {
                Left::Done => return at,
                Left::Lost => return bytes.len(),
                Left::Length(left) | Left::Data(left) => {
                    let count = usize::try_from(left).map_or(rest, |left| left.min(rest));
                    at += count;
                    // No more than `left`.
                    let left = left - count as u64;
                    match (self.0, left) {
                        (Left::Length(_), 0) => Left::Done,
                        (Left::Length(_), left) => Left::Length(left),
                        (_, 0) => Left::DataEnd(0),
                        (_, left) => Left::Data(left),
                    }
                }
                line => {
                    at += 1;
                    line.next(byte)
                }
            };
        }
        at
    }
}

impl Left {
    /// A byte outside of data.
    fn next(self, byte: u8) -> Self {
        match self {
            Self::Size {
                size,
                digits,
                is_over,
            } => match (byte, char::from(byte).to_digit(16)) {
                (b'\n', _) if digits == 0 => Self::Lost,
                (b'\n', _) if size == 0 => Self::Trailer { is_empty: true },
                (b'\n', _) => Self::Data(size),
                (_, Some(digit)) if !is_over && digits < DIGITS => Self::Size {
                    size: size * 16 + u64::from(digit),
                    digits: digits + 1,
                    is_over,
                },
                (_, Some(_)) if !is_over => Self::Lost,
                (b'\r' | b';' | b' ' | b'\t', _) => Self::Size {
                    size,
                    digits,
                    is_over: true,
                },
                _ if is_over => self,
                _ => Self::Lost,
            },
            Self::DataEnd(0) if byte == b'\r' => Self::DataEnd(1),
            Self::DataEnd(1) if byte == b'\n' => SIZE,
            Self::Trailer { is_empty } => match byte {
                b'\n' if is_empty => Self::Done,
                b'\n' => Self::Trailer { is_empty: true },
                b'\r' => self,
                _ => Self::Trailer { is_empty: false },
            },
            _ => Self::Lost,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_body_ends_where_it_says() {
        for (mut framing, body) in [
            (Framing::length(5), &b"12345"[..]),
            (Framing::CHUNKED, b"0\r\n\r\n"),
            (
                Framing::CHUNKED,
                b"3;x=\"y\"\r\nabc\r\nA \r\n0123456789\r\n0\r\nx: y\r\nz: 1\r\n\r\n",
            ),
        ] {
            let all = [body, b"GET /"].concat();
            let mut by_byte = framing;
            assert_eq!(framing.eat(&all), body.len());
            assert!(framing.is_done());
            let count = all
                .iter()
                .take_while(|byte| by_byte.eat(&[**byte]) == 1)
                .count();
            assert_eq!(count, body.len());
        }
        assert!(Framing::length(0).is_done() && Framing::NONE.is_done());
    }

    #[test]
    fn what_breaks_the_rules_is_lost() {
        for body in [
            "\r\n",
            "x\r\n",
            "1x\r\n",
            "3\r\nabcd",
            "3\r\nabc\n",
            "ffffffffffffffff\r\n",
            "-1\r\n",
        ] {
            let mut framing = Framing::CHUNKED;
            assert_eq!(framing.eat(body.as_bytes()), body.len(), "{body:?}");
            assert!(framing.is_lost(), "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_pieces_count_for_nothing(bytes in "[0-9a-f\r\n; x]{0,60}", cut in 0usize..60) {
            let (mut whole, mut pieces) = (Framing::CHUNKED, Framing::CHUNKED);
            let all = whole.eat(bytes.as_bytes());
            let cut = cut.min(bytes.len());
            let first = pieces.eat(&bytes.as_bytes()[..cut]);
            if first == cut {
                prop_assert_eq!(first + pieces.eat(&bytes.as_bytes()[cut..]), all);
                prop_assert_eq!(pieces, whole);
            }
        }
    }
}
