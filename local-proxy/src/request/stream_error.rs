//! Delivers the error when a line ends under a response that has begun: in the data, where the protocol
//! has a place for errors and the data is at a message boundary, else not at all. Bytes are never added
//! to plain data; that ends by a reset.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use http::{HeaderMap, header};
use pin_project_lite::pin_project;
use throwline_kube_wire::Status;
use throwline_kube_wire::http1::target::Target;
use throwline_kube_wire::stream::channel::STATUS;
use throwline_kube_wire::stream::is_command;
use throwline_kube_wire::stream::websocket::{Frames, Opcode, frame};
use throwline_tunnel::line::LineError;
use throwline_tunnel::proto::line::ResetCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::failure::Failure;

/// The close code of a normal end. kubectl reads the status only with this one.
const NORMAL: u16 = 1000;
/// "The server met a condition that it did not expect."
const UNEXPECTED: u16 = 1011;
/// Longest text in a close frame.
const REASON: usize = 123;

/// The user's error for a response that ended with its line.
pub(crate) fn line_failure(cluster: &str, error: &LineError) -> Failure {
    match error {
        LineError::Reset {
            code: ResetCode::Revoked,
            ..
        } => Failure::Revoked,
        other => Failure::LineEnded {
            cluster: cluster.to_owned(),
            source: other.clone(),
        },
    }
}

fn io_failure(cluster: &str, error: &io::Error) -> Failure {
    let line = error.get_ref();
    match line.and_then(|error| error.downcast_ref::<LineError>()) {
        Some(error) => line_failure(cluster, error),
        None => Failure::StreamEnded {
            cluster: cluster.to_owned(),
            // A copy: the original is for the reader.
            source: Arc::new(io::Error::new(error.kind(), error.to_string())),
        },
    }
}

/// The place for an error at the end of an upgraded connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ErrorSlot {
    /// A status on its channel, then a close: exec, attach and cp.
    Status,
    /// A close with a reason: other WebSockets.
    Close,
    /// None: SPDY, whose headers hang on one another.
    None,
}

impl ErrorSlot {
    /// Of an answer with these headers that switches to WebSocket.
    pub(crate) fn of_websocket(path: &str, headers: &HeaderMap) -> Self {
        let path = path.split('?').next().unwrap_or_default();
        let protocol = headers.get(header::SEC_WEBSOCKET_PROTOCOL);
        let protocol = protocol.map_or(&b""[..], |protocol| protocol.as_bytes());
        match protocol {
            b"v4.channel.k8s.io" | b"v5.channel.k8s.io" if is_command(path) => Self::Status,
            _ => Self::Close,
        }
    }
}

pin_project! {
    /// The agent's side of an upgraded connection. When a read fails, an error frame of the protocol is
    /// delivered first, as if the agent had sent it, then the error of the read.
    pub(crate) struct ErrorInjector<IO> {
        #[pin]
        io: IO,
        cluster: String,
        slot: ErrorSlot,
        frames: Frames,
        pending: Bytes,
        error: Option<io::Error>,
    }
}

impl<IO> ErrorInjector<IO> {
    pub(crate) fn new(io: IO, cluster: String, slot: ErrorSlot) -> Self {
        Self {
            io,
            cluster,
            slot,
            frames: Frames::new(STATUS),
            pending: Bytes::new(),
            error: None,
        }
    }
}

/// The frames that `slot` and the state of the stream allow.
fn error_frames(slot: ErrorSlot, frames: &Frames, failure: &Failure) -> Bytes {
    let status = Status::from(failure);
    let mut out = Vec::new();
    match slot {
        ErrorSlot::Status if frames.may_speak() && !frames.is_spoken() => {
            let said = [&[STATUS], &status.json()[..]].concat();
            out.extend(frame(Opcode::Binary, &said));
            out.extend(close(NORMAL, ""));
        }
        // The status was sent already, or the stream was cut inside a message.
        ErrorSlot::Status if frames.is_spoken() => {}
        ErrorSlot::Status | ErrorSlot::Close if frames.may_close() => {
            out.extend(close(UNEXPECTED, &status.message));
        }
        ErrorSlot::Status | ErrorSlot::Close | ErrorSlot::None => {}
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

impl<IO: AsyncRead> AsyncRead for ErrorInjector<IO> {
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
                    if *this.slot != ErrorSlot::None {
                        let read = buf.filled().get(before..);
                        this.frames.pass(read.unwrap_or_default());
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) => {
                    let failure = io_failure(this.cluster, &error);
                    *this.pending = error_frames(*this.slot, this.frames, &failure);
                    *this.error = Some(error);
                }
            }
        }
        if this.pending.has_remaining() {
            let step = this.pending.len().min(buf.remaining());
            buf.put_slice(&this.pending.split_to(step));
            return Poll::Ready(Ok(()));
        }
        match this.error.take() {
            Some(error) => Poll::Ready(Err(error)),
            None => Poll::Ready(Ok(())),
        }
    }
}

impl<IO: AsyncWrite> AsyncWrite for ErrorInjector<IO> {
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
pub(crate) fn is_json_watch(path: &Target, headers: &HeaderMap) -> bool {
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

/// The event with which an API server, too, ends a watch.
pub(crate) fn error_event(failure: &Failure) -> Bytes {
    let status = String::from_utf8(Status::from(failure).json()).unwrap_or_default();
    Bytes::from(format!("{{\"type\":\"ERROR\",\"object\":{status}}}\n"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderValue;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn expired() -> LineError {
        LineError::Expired {
            after: Duration::from_secs(120),
            why: "the relay cannot be reached".to_owned(),
        }
    }

    #[test]
    fn a_real_end_of_the_identity_is_told_as_what_it_is() {
        let reset = |code| LineError::Reset {
            code,
            reason: "not shown".to_owned(),
        };
        let told = line_failure("prod-eu", &reset(ResetCode::Revoked)).to_string();
        assert!(told.contains("your identity was revoked"), "{told}");
        let told = line_failure("prod-eu", &reset(ResetCode::Expired)).to_string();
        assert!(told.contains("your certificate has expired"), "{told}");
        assert!(!told.contains("not shown"), "{told}");
        let told = line_failure("prod-eu", &reset(ResetCode::Abandoned)).to_string();
        assert!(told.contains("its agent, or the API server"), "{told}");
    }

    /// What is read of an agent that sends `said` and is then lost.
    async fn read(said: &'static [u8], slot: ErrorSlot) -> (Vec<u8>, io::Error) {
        let mut io = ErrorInjector::new(Lost(said), "prod-eu".to_owned(), slot);
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
        let (all, error) = read(HELLO, ErrorSlot::Status).await;
        let close = all.strip_prefix(HELLO).unwrap();
        assert_eq!(&close[..2], [0x82, 126]);
        let len = usize::from(u16::from_be_bytes([close[2], close[3]]));
        let (status, rest) = close[4..].split_at(len);
        assert_eq!(status[0], STATUS);
        let status: serde_json::Value = serde_json::from_slice(&status[1..]).unwrap();
        assert_eq!(status["status"], "Failure");
        assert_eq!(status["reason"], "Timeout");
        assert_eq!(status["code"], 504);
        assert_eq!(
            status["message"],
            "throwline proxy: the connection to cluster prod-eu was lost for longer than 120 s \
             (--detached-life) and was given up; run the command again (the relay cannot be reached)"
        );
        assert_eq!(rest, [0x88, 2, 0x03, 0xe8]);
        let line = error.get_ref().unwrap().downcast_ref::<LineError>();
        assert!(matches!(line, Some(LineError::Expired { .. })), "{error}");
    }

    #[tokio::test]
    async fn where_there_is_no_slot_nothing_is_added() {
        let cut = &HELLO[..5];
        let status = b"\x82\x03\x03{}";
        for (said, slot) in [
            (cut, ErrorSlot::Status),
            (cut, ErrorSlot::Close),
            (HELLO, ErrorSlot::None),
            (status, ErrorSlot::Status),
            (b"\x88\x02\x03\xe8", ErrorSlot::Close),
        ] {
            assert_eq!(read(said, slot).await.0, said, "{slot:?}");
        }
    }

    #[tokio::test]
    async fn inside_a_message_and_elsewhere_a_close_says_it() {
        let part = b"\x02\x06\x01hello";
        for (said, slot) in [(&part[..], ErrorSlot::Status), (HELLO, ErrorSlot::Close)] {
            let (all, _) = read(said, slot).await;
            let close = all.strip_prefix(said).unwrap();
            assert_eq!(close[0], 0x88);
            assert_eq!(usize::from(close[1]), close.len() - 2);
            assert!(close.len() <= 127);
            assert_eq!(close[2..4], UNEXPECTED.to_be_bytes());
            let reason = std::str::from_utf8(&close[4..]).unwrap();
            assert!(
                reason.starts_with("throwline proxy: the connection to cluster prod-eu was lost")
            );
        }
    }

    #[tokio::test]
    async fn what_is_written_goes_through() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut io = ErrorInjector::new(near, "prod-eu".to_owned(), ErrorSlot::Close);
        io.write_all(b"ahoy").await.unwrap();
        io.shutdown().await.unwrap();
        let mut got = String::new();
        far.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "ahoy");
    }

    #[test]
    fn the_slot_is_what_was_agreed_on() {
        let of = |path: &str, protocol: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(
                header::SEC_WEBSOCKET_PROTOCOL,
                HeaderValue::from_static(protocol),
            );
            ErrorSlot::of_websocket(path, &headers)
        };
        let pod = "/api/v1/namespaces/n/pods/p";
        assert_eq!(
            of(&format!("{pod}/exec?command=sh"), "v5.channel.k8s.io"),
            ErrorSlot::Status
        );
        assert_eq!(
            of(&format!("{pod}/attach"), "v4.channel.k8s.io"),
            ErrorSlot::Status
        );
        assert_eq!(
            of(&format!("{pod}/exec"), "base64.channel.k8s.io"),
            ErrorSlot::Close
        );
        assert_eq!(
            of(&format!("{pod}/portforward"), "v4.channel.k8s.io"),
            ErrorSlot::Close
        );
        let none = HeaderMap::new();
        assert_eq!(ErrorSlot::of_websocket(pod, &none), ErrorSlot::Close);
    }

    #[test]
    fn only_lines_of_json_get_another_one() {
        let headers = |pairs: &[(header::HeaderName, &'static str)]| -> HeaderMap {
            let pairs = pairs.iter().cloned();
            pairs
                .map(|(name, value)| (name, HeaderValue::from_static(value)))
                .collect()
        };
        let watch = "/api/v1/pods?limit=1&watch=true".parse::<Target>().unwrap();
        let json = headers(&[(header::CONTENT_TYPE, "application/json; charset=utf-8")]);
        assert!(is_json_watch(&watch, &json));
        assert!(is_json_watch(
            &"/api/v1/pods?watch=1".parse::<Target>().unwrap(),
            &json
        ));
        assert!(!is_json_watch(
            &"/api/v1/pods?watch=false".parse::<Target>().unwrap(),
            &json
        ));
        assert!(!is_json_watch(
            &"/api/v1/pods".parse::<Target>().unwrap(),
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
            serde_json::from_slice(&error_event(&line_failure("prod-eu", &expired()))).unwrap();
        assert_eq!(event["type"], "ERROR");
        assert_eq!(event["object"]["kind"], "Status");
    }

    #[test]
    fn a_restarted_agent_is_named() {
        let gone = LineError::Gone("the agent of cluster prod-eu was restarted".to_owned());
        assert_eq!(
            line_failure("prod-eu", &gone).to_string(),
            "the connection to cluster prod-eu has ended: the agent of cluster prod-eu was restarted"
        );
    }
}
