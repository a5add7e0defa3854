//! The head of an HTTP/1.1 request, looked at as bytes before a parser does.
//!
//! A parser forgives: it takes a bare LF for a line's end and settles a `Content-Length` beside a
//! `Transfer-Encoding` by itself. A proxy that forgives may read one request where the next reads
//! two, so these are refused here (RFC 9112, sections 2.2, 5.1, 5.2, 6.3; RFC 9110, section 8.6).

use std::io;
use std::time::Duration;

use http::{Method, StatusCode};

use super::framing::Framing;
use super::target::{Target, TargetError};

/// Largest head, bytes: what Go's server, and so the API server, reads of one (`MaxHeaderBytes` of 1 MiB,
/// and a block for its reader).
pub const MAX: usize = 1024 * 1024 + 4096;
/// Up to here a head is taken without asking, bytes. Those of kubectl are below 4 KiB, unless a command has
/// long arguments.
pub const SMALL: usize = 64 * 1024;
/// Headers of one request, at most. The API server counts bytes only.
pub const MAX_HEADERS: usize = 2000;

/// Why a head was not taken. The client is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadError {
    /// Closed before a request: a spare connection that was not needed.
    #[error("the connection ended without a request")]
    Unused,
    /// No request within the limit for idle connections.
    #[error("the connection was not used in time")]
    Idle,
    /// The head was not complete within this time.
    #[error("the request's head did not come within {} s", .0.as_secs())]
    Slow(Duration),
    /// Larger than [`MAX`].
    #[error("the request's head is larger than the 1 MiB that an API server takes")]
    TooLarge,
    /// More than [`MAX_HEADERS`] headers.
    #[error("the request has more than {MAX_HEADERS} headers")]
    TooMany,
    /// Too many large heads at once; nobody's fault.
    #[error("there are too many requests with heads over 64 KiB under way; try again")]
    Busy,
    /// The parser behind has no room for it on this connection.
    #[error(
        "a request with more than {} KiB of headers must be the first of its connection: send it on a new one",
        SMALL / 1024
    )]
    NotFirst,
    /// CONNECT or TRACE.
    #[error("the method {0} does not pass through throwline")]
    Method(Method),
    /// The target is invalid.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The head is invalid, or ambiguous.
    #[error("the request's head is malformed: {0}")]
    Malformed(&'static str),
    /// The connection failed within the head.
    #[error("the connection was cut in the request's head: {0}")]
    Cut(#[source] io::Error),
}

impl HeadError {
    /// The answer to it.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Slow(_) | Self::Idle => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge | Self::TooMany | Self::NotFirst => {
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
            }
            Self::Busy => StatusCode::SERVICE_UNAVAILABLE,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unused | Self::Target(_) | Self::Malformed(_) | Self::Cut(_) => {
                StatusCode::BAD_REQUEST
            }
        }
    }

    /// The same as Kubernetes' `StatusReason`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Slow(_) | Self::Idle => "Timeout",
            Self::TooLarge | Self::TooMany | Self::NotFirst => "RequestEntityTooLarge",
            Self::Busy => "ServiceUnavailable",
            Self::Method(_) => "MethodNotAllowed",
            Self::Unused | Self::Target(_) | Self::Malformed(_) | Self::Cut(_) => "BadRequest",
        }
    }
}

/// A head with one reading.
#[derive(Debug, PartialEq, Eq)]
pub struct Head {
    /// The request target.
    pub target: Target,
    /// Where it stands in the head, from and to.
    pub target_at: (usize, usize),
    /// The framing of the body.
    pub framing: Framing,
    /// It requests another protocol behind it.
    pub upgrades: bool,
}

impl Head {
    /// Reads a whole head, to its empty line. `prefix` returns how many bytes of a target are not the API
    /// server's.
    ///
    /// # Errors
    /// [`HeadError`] for what has two readings, or none.
    pub fn read(head: &[u8], prefix: impl Fn(&[u8]) -> usize) -> Result<Self, HeadError> {
        let bad = |why| Err(HeadError::Malformed(why));
        let fields = fields(head)?;
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let mut parts = line.split(|byte| *byte == b' ');
        let (Some(method), Some(raw), Some(version), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return bad("the request line is not METHOD TARGET VERSION");
        };
        let Ok(method) = Method::from_bytes(method) else {
            return bad("the method is no token");
        };
        if !matches!(version, b"HTTP/1.1" | b"HTTP/1.0") {
            return bad("the version is not HTTP/1.1");
        }
        if matches!(method, Method::CONNECT | Method::TRACE) {
            return Err(HeadError::Method(method));
        }
        let start = method.as_str().len() + 1;
        Ok(Self {
            target: Target::read(raw, prefix(raw))?,
            target_at: (start, start + raw.len()),
            framing: fields.framing,
            upgrades: fields.connection_upgrades && fields.has_upgrade,
        })
    }
}

/// A request line for what was refused: that of the head, as far as it has one.
pub(super) fn line_of(head: &[u8]) -> String {
    let line = head
        .split(|byte| matches!(byte, b'\r' | b'\n'))
        .next()
        .unwrap_or_default();
    let mut parts = line.split(|byte| *byte == b' ');
    let method = parts.next().and_then(|it| Method::from_bytes(it).ok());
    let method = method.filter(|method| !matches!(*method, Method::CONNECT | Method::HEAD));
    let target = parts.next().and_then(|raw| Target::read(raw, 0).ok());
    let short = target.as_ref().and_then(Target::short);
    format!(
        "{} {} HTTP/1.1",
        method.unwrap_or(Method::GET),
        short.map_or("/", |target| target.as_str())
    )
}

/// The end of the head by the strict reading, or of what a forgiving parser would take for one, so
/// that a head with bare line feeds is refused at once instead of waited for.
pub fn end_of_head(bytes: &[u8], from: usize) -> Option<usize> {
    let mut at = from;
    while let Some(next) = bytes[at..].iter().position(|byte| *byte == b'\n') {
        let feed = at + next;
        match &bytes[feed + 1..] {
            [b'\n', ..] => return Some(feed + 2),
            [b'\r', b'\n', ..] => return Some(feed + 3),
            _ => at = feed + 1,
        }
    }
    None
}

struct Fields {
    framing: Framing,
    connection_upgrades: bool,
    has_upgrade: bool,
}

/// Refuses headers with two readings.
fn fields(head: &[u8]) -> Result<Fields, HeadError> {
    let bad = |why| Err(HeadError::Malformed(why));
    let mut rest = head;
    let (mut length, mut chunked, mut hosts, mut count) = (None, None, 0, 0);
    let (mut connection_upgrades, mut has_upgrade) = (false, false);
    let mut is_request_line = true;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
        // Parsers differ about a bare line feed: a request could be smuggled past one of them.
        let Some(line) = rest[..at].strip_suffix(b"\r") else {
            return bad("a line ends without a carriage return");
        };
        rest = &rest[at + 1..];
        if line.iter().any(|byte| matches!(byte, b'\r' | 0)) {
            return bad("a line holds a stray carriage return or a zero byte");
        }
        if std::mem::take(&mut is_request_line) {
            if line.is_empty() {
                return bad("the request line is empty");
            }
            continue;
        }
        if line.is_empty() {
            continue;
        }
        count += 1;
        if count > MAX_HEADERS {
            return Err(HeadError::TooMany);
        }
        if matches!(line[0], b' ' | b'\t') {
            return bad("a header is folded over two lines");
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return bad("a header has no colon");
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|byte| is_token(*byte)) {
            return bad("a header's name is no token");
        }
        if value
            .iter()
            .any(|byte| byte.is_ascii_control() && *byte != b'\t')
        {
            return bad("a header's value holds a control character");
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            // Digits only: `parse` alone would accept a sign.
            let digits = value.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(value).ok().filter(|_| digits);
            let Some(number) = number.and_then(|text| text.parse::<u64>().ok()) else {
                return bad("the content-length is not a number");
            };
            if length.replace(number).is_some() {
                return bad("the body's length is given more than once");
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            let is_chunked = value.eq_ignore_ascii_case(b"chunked");
            if chunked.replace(is_chunked).is_some() {
                return bad("the body's length is given more than once");
            }
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
        } else if name.eq_ignore_ascii_case(b"upgrade") {
            has_upgrade = true;
        } else if name.eq_ignore_ascii_case(b"connection") {
            connection_upgrades |= value
                .split(|byte| *byte == b',')
                .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"));
        }
    }
    if hosts > 1 {
        return bad("the host is given more than once");
    }
    // RFC 9112, section 6.1, lets chunked override a length; a server that does not would read the
    // body as another request.
    let framing = match (length, chunked) {
        (Some(_), Some(_)) => return bad("the body's length is given more than once"),
        (_, Some(false)) => return bad("the transfer-encoding is not \"chunked\""),
        (_, Some(true)) => Framing::CHUNKED,
        (Some(length), None) => Framing::length(length),
        (None, None) => Framing::NONE,
    };
    Ok(Fields {
        framing,
        connection_upgrades,
        has_upgrade,
    })
}

/// RFC 9110, section 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(head: &str) -> Result<Head, HeadError> {
        Head::read(head.as_bytes(), |_| 0)
    }

    #[test]
    fn heads_with_two_readings_are_refused() {
        for head in [
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\tfolded: yes\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX(y): z\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\x1bb\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET /a b HTTP/1.1\r\n\r\n",
            "GET  / HTTP/1.1\r\n\r\n",
            "GET /\r\n\r\n",
            "G(T / HTTP/1.1\r\n\r\n",
        ] {
            assert!(
                matches!(read(head), Err(HeadError::Malformed(_))),
                "{head:?}"
            );
        }
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "x: y\r\n".repeat(MAX_HEADERS + 1)
        );
        assert!(matches!(read(&many), Err(HeadError::TooMany)));
        assert!(matches!(
            read("CONNECT a:1 HTTP/1.1\r\n\r\n"),
            Err(HeadError::Method(_))
        ));
        assert!(matches!(
            read("GET /api#x HTTP/1.1\r\n\r\n"),
            Err(HeadError::Target(TargetError::Bytes))
        ));
    }

    #[test]
    fn a_head_tells_its_target_its_body_and_its_upgrade() {
        let head = read(
            "POST /x?y HTTP/1.1\r\nHost: a\r\nContent-Length: 7\r\nX-Stream-Protocol-Version: v4\r\n\r\n",
        );
        let head = head.unwrap();
        assert_eq!((head.target.as_str(), head.target_at), ("/x?y", (5, 9)));
        assert_eq!((head.framing, head.upgrades), (Framing::length(7), false));
        let head =
            read("GET / HTTP/1.1\r\nconnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n");
        assert!(head.unwrap().upgrades);
        let head = read("GET / HTTP/1.1\r\nUpgrade: h2c\r\ntransfer-encoding: Chunked\r\n\r\n");
        let head = head.unwrap();
        assert_eq!((head.framing, head.upgrades), (Framing::CHUNKED, false));
    }

    #[test]
    fn a_head_ends_at_its_empty_line() {
        let head = b"GET / HTTP/1.1\r\na: b\r\n\r\nmore";
        let end = head.len() - 4;
        for from in 0..end - 3 {
            assert_eq!(end_of_head(head, from), Some(end));
        }
        assert_eq!(end_of_head(&head[..end - 1], 0), None);
        assert_eq!(end_of_head(b"GET /\n\nx", 0), Some(7));
    }

    #[test]
    fn what_was_refused_still_has_a_line() {
        for (head, line) in [
            (&b"GET /a HTTP/1.1\n\n"[..], "GET /a HTTP/1.1"),
            (b"\x16\x03\x01", "GET / HTTP/1.1"),
            (b"CONNECT a:1 HTTP/1.1\r\n", "GET / HTTP/1.1"),
            (b"POST /\xff HTTP/1.1\r\n", "POST / HTTP/1.1"),
            (b"", "GET / HTTP/1.1"),
        ] {
            assert_eq!(line_of(head), line);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), line in "(GET|POST) /[!-~]{0,9} HTTP/1.[01]\r\n") {
            let _ = Head::read(&bytes, |_| 0);
            let _ = end_of_head(&bytes, 0);
            let _ = line_of(&bytes);
            let _ = Head::read(&[line.as_bytes(), &bytes].concat(), |raw| raw.len() / 2);
        }
    }
}
