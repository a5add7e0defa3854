//! The first frames on a stream: HELLO for a new line, RESUME for one that lost its stream.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::proto::line::resume::ID_LEN;
use crate::proto::line::{
    self as frames, HEADER_LEN, Header, MAX_WINDOW, ResetCode, VERSION, Violation, kind,
};
use crate::proto::messages::{LineHello, LineHelloReply, LineResume};

use super::error::{HANDSHAKE, lost};
use super::state::Terms;
use super::{Line, LineBudgets, LineError};

/// Smallest window that a peer may announce: below, it could make us send a frame a byte.
const MIN_WINDOW: u32 = 16 * 1024;

impl LineHello {
    /// The hello of a new line, which may be without a stream for `detached` (milliseconds count);
    /// zero: not at all.
    pub fn new(line_id: [u8; ID_LEN], detached: Duration) -> Self {
        Self {
            version: VERSION,
            line_id: line_id.to_vec(),
            epoch: 0,
            window: MAX_WINDOW,
            detached_ms: millis(detached),
        }
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

/// What a stream that was opened for a line is for.
pub enum Accepted<S: AsyncRead + AsyncWrite + Unpin> {
    /// A new line.
    New(Line<S>),
    /// A line that may be here; [`super::Handle::accept_resume`] on it, or [`ResumeRequest::reject`].
    Resume(ResumeRequest<S>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Accepted<S> {
    /// For a component that keeps no lines to resume.
    ///
    /// # Errors
    /// The peer has sent a RESUME.
    pub fn into_new(self) -> Result<Line<S>, LineError> {
        match self {
            Self::New(line) => Ok(line),
            Self::Resume(_) => Err(Violation::OutOfPlace(kind::RESUME).into()),
        }
    }
}

/// A RESUME, and the stream that it came on.
#[derive(Debug)]
pub struct ResumeRequest<S> {
    pub(super) message: LineResume,
    pub(super) epoch: u64,
    pub(super) stream: S,
}

impl<S> ResumeRequest<S> {
    /// Id of the line to be resumed; 16 bytes, not yet verified.
    pub fn line_id(&self) -> &[u8] {
        &self.message.line_id
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> ResumeRequest<S> {
    /// Answers that there is no such line. The answer is the same when there is one that may not be
    /// resumed.
    pub async fn reject(mut self) {
        let mut out = BytesMut::new();
        frames::put_gone(&mut out, ResetCode::Unknown, "");
        let answer = async {
            self.stream.write_all(&out).await?;
            self.stream.flush().await?;
            // Half-closed, so that the answer is read before the stream is reset.
            self.stream.shutdown().await
        };
        // Best effort: without the answer, the peer runs into its deadline.
        let _ = tokio::time::timeout(HANDSHAKE, answer).await;
    }
}

/// Opens a line as the local proxy.
///
/// # Errors
/// The stream fails, or the peer breaks the protocol, has another version or does not answer.
pub async fn connect<S>(
    mut stream: S,
    hello: LineHello,
    budgets: LineBudgets,
) -> Result<Line<S>, LineError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchange = async {
        send(&mut stream, kind::HELLO, 0, &hello).await?;
        let reply: LineHelloReply = match head(&mut stream).await? {
            (Header::HelloReply { len }, _) => body(&mut stream, len).await?,
            (_, kind) => return Err(refuse(&mut stream, Violation::OutOfPlace(kind)).await),
        };
        if reply.version != VERSION {
            return Err(LineError::Version {
                theirs: reply.version,
            });
        }
        // The agent may shorten the detached life, not extend it: it bounds how long this end keeps
        // a line without a stream.
        if reply.epoch != hello.epoch || reply.detached_ms > hello.detached_ms {
            return Err(Violation::Hello.into());
        }
        Ok((window(reply.window)?, reply.detached_ms))
    };
    let (peer_window, detached) = timely(exchange).await?;
    let detached = Duration::from_millis(detached.into());
    let terms = Terms {
        id: hello.line_id,
        window: hello.window,
        peer_window,
        detached,
    };
    Ok(Line::new(stream, terms, budgets))
}

/// Accepts a new line as the agent, or the resumption of one. `detached`: how long a line may be
/// without a stream at most; zero: not at all.
///
/// # Errors
/// As [`connect`].
pub async fn accept<S>(
    mut stream: S,
    detached: Duration,
    budgets: LineBudgets,
) -> Result<Accepted<S>, LineError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let first = async {
        match head(&mut stream).await? {
            (Header::Hello { len }, _) => {
                let hello: LineHello = body(&mut stream, len).await?;
                Ok(First::Hello(greet(&mut stream, hello, detached).await?))
            }
            (Header::Resume { epoch, len }, _) => {
                let message: LineResume = match body(&mut stream, len).await {
                    Ok(message) => message,
                    Err(_) => return Err(refuse(&mut stream, Violation::Resume).await),
                };
                Ok(First::Resume(message, epoch))
            }
            (_, kind) => Err(refuse(&mut stream, Violation::OutOfPlace(kind)).await),
        }
    };
    match timely(first).await? {
        First::Hello((hello, peer_window)) => {
            let detached = Duration::from_millis(hello.detached_ms.into());
            let terms = Terms {
                id: hello.line_id,
                window: MAX_WINDOW,
                peer_window,
                detached,
            };
            Ok(Accepted::New(Line::new(stream, terms, budgets)))
        }
        First::Resume(message, epoch) => Ok(Accepted::Resume(ResumeRequest {
            message,
            epoch,
            stream,
        })),
    }
}

enum First {
    Hello((LineHello, u32)),
    Resume(LineResume, u64),
}

/// Answers a hello; gives it back with what holds for the line.
async fn greet<S: AsyncWrite + Unpin>(
    stream: &mut S,
    mut hello: LineHello,
    detached: Duration,
) -> Result<(LineHello, u32), LineError> {
    if hello.version != VERSION {
        let reason = format!("this end speaks line version {VERSION}");
        send_reset(stream, ResetCode::Version, &reason).await;
        return Err(LineError::Version {
            theirs: hello.version,
        });
    }
    // The id is in each MAC of a resumption, and only a RESUME has another epoch than 0.
    if hello.line_id.len() != ID_LEN || hello.epoch != 0 {
        send_reset(stream, ResetCode::Protocol, "malformed hello").await;
        return Err(Violation::Hello.into());
    }
    let peer_window = window(hello.window)?;
    hello.detached_ms = hello.detached_ms.min(millis(detached));
    let reply = LineHelloReply {
        version: VERSION,
        epoch: hello.epoch,
        window: MAX_WINDOW,
        detached_ms: hello.detached_ms,
    };
    send(stream, kind::HELLO_REPLY, 0, &reply).await?;
    Ok((hello, peer_window))
}

pub(super) async fn timely<T>(
    step: impl Future<Output = Result<T, LineError>>,
) -> Result<T, LineError> {
    match tokio::time::timeout(HANDSHAKE, step).await {
        Ok(result) => result,
        Err(_) => Err(LineError::Timeout),
    }
}

fn window(announced: u32) -> Result<u32, LineError> {
    if announced < MIN_WINDOW {
        return Err(Violation::Hello.into());
    }
    Ok(announced.min(MAX_WINDOW))
}

pub(super) async fn send<S: AsyncWrite + Unpin>(
    stream: &mut S,
    kind: u8,
    value: u64,
    message: &impl prost::Message,
) -> Result<(), LineError> {
    let body = message.encode_to_vec();
    let len = u16::try_from(body.len())
        .ok()
        .filter(|len| usize::from(*len) <= frames::MAX_HELLO);
    let len = len.ok_or(Violation::Hello)?;
    let mut out = BytesMut::new();
    frames::put(&mut out, kind, len, value);
    // Header and body in one write, and so in one frame of the multiplexer.
    out.extend_from_slice(&body);
    stream.write_all(&out).await.map_err(lost)?;
    stream.flush().await.map_err(lost)
}

pub(super) async fn send_reset<S: AsyncWrite + Unpin>(
    stream: &mut S,
    code: ResetCode,
    reason: &str,
) {
    let mut out = BytesMut::new();
    frames::put_reset(&mut out, code, reason);
    // Best effort: the line is over either way.
    if stream.write_all(&out).await.is_ok() {
        let _ = stream.flush().await;
    }
}

async fn refuse<S: AsyncWrite + Unpin>(stream: &mut S, violation: Violation) -> LineError {
    send_reset(stream, ResetCode::Protocol, &violation.to_string()).await;
    violation.into()
}

/// The first header; a RESET there is returned as [`LineError::Reset`].
pub(super) async fn head<S>(stream: &mut S) -> Result<(Header, u8), LineError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut head = [0; HEADER_LEN];
    stream.read_exact(&mut head).await.map_err(lost)?;
    match frames::parse(&head) {
        Ok(Some(Header::Reset { code, len })) => {
            let reason = text(stream, len).await?;
            Err(LineError::Reset { code, reason })
        }
        Ok(Some(header)) => Ok((header, head[0])),
        Ok(None) => Err(Violation::Hello.into()),
        Err(violation) => Err(refuse(stream, violation).await),
    }
}

pub(super) async fn text<S: AsyncRead + Unpin>(
    stream: &mut S,
    len: usize,
) -> Result<String, LineError> {
    let mut reason = vec![0; len];
    stream.read_exact(&mut reason).await.map_err(lost)?;
    Ok(String::from_utf8_lossy(&reason).into_owned())
}

pub(super) async fn body<M, S>(stream: &mut S, len: usize) -> Result<M, LineError>
where
    M: prost::Message + Default,
    S: AsyncRead + Unpin,
{
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(lost)?;
    M::decode(&body[..]).map_err(|_| Violation::Hello.into())
}
