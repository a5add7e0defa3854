//! The head of an HTTP/1.1 request, looked at as bytes before a parser does.
//!
//! A parser forgives: it takes a bare LF for a line's end and settles a `Content-Length` beside a
//! `Transfer-Encoding` by itself. A proxy that forgives may read one request where the next reads
//! two, so these are refused here (RFC 9112, sections 2.2, 5.1, 5.2, 6.3; RFC 9110, section 8.6).

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Largest head. The API server allows 1 MiB; kubectl's are below 4 KiB.
pub const MAX: usize = 64 * 1024;

/// Why a head was not taken. The client is at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HeadError {
    /// Closed before a request: a spare connection that was not needed.
    #[error("the connection ended without a request")]
    Unused,
    #[error("the connection was not used in time")]
    Idle,
    #[error("the request's head did not come within {} s", .0.as_secs())]
    Slow(Duration),
    #[error("the request's head is larger than 64 KiB")]
    TooLarge,
    #[error("the request's head is malformed: {0}")]
    Malformed(&'static str),
    #[error("the connection was cut in the request's head: {0}")]
    Cut(#[source] io::Error),
}

/// Reads up to the head's end, or a little further; the first byte may take `idle`, the rest `within`.
pub async fn read<IO: AsyncRead + Unpin>(
    io: &mut IO,
    idle: Duration,
    within: Duration,
) -> Result<Bytes, HeadError> {
    let mut head = BytesMut::with_capacity(4 * 1024);
    let first = tokio::time::timeout(idle, io.read_buf(&mut head))
        .await
        .map_err(|_| HeadError::Idle)?;
    if first.map_err(HeadError::Cut)? == 0 {
        return Err(HeadError::Unused);
    }
    let reading = async {
        let mut from = 0;
        loop {
            if let Some(end) = end_of_head(&head, from) {
                check(&head[..end])?;
                return Ok(());
            }
            if head.len() >= MAX {
                return Err(HeadError::TooLarge);
            }
            from = head.len().saturating_sub(3);
            head.reserve(4 * 1024);
            if io.read_buf(&mut head).await.map_err(HeadError::Cut)? == 0 {
                return Err(HeadError::Cut(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    };
    tokio::time::timeout(within, reading)
        .await
        .map_err(|_| HeadError::Slow(within))??;
    Ok(head.freeze())
}

/// The end of the head by the strict reading, or of what a forgiving parser would take for one, so
/// that a head with bare line feeds is refused at once instead of waited for.
fn end_of_head(bytes: &[u8], from: usize) -> Option<usize> {
    (from..bytes.len())
        .find(|&at| bytes[at..].starts_with(b"\r\n\r\n"))
        .map(|at| at + 4)
        .or_else(|| {
            let lenient = |at: &usize| {
                bytes[*at..].starts_with(b"\n\n") || bytes[*at..].starts_with(b"\n\r\n")
            };
            (from..bytes.len()).find(lenient).map(|at| at + 2)
        })
}

/// Refuses a head that has two readings.
pub fn check(head: &[u8]) -> Result<(), HeadError> {
    let bad = |why| Err(HeadError::Malformed(why));
    let mut rest = head;
    let (mut lengths, mut encodings, mut hosts) = (0, 0, 0);
    let mut is_request_line = true;
    while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
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
        if matches!(line[0], b' ' | b'\t') {
            return bad("a header is folded over two lines");
        }
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return bad("a header has no colon");
        };
        let name = &line[..colon];
        if name.is_empty() || name.iter().any(|byte| !byte.is_ascii_graphic()) {
            return bad("a header's name holds white space");
        }
        if name.eq_ignore_ascii_case(b"content-length") {
            lengths += 1;
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            encodings += 1;
        } else if name.eq_ignore_ascii_case(b"host") {
            hosts += 1;
        }
    }
    if lengths > 1 || encodings > 1 || (lengths > 0 && encodings > 0) {
        return bad("the body's length is said more than once");
    }
    if hosts > 1 {
        return bad("the host is said more than once");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn heads_with_two_readings_are_refused() {
        for head in [
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\tfolded: yes\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\ncontent-length: 1\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\rb\r\n\r\n",
            "GET / HTTP/1.1\r\nX: a\0b\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\n\r\n",
        ] {
            assert!(
                matches!(check(head.as_bytes()), Err(HeadError::Malformed(_))),
                "{head:?}"
            );
        }
        check(b"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nX-Stream-Protocol-Version: v4\r\n\r\n").unwrap();
    }

    #[tokio::test]
    async fn a_head_is_read_byte_by_byte_with_what_follows_it() {
        let (mut near, mut far) = tokio::io::duplex(16);
        let sent: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nmore";
        let write = async {
            for byte in sent {
                near.write_all(&[*byte]).await.unwrap();
            }
            near.shutdown().await.unwrap();
        };
        let (head, ()) = tokio::join!(read(&mut far, SECOND, SECOND), write);
        let mut all = head.unwrap().to_vec();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, sent);
    }

    #[tokio::test]
    async fn a_dripping_head_ends_in_time_and_a_spare_may_wait() {
        let (mut near, mut far) = tokio::io::duplex(1 << 20);
        assert!(matches!(
            read(&mut far, SECOND, SECOND).await,
            Err(HeadError::Idle)
        ));
        near.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        assert!(matches!(
            read(&mut far, SECOND, SECOND).await,
            Err(HeadError::Slow(_))
        ));
        near.write_all(&vec![b'a'; 2 * MAX]).await.unwrap();
        assert!(matches!(
            read(&mut far, SECOND, SECOND).await,
            Err(HeadError::TooLarge)
        ));
        near.write_all(b"GET / HTTP/1.1\nX: y\n\n").await.unwrap();
        drop(near);
    }

    #[tokio::test]
    async fn a_session_that_ends_unused_is_no_fault() {
        let (near, mut far) = tokio::io::duplex(16);
        drop(near);
        assert!(matches!(
            read(&mut far, SECOND, SECOND).await,
            Err(HeadError::Unused)
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = check(&bytes);
            let _ = end_of_head(&bytes, 0);
        }
    }
}
