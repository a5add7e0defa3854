//! What people are told when a line ends under something that had begun: in the data, where the
//! protocol has a place for it and the data is at a point where it may come, else not at all. Bytes
//! are never added to what is only data; that ends by a reset.

mod frames;

use crate::{error::Failure, status::Status};
use bytes::{Buf as _, Bytes};
use frames::{Frames, Opcode, frame};
use http::{HeaderMap, header, uri::PathAndQuery};
use pin_project_lite::pin_project;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use throwline_tunnel::line::LineError;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The channel on which exec and attach say how they ended.
const STATUS: u8 = 3;
/// A close that says that all was said; kubectl then reads the status, and with any other does not.
const NORMAL: u16 = 1000;
/// "The server met a condition that it did not expect."
const UNEXPECTED: u16 = 1011;
/// Longest text in a close frame.
const REASON: usize = 123;

/// Why what ran over a line has ended, for whoever ran it.
pub(crate) fn why(cluster: &str, error: &LineError) -> Failure {
    let cluster = cluster.to_owned();
    match error {
        LineError::Expired { after, why } => Failure::Expired {
            cluster,
            seconds: after.as_secs(),
            why: why.clone(),
        },
        LineError::Gone(why) => Failure::Ended {
            cluster,
            why: why.clone(),
        },
        LineError::Reset { .. } => Failure::Ended {
            cluster,
            why: "its agent, or the API server behind it, broke it off; run the command again"
                .to_owned(),
        },
        other => Failure::Ended {
            cluster,
            why: format!("{other}; run the command again"),
        },
    }
}

fn why_io(cluster: &str, error: &io::Error) -> Failure {
    let line = error.get_ref();
    match line.and_then(|error| error.downcast_ref::<LineError>()) {
        Some(error) => why(cluster, error),
        None => Failure::Ended {
            cluster: cluster.to_owned(),
            why: format!("{error}; run the command again"),
        },
    }
}

/// What an upgraded connection has room for at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Room {
    /// A status on its channel, then a close: exec, attach and cp.
    Status,
    /// A close with a reason: other WebSockets.
    Close,
    /// None: SPDY, whose headers hang on one another.
    None,
}

impl Room {
    /// Of an answer with these headers that switches to WebSocket.
    pub(crate) fn of_websocket(path: &str, headers: &HeaderMap) -> Self {
        let path = path.split('?').next().unwrap_or_default();
        let is_command = path.ends_with("/exec") || path.ends_with("/attach");
        let protocol = headers.get(header::SEC_WEBSOCKET_PROTOCOL);
        let protocol = protocol.map_or(&b""[..], |protocol| protocol.as_bytes());
        match protocol {
            b"v4.channel.k8s.io" | b"v5.channel.k8s.io" if is_command => Self::Status,
            _ => Self::Close,
        }
    }
}

pin_project! {
    /// The agent's side of an upgraded connection. Where reading it fails, what may still be said
    /// comes as if the agent had said it, and the error after it.
    pub(crate) struct LastWords<IO> {
        #[pin]
        io: IO,
        cluster: String,
        room: Room,
        frames: Frames,
        words: Bytes,
        error: Option<io::Error>,
    }
}

impl<IO> LastWords<IO> {
    pub(crate) fn new(io: IO, cluster: String, room: Room) -> Self {
        Self {
            io,
            cluster,
            room,
            frames: Frames::new(STATUS),
            words: Bytes::new(),
            error: None,
        }
    }
}

/// What `room` and the bytes so far have a place for.
fn words(room: Room, frames: &Frames, failure: &Failure) -> Bytes {
    let status = Status::from(failure);
    let mut out = Vec::new();
    match room {
        Room::Status if frames.may_speak() && !frames.is_spoken() => {
            let said = [&[STATUS], &status.json()[..]].concat();
            out.extend(frame(Opcode::Binary, &said));
            out.extend(close(NORMAL, ""));
        }
        // How it ended was said already, or its end is in the middle of a message.
        Room::Status if frames.is_spoken() => {}
        Room::Status | Room::Close if frames.may_close() => {
            out.extend(close(UNEXPECTED, &status.message));
        }
        Room::Status | Room::Close | Room::None => {}
    }
    out.into()
}

fn close(code: u16, reason: &str) -> Vec<u8> {
    let reason = &reason[..reason.floor_char_boundary(REASON)];
    frame(
        Opcode::Close,
        &[&code.to_be_bytes(), reason.as_bytes()].concat(),
    )
}

impl<IO: AsyncRead> AsyncRead for LastWords<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        if this.error.is_none() {
            let before = buf.filled().len();
            match ready!(this.io.poll_read(cx, buf)) {
                Ok(()) => {
                    if *this.room != Room::None {
                        let read = buf.filled().get(before..);
                        this.frames.pass(read.unwrap_or_default());
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) => {
                    let failure = why_io(this.cluster, &error);
                    *this.words = words(*this.room, this.frames, &failure);
                    *this.error = Some(error);
                }
            }
        }
        if this.words.has_remaining() {
            let step = this.words.len().min(buf.remaining());
            buf.put_slice(&this.words.split_to(step));
            return Poll::Ready(Ok(()));
        }
        match this.error.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl<IO: AsyncWrite> AsyncWrite for LastWords<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }
}

/// Whether an answer is a watch's whose events are lines of JSON, so that one more may follow.
pub(crate) fn is_json_watch(path: &PathAndQuery, headers: &HeaderMap) -> bool {
    let query = path.query().unwrap_or_default();
    let mut pairs = query.split('&');
    let is_watch = pairs.any(|pair| matches!(pair, "watch=true" | "watch=1"));
    let content_type = headers.get(header::CONTENT_TYPE);
    let content_type = content_type
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let is_json = content_type.split(';').next().map(str::trim) == Some("application/json");
    is_watch
        && is_json
        && !headers.contains_key(header::CONTENT_ENCODING)
        && !headers.contains_key(header::CONTENT_LENGTH)
}

/// The event with which an API server too says that a watch is over.
pub(crate) fn last_event(failure: &Failure) -> Bytes {
    let status = String::from_utf8(Status::from(failure).json()).unwrap_or_default();
    Bytes::from(format!("{{\"type\":\"ERROR\",\"object\":{status}}}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use std::time::Duration;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn expired() -> LineError {
        LineError::Expired {
            after: Duration::from_secs(120),
            why: "the relay cannot be reached".to_owned(),
        }
    }

    /// What is read of an agent that says this and is then lost.
    async fn read(said: &'static [u8], room: Room) -> (Vec<u8>, io::Error) {
        let mut io = LastWords::new(Lost(said), "prod-eu".to_owned(), room);
        let mut all = Vec::new();
        let mut little = [0; 7];
        loop {
            match io.read(&mut little).await {
                Ok(n) => all.extend_from_slice(&little[..n]),
                Err(error) => return (all, error),
            }
        }
    }

    struct Lost(&'static [u8]);

    impl AsyncRead for Lost {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            if self.0.is_empty() {
                return Poll::Ready(Err(expired().into()));
            }
            let step = self.0.len().min(buf.remaining());
            buf.put_slice(&self.0[..step]);
            self.0 = &self.0[step..];
            Poll::Ready(Ok(()))
        }
    }

    const HELLO: &[u8] = b"\x82\x06\x01hello";

    #[tokio::test]
    async fn an_exec_is_told_by_its_status_and_then_the_error_comes() {
        let (all, error) = read(HELLO, Room::Status).await;
        let words = all.strip_prefix(HELLO).unwrap();
        assert_eq!(&words[..2], [0x82, 126]);
        let len = usize::from(u16::from_be_bytes([words[2], words[3]]));
        let (status, rest) = words[4..].split_at(len);
        assert_eq!(status[0], STATUS);
        let status: serde_json::Value = serde_json::from_slice(&status[1..]).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "Timeout");
        assert_eq!(status["code"], 504);
        assert_eq!(
            status["message"],
            "throwline: the connection to cluster prod-eu was lost for longer than 120 s \
             (--detached-life) and was given up; run the command again (the relay cannot be reached)"
        );
        assert_eq!(rest, [0x88, 2, 0x03, 0xe8]);
        let line = error.get_ref().unwrap().downcast_ref::<LineError>();
        assert!(matches!(line, Some(LineError::Expired { .. })), "{error}");
    }

    #[tokio::test]
    async fn where_there_is_no_room_nothing_is_added() {
        let cut = &HELLO[..5];
        let status = b"\x82\x03\x03{}";
        for (said, room) in [
            (cut, Room::Status),
            (cut, Room::Close),
            (HELLO, Room::None),
            (status, Room::Status),
            (b"\x88\x02\x03\xe8", Room::Close),
        ] {
            assert_eq!(read(said, room).await.0, said, "{room:?}");
        }
    }

    #[tokio::test]
    async fn inside_a_message_and_elsewhere_a_close_says_it() {
        let part = b"\x02\x06\x01hello";
        for (said, room) in [(&part[..], Room::Status), (HELLO, Room::Close)] {
            let (all, _) = read(said, room).await;
            let words = all.strip_prefix(said).unwrap();
            assert_eq!(words[0], 0x88);
            assert_eq!(usize::from(words[1]), words.len() - 2);
            assert!(words.len() <= 127);
            assert_eq!(words[2..4], UNEXPECTED.to_be_bytes());
            let reason = std::str::from_utf8(&words[4..]).unwrap();
            assert!(reason.starts_with("throwline: the connection to cluster prod-eu was lost"));
        }
    }

    #[tokio::test]
    async fn what_is_written_goes_through() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut io = LastWords::new(near, "prod-eu".to_owned(), Room::Close);
        io.write_all(b"ahoy").await.unwrap();
        io.shutdown().await.unwrap();
        let mut got = String::new();
        far.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "ahoy");
    }

    #[test]
    fn the_room_is_what_was_agreed_on() {
        let of = |path: &str, protocol: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(
                header::SEC_WEBSOCKET_PROTOCOL,
                HeaderValue::from_static(protocol),
            );
            Room::of_websocket(path, &headers)
        };
        let pod = "/api/v1/namespaces/n/pods/p";
        assert_eq!(
            of(&format!("{pod}/exec?command=sh"), "v5.channel.k8s.io"),
            Room::Status
        );
        assert_eq!(
            of(&format!("{pod}/attach"), "v4.channel.k8s.io"),
            Room::Status
        );
        assert_eq!(
            of(&format!("{pod}/exec"), "base64.channel.k8s.io"),
            Room::Close
        );
        assert_eq!(
            of(&format!("{pod}/portforward"), "v4.channel.k8s.io"),
            Room::Close
        );
        let none = HeaderMap::new();
        assert_eq!(Room::of_websocket(pod, &none), Room::Close);
    }

    #[test]
    fn only_lines_of_json_get_another_one() {
        let headers = |pairs: &[(header::HeaderName, &'static str)]| -> HeaderMap {
            let pairs = pairs.iter().cloned();
            pairs
                .map(|(name, value)| (name, HeaderValue::from_static(value)))
                .collect()
        };
        let watch = PathAndQuery::from_static("/api/v1/pods?limit=1&watch=true");
        let json = headers(&[(header::CONTENT_TYPE, "application/json; charset=utf-8")]);
        assert!(is_json_watch(&watch, &json));
        assert!(is_json_watch(
            &PathAndQuery::from_static("/api/v1/pods?watch=1"),
            &json
        ));
        assert!(!is_json_watch(
            &PathAndQuery::from_static("/api/v1/pods?watch=false"),
            &json
        ));
        assert!(!is_json_watch(
            &PathAndQuery::from_static("/api/v1/pods"),
            &json
        ));
        let protobuf = headers(&[(
            header::CONTENT_TYPE,
            "application/vnd.kubernetes.protobuf;stream=watch",
        )]);
        assert!(!is_json_watch(&watch, &protobuf));
        let packed = headers(&[
            (header::CONTENT_TYPE, "application/json"),
            (header::CONTENT_ENCODING, "gzip"),
        ]);
        assert!(!is_json_watch(&watch, &packed));

        let event: serde_json::Value =
            serde_json::from_slice(&last_event(&why("prod-eu", &expired()))).unwrap();
        assert_eq!(event["type"], "ERROR");
        assert_eq!(event["object"]["kind"], "Status");
    }

    #[test]
    fn a_restarted_agent_is_named() {
        let gone = LineError::Gone("the agent of cluster prod-eu was restarted".to_owned());
        assert_eq!(
            why("prod-eu", &gone).to_string(),
            "the connection to cluster prod-eu has ended: the agent of cluster prod-eu was restarted"
        );
    }
}
