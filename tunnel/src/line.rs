//! The line: a byte stream between a local proxy and an agent that knows its own end.
//!
//! A line has no task. Reading and writing each drive what they need: a reader sends
//! acknowledgements, a writer without room takes in acknowledgements. The two may be in different
//! tasks; the stream below is polled with a waker that wakes both, so that neither takes the
//! other's.
//!
//! Small writes are gathered into one DATA frame until a flush, a full frame, or pressure.
//! What may be unacknowledged is bounded ([`WINDOW`]), and the receiver acknowledges what was
//! read, not what arrived: a reader that stops holds up its writer, from end to end.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use futures::task::{ArcWake, AtomicWaker, waker_ref};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::proto::line::{
    self as frames, HEADER_LEN, Header, MAX_DATA, Receiver, ResetCode, Sender, VERSION, Violation,
    WINDOW, kind,
};
use crate::proto::messages::{LineHello, LineHelloReply};

/// Longest exchange of hellos.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Bytes gathered before they are handed down.
const CORK: usize = 32 * 1024;

/// Bytes asked of the stream at once.
const READ: usize = 16 * 1024;

/// Smallest window that a peer may announce: below, it could make us send a frame a byte.
const MIN_WINDOW: u32 = 16 * 1024;

/// Why a line ended before its end, or did not begin.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The peer's fault.
    #[error("the other end of the line broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer's decision.
    #[error("the other end reset the line: {code:?}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    Reset { code: ResetCode, reason: String },
    #[error(
        "the other end speaks line version {theirs}, this end {VERSION}; update the older of the two"
    )]
    Version { theirs: u32 },
    /// Somebody's in between: the stream ended without an end of the line.
    #[error("the line was cut")]
    Cut,
    #[error("the line did not come up within {HANDSHAKE:?}")]
    Timeout,
    #[error("the line failed: {0}")]
    Io(Arc<io::Error>),
}

impl From<LineError> for io::Error {
    fn from(error: LineError) -> Self {
        io::Error::new(io::ErrorKind::ConnectionReset, error)
    }
}

impl LineHello {
    /// The hello of a new line.
    pub fn new(line_id: [u8; 16]) -> Self {
        Self {
            version: VERSION,
            line_id: line_id.to_vec(),
            epoch: 0,
            window: WINDOW,
        }
    }
}

/// Opens a line as the local proxy.
pub async fn connect<S>(mut stream: S, hello: LineHello) -> Result<Line<S>, LineError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchange = async {
        send_hello(&mut stream, kind::HELLO, &hello).await?;
        let reply: LineHelloReply = read_hello(&mut stream, kind::HELLO_REPLY).await?;
        if reply.version != VERSION {
            return Err(LineError::Version {
                theirs: reply.version,
            });
        }
        if reply.epoch != hello.epoch {
            return Err(Violation::Hello.into());
        }
        window(reply.window)
    };
    let peer_window = timely(exchange).await?;
    Ok(Line::new(stream, hello, peer_window))
}

/// Accepts a line as the agent.
pub async fn accept<S>(mut stream: S) -> Result<Line<S>, LineError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let exchange = async {
        let hello: LineHello = read_hello(&mut stream, kind::HELLO).await?;
        if hello.version != VERSION {
            let reason = format!("this end speaks line version {VERSION}");
            send_reset(&mut stream, ResetCode::Version, &reason).await;
            return Err(LineError::Version {
                theirs: hello.version,
            });
        }
        if hello.line_id.len() != 16 || hello.epoch != 0 {
            send_reset(&mut stream, ResetCode::Protocol, "malformed hello").await;
            return Err(Violation::Hello.into());
        }
        let peer_window = window(hello.window)?;
        let reply = LineHelloReply {
            version: VERSION,
            epoch: hello.epoch,
            window: WINDOW,
        };
        send_hello(&mut stream, kind::HELLO_REPLY, &reply).await?;
        Ok((hello, peer_window))
    };
    let (hello, peer_window) = timely(exchange).await?;
    let own = LineHello {
        window: WINDOW,
        ..hello
    };
    Ok(Line::new(stream, own, peer_window))
}

async fn timely<T>(step: impl Future<Output = Result<T, LineError>>) -> Result<T, LineError> {
    match tokio::time::timeout(HANDSHAKE, step).await {
        Ok(result) => result,
        Err(_) => Err(LineError::Timeout),
    }
}

fn window(announced: u32) -> Result<u32, LineError> {
    if announced < MIN_WINDOW {
        return Err(Violation::Hello.into());
    }
    Ok(announced.min(WINDOW))
}

fn lost(error: io::Error) -> LineError {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | ConnectionReset | BrokenPipe => LineError::Cut,
        _ => LineError::Io(Arc::new(error)),
    }
}

async fn send_hello<S: AsyncWrite + Unpin>(
    stream: &mut S,
    kind: u8,
    hello: &impl prost::Message,
) -> Result<(), LineError> {
    let body = hello.encode_to_vec();
    let len = u16::try_from(body.len())
        .ok()
        .filter(|len| usize::from(*len) <= frames::MAX_HELLO);
    let len = len.ok_or(Violation::Hello)?;
    let mut out = BytesMut::new();
    frames::put(&mut out, kind, len, 0);
    out.extend_from_slice(&body);
    stream.write_all(&out).await.map_err(lost)?;
    stream.flush().await.map_err(lost)
}

async fn send_reset<S: AsyncWrite + Unpin>(stream: &mut S, code: ResetCode, reason: &str) {
    let mut out = BytesMut::new();
    frames::put_reset(&mut out, code, reason);
    // Best effort: the line is over either way.
    if stream.write_all(&out).await.is_ok() {
        let _ = stream.flush().await;
    }
}

async fn read_hello<M, S>(stream: &mut S, want: u8) -> Result<M, LineError>
where
    M: prost::Message + Default,
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut head = [0; HEADER_LEN];
    stream.read_exact(&mut head).await.map_err(lost)?;
    let wrong = match frames::parse(&head) {
        Ok(Some(Header::Hello { len })) if want == kind::HELLO => {
            return hello_body(stream, len).await;
        }
        Ok(Some(Header::HelloReply { len })) if want == kind::HELLO_REPLY => {
            return hello_body(stream, len).await;
        }
        Ok(Some(Header::Reset { code, len })) => {
            let mut reason = vec![0; len];
            stream.read_exact(&mut reason).await.map_err(lost)?;
            let reason = String::from_utf8_lossy(&reason).into_owned();
            return Err(LineError::Reset { code, reason });
        }
        Ok(_) => Violation::OutOfPlace(head[0]),
        Err(violation) => violation,
    };
    send_reset(stream, reset_code(&wrong), &wrong.to_string()).await;
    Err(wrong.into())
}

async fn hello_body<M, S>(stream: &mut S, len: usize) -> Result<M, LineError>
where
    M: prost::Message + Default,
    S: AsyncRead + Unpin,
{
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await.map_err(lost)?;
    M::decode(&body[..]).map_err(|_| Violation::Hello.into())
}

fn reset_code(violation: &Violation) -> ResetCode {
    match violation {
        Violation::Reserved(_) => ResetCode::Unsupported,
        _ => ResetCode::Protocol,
    }
}

/// Wakes the reader and the writer of one line.
#[derive(Default)]
struct Wakers {
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl ArcWake for Wakers {
    fn wake_by_ref(wakers: &Arc<Self>) {
        wakers.reader.wake();
        wakers.writer.wake();
    }
}

/// A line over one stream. A clean end (`Ok` with nothing read) means that the peer said FIN and
/// every byte before it was read; anything else is an error of kind `ConnectionReset` with a
/// [`LineError`] inside. `shutdown` says FIN; dropping without it says RESET, as well as can be.
#[derive(Debug)]
pub struct Line<S: AsyncRead + AsyncWrite + Unpin> {
    stream: S,
    hello: LineHello,
    wakers: Arc<Wakers>,
    recv: Receiver,
    send: Sender,
    /// Bytes of frames, as they come.
    input: BytesMut,
    /// Of the DATA frame at the front of `input`: bytes of payload still to come.
    data_left: usize,
    /// Payload taken in by a writer that waited for acknowledgements; at most a window.
    waiting: VecDeque<Bytes>,
    /// Frames on their way down.
    output: BytesMut,
    /// Where in `output` the header of the DATA frame is that writes are still added to.
    open: Option<usize>,
    fin_sent: bool,
    shut: bool,
    failed: Option<LineError>,
}

impl std::fmt::Debug for Wakers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Wakers")
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    fn new(stream: S, hello: LineHello, peer_window: u32) -> Self {
        Self {
            stream,
            recv: Receiver::new(hello.window),
            hello,
            wakers: Arc::default(),
            send: Sender::new(peer_window),
            input: BytesMut::new(),
            data_left: 0,
            waiting: VecDeque::new(),
            output: BytesMut::new(),
            open: None,
            fin_sent: false,
            shut: false,
            failed: None,
        }
    }

    /// The id that the local proxy gave this line.
    pub fn id(&self) -> &[u8] {
        &self.hello.line_id
    }

    fn fail(&mut self, error: LineError) -> io::Error {
        if self.failed.is_none() {
            if let LineError::Violation(violation) = &error {
                self.seal();
                frames::put_reset(
                    &mut self.output,
                    reset_code(violation),
                    &violation.to_string(),
                );
                self.try_drain();
            }
            self.failed = Some(error.clone());
            self.wakers.reader.wake();
            self.wakers.writer.wake();
        }
        error.into()
    }

    /// Hands `output` down. The caller has registered its waker.
    fn poll_drain(&mut self) -> Poll<io::Result<()>> {
        self.seal();
        let wakers = self.wakers.clone();
        let waker = waker_ref(&wakers);
        let cx = &mut Context::from_waker(&waker);
        while !self.output.is_empty() {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.output)) {
                Ok(0) => return Poll::Ready(Err(self.fail(LineError::Cut))),
                Ok(n) => self.output.advance(n),
                Err(error) => return Poll::Ready(Err(self.write_failed(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// As much as goes without waiting.
    fn try_drain(&mut self) {
        let _ = self.poll_drain();
    }

    /// The peer's RESET, when it is there, says more than the broken stream.
    fn write_failed(&mut self, error: io::Error) -> io::Error {
        if let Some(failed) = &self.failed {
            return failed.clone().into();
        }
        while let Ok(true) = self.step() {
            self.set_aside();
        }
        match self.failed.clone() {
            Some(failed) => failed.into(),
            None => self.fail(lost(error)),
        }
    }

    /// No more bytes are added to the frame that is open.
    fn seal(&mut self) {
        if let Some(at) = self.open.take() {
            let len = self.output.len() - at - HEADER_LEN;
            // `room_in_frame` keeps it within MAX_DATA.
            let len = (len as u16).to_be_bytes();
            self.output[at + 2..at + 4].copy_from_slice(&len);
        }
    }

    fn room_in_frame(&self) -> usize {
        match self.open {
            Some(at) => MAX_DATA - (self.output.len() - at - HEADER_LEN),
            None => 0,
        }
    }

    /// Adds to the open DATA frame, or begins one. At most what window, frame and cork allow.
    fn append(&mut self, buf: &[u8]) -> usize {
        let most = self.send.room().min(CORK.saturating_sub(self.output.len()));
        let n = buf.len().min(most);
        if n == 0 {
            return 0;
        }
        if self.room_in_frame() < n {
            self.seal();
            self.open = Some(self.output.len());
            frames::put(&mut self.output, kind::DATA, 0, self.send.sent());
        }
        self.output.extend_from_slice(&buf[..n]);
        self.send.advance(n);
        n
    }

    fn acknowledge(&mut self) {
        if let Some(received) = self.recv.take_ack() {
            self.seal();
            frames::put(&mut self.output, kind::ACK, 0, received);
        }
        // A reader may be the only one that moves this line.
        if self.open.is_none() && !self.output.is_empty() {
            self.try_drain();
        }
    }

    /// Reads more of the stream into `input`.
    fn poll_fill(&mut self) -> Poll<io::Result<()>> {
        let wakers = self.wakers.clone();
        let waker = waker_ref(&wakers);
        let cx = &mut Context::from_waker(&waker);
        self.input.reserve(READ);
        let stream = Pin::new(&mut self.stream);
        match ready!(poll_read_buf(stream, cx, &mut self.input)) {
            Ok(0) => Poll::Ready(Err(self.fail(LineError::Cut))),
            Ok(_) => Poll::Ready(Ok(())),
            Err(error) => {
                let error = lost(error);
                Poll::Ready(Err(self.fail(error)))
            }
        }
    }

    /// Takes one header off `input`, if it is complete and no payload stands before it.
    fn step(&mut self) -> io::Result<bool> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone().into());
        }
        if self.data_left > 0 {
            return Ok(false);
        }
        let header = match frames::parse(&self.input) {
            Ok(Some(header)) => header,
            Ok(None) => return Ok(false),
            Err(violation) => return Err(self.fail(violation.into())),
        };
        if let Header::Reset { len, .. } = header
            && self.input.len() < HEADER_LEN + len
        {
            return Ok(false);
        }
        let kind = self.input[0];
        self.input.advance(HEADER_LEN);
        let judged = match header {
            // Payload counts only behind a header that may stand here.
            Header::Data { offset, len } => self
                .recv
                .on_data(offset, len)
                .map(|()| self.data_left = len),
            Header::Ack { received } => {
                self.wakers.writer.wake();
                self.send.on_ack(received)
            }
            Header::Fin { end } => self.recv.on_fin(end),
            Header::Reset { code, len } => {
                let reason = self.input.split_to(len);
                let reason = String::from_utf8_lossy(&reason).into_owned();
                return Err(self.fail(LineError::Reset { code, reason }));
            }
            Header::Hello { .. } | Header::HelloReply { .. } => Err(Violation::OutOfPlace(kind)),
        };
        match judged {
            Ok(()) => Ok(true),
            Err(violation) => Err(self.fail(violation.into())),
        }
    }

    /// Moves payload out of the way of the frames behind it. The window bounds how much.
    fn set_aside(&mut self) -> bool {
        let n = self.data_left.min(self.input.len());
        if n > 0 {
            self.data_left -= n;
            let payload = self.input.split_to(n).freeze();
            self.waiting.push_back(payload);
            self.wakers.reader.wake();
        }
        n > 0
    }

    /// For a writer without room: takes frames in until an acknowledgement makes some.
    fn poll_room(&mut self) -> Poll<io::Result<()>> {
        loop {
            if self.send.room() > 0 {
                return Poll::Ready(Ok(()));
            }
            if self.set_aside() || self.step()? {
                continue;
            }
            // The peer can only acknowledge what has left.
            if let Poll::Ready(Err(error)) = self.poll_drain() {
                return Poll::Ready(Err(error));
            }
            ready!(self.poll_fill())?;
        }
    }

    fn write_error(&self) -> Option<io::Error> {
        match &self.failed {
            Some(failed) => Some(failed.clone().into()),
            None if self.fin_sent => Some(io::ErrorKind::BrokenPipe.into()),
            None => None,
        }
    }

    fn poll_append(&mut self, bufs: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        if let Some(error) = self.write_error() {
            return Poll::Ready(Err(error));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        if self.send.room() == 0 {
            ready!(self.poll_room())?;
        }
        if self.output.len() + HEADER_LEN >= CORK {
            ready!(self.poll_drain())?;
        }
        let mut taken = 0;
        for buf in bufs {
            let n = self.append(buf);
            taken += n;
            if n < buf.len() {
                break;
            }
        }
        Poll::Ready(Ok(taken))
    }

    /// Ends the stream below, once both sides have said their end and all has left.
    fn finish(&mut self) {
        if self.fin_sent && self.recv.is_ended() && self.output.is_empty() && !self.shut {
            let wakers = self.wakers.clone();
            let waker = waker_ref(&wakers);
            let cx = &mut Context::from_waker(&waker);
            self.shut = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Line<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        this.wakers.reader.register(cx.waker());
        let before = buf.filled().len();
        // What was set aside comes first, and as much as fits.
        while let Some(front) = this.waiting.front_mut()
            && buf.remaining() > 0
        {
            let n = front.len().min(buf.remaining());
            buf.put_slice(&front[..n]);
            front.advance(n);
            if front.is_empty() {
                this.waiting.pop_front();
            }
        }
        loop {
            let n = this.data_left.min(this.input.len()).min(buf.remaining());
            if n > 0 {
                buf.put_slice(&this.input[..n]);
                this.input.advance(n);
                this.data_left -= n;
            }
            let taken = buf.filled().len() - before;
            // Frames already here are looked at, so that a FIN is seen with the last bytes. What
            // comes behind a FIN is not the reader's business: the end was clean.
            let stepped = match this.recv.is_ended() {
                true => Ok(false),
                false => this.step(),
            };
            let stepped = match stepped {
                Ok(stepped) => stepped,
                Err(_) if taken > 0 => false,
                Err(error) => return Poll::Ready(Err(error)),
            };
            if stepped && buf.remaining() > 0 {
                continue;
            }
            if taken > 0 {
                this.recv.consume(taken);
                this.acknowledge();
                this.finish();
                return Poll::Ready(Ok(()));
            }
            if this.recv.is_finished() {
                this.finish();
                return Poll::Ready(Ok(()));
            }
            if this.open.is_none() && !this.output.is_empty() {
                this.try_drain();
            }
            if this.input.is_empty() && this.input.capacity() > 4 * READ {
                this.input = BytesMut::new();
            }
            ready!(this.poll_fill())?;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Line<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.wakers.writer.register(cx.waker());
        self.poll_append(&[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wakers.writer.register(cx.waker());
        self.poll_append(bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.wakers.writer.register(cx.waker());
        if let Some(failed) = &this.failed {
            return Poll::Ready(Err(failed.clone().into()));
        }
        ready!(this.poll_drain())?;
        let wakers = this.wakers.clone();
        let waker = waker_ref(&wakers);
        let cx = &mut Context::from_waker(&waker);
        match ready!(Pin::new(&mut this.stream).poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(this.write_failed(error))),
        }
    }

    /// Says FIN. The other direction goes on.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.fin_sent {
            if let Some(failed) = &this.failed {
                return Poll::Ready(Err(failed.clone().into()));
            }
            this.seal();
            frames::put(&mut this.output, kind::FIN, 0, this.send.sent());
            this.fin_sent = true;
        }
        if this.shut {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut *this).poll_flush(cx))?;
        this.finish();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Line<S> {
    fn drop(&mut self) {
        if self.failed.is_some() || (self.fin_sent && self.recv.is_ended()) {
            self.try_drain();
            return;
        }
        self.seal();
        frames::put_reset(&mut self.output, ResetCode::Abandoned, "");
        self.try_drain();
        let wakers = self.wakers.clone();
        let waker = waker_ref(&wakers);
        let _ = Pin::new(&mut self.stream).poll_flush(&mut Context::from_waker(&waker));
    }
}
