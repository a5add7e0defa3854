//! Stands between a connection and its HTTP/1.1 server, and looks at every request's head before the
//! parser does.
//!
//! A parser forgives, cannot hold the long targets that the API server takes, and answers what it does not
//! understand by itself, without a word to the client or to any log. So here a head with two readings is
//! replaced by one without any, and the service, which takes a [`Note`] for each request, refuses that;
//! a long target waits in the note. A connection that is ended with bytes unread is drained first: the
//! kernel would answer them with a reset, and the refusal might never be read (RFC 9112, section 9.6).
//!
//! Bounds: [`head::MAX`] bytes for a head, with an [`Allowance`] from [`head::SMALL`] on.

use std::any::Any;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep, timeout};

use super::framing::Framing;
use super::head::{self, Head, HeadError};
use super::request_line::PLACEHOLDER;
use super::target::Target;

/// How long a client may go on sending after it was answered.
const LINGER: Duration = Duration::from_secs(2);
/// And how much, bytes.
const LINGER_MAX: usize = 16 * 1024 * 1024;
/// Read in one piece of what is thrown away.
const DISCARD: usize = 16 * 1024;

/// Something that is given back when it is dropped. It goes with the request that it was given for.
pub type Permit = Arc<dyn Any + Send + Sync>;

/// Who may have a large head in memory.
pub trait Allowance: Send + Sync + 'static {
    /// `None`: not now.
    fn admit(&self) -> Option<Permit>;
}

/// Facts about a request that the service needs and the parser could not report.
#[derive(Default)]
pub struct Note {
    /// The request must be refused with this, and the connection closed.
    pub refused: Option<HeadError>,
    /// The target in place of the request's own.
    pub target: Option<Target>,
    /// For a large head, until nothing of it is needed.
    pub permit: Option<Permit>,
}

/// The notes of one connection, in the order of its requests.
#[derive(Clone, Default)]
pub struct Notes(Arc<Mutex<VecDeque<Note>>>);

impl Notes {
    /// That of the request which the parser has just handed over.
    pub fn take(&self) -> Note {
        self.lock().pop_front().unwrap_or_default()
    }

    fn push(&self, note: Note) {
        self.lock().push_back(note);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Note>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection whose heads were looked at.
pub struct Gate<IO> {
    io: IO,
    state: State,
    /// What has come of the next head, and perhaps more.
    ahead: BytesMut,
    /// So much of it holds no head's end.
    looked: usize,
    permit: Option<Permit>,
    notes: Notes,
    prefix: fn(&[u8]) -> usize,
    allowance: Arc<dyn Allowance>,
    linger: Option<Linger>,
    /// Size of the largest head that was handed on, bytes.
    largest: usize,
    /// The largest head that the parser has room for, bytes.
    room: usize,
}

enum State {
    /// The next byte belongs to a head.
    Head,
    /// A head on its way to the parser.
    Handing { head: Bytes, then: Then },
    /// The body of the request before the next head.
    Body(Framing),
    /// Nothing is parsed any more: the bytes behind an upgrade, or a body of unknown length.
    Raw,
    /// A request was refused: nothing more is taken from this connection.
    Refused,
}

#[derive(Clone, Copy)]
enum Then {
    Body(Framing),
    Raw,
    Refused,
}

struct Linger {
    timer: Pin<Box<Sleep>>,
    left: usize,
}

impl<IO> Gate<IO> {
    /// `prefix` returns how many bytes of a target are not the API server's; see [`Target::read`].
    pub fn new(io: IO, prefix: fn(&[u8]) -> usize, allowance: Arc<dyn Allowance>) -> Self {
        Self {
            io,
            state: State::Head,
            ahead: BytesMut::new(),
            looked: 0,
            permit: None,
            notes: Notes::default(),
            prefix,
            allowance,
            linger: None,
            largest: 0,
            room: usize::MAX,
        }
    }

    /// One that lets everything through, for a connection that speaks something else.
    pub fn open(io: IO) -> Self {
        struct Nobody;
        impl Allowance for Nobody {
            fn admit(&self) -> Option<Permit> {
                None
            }
        }
        let mut gate = Self::new(io, |_| 0, Arc::new(Nobody));
        gate.state = State::Raw;
        gate
    }

    /// The notes of this connection.
    pub fn notes(&self) -> Notes {
        self.notes.clone()
    }

    /// Size of the largest head that is or was handed on, bytes.
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Refuses later heads that are larger than this, bytes: the parser behind has no more room.
    pub fn make_room(&mut self, bytes: usize) {
        self.room = bytes;
    }

    fn refuse(&mut self, error: HeadError) {
        let line = head::line_of(&self.ahead);
        let head = format!("{line}\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        self.ahead = BytesMut::new();
        self.permit = None;
        self.notes.push(Note {
            refused: Some(error),
            ..Note::default()
        });
        self.state = State::Handing {
            head: head.into(),
            then: Then::Refused,
        };
    }

    /// Whether a head of this size may be in memory.
    fn is_admitted(&mut self, size: usize) -> bool {
        if size > head::SMALL && self.permit.is_none() {
            self.permit = self.allowance.admit();
        }
        size <= head::SMALL || self.permit.is_some()
    }

    fn hand(&mut self, end: usize) {
        if !self.is_admitted(end) {
            return self.refuse(HeadError::Busy);
        }
        let head = match Head::read(&self.ahead[..end], self.prefix) {
            Ok(head) => head,
            Err(error) => return self.refuse(error),
        };
        let then = if head.upgrades {
            Then::Raw
        } else {
            Then::Body(head.framing)
        };
        let (start, stop) = head.target_at;
        let read = head.target;
        let target = read
            .short()
            .map_or(PLACEHOLDER.len(), |short| short.as_str().len());
        if end - (stop - start) + target > self.room {
            return self.refuse(HeadError::NotFirst);
        }
        let bytes = self.ahead.split_to(end).freeze();
        let replace = |target: &str| {
            let mut out = BytesMut::with_capacity(end - (stop - start) + target.len());
            out.extend_from_slice(&bytes[..start]);
            out.extend_from_slice(target.as_bytes());
            out.extend_from_slice(&bytes[stop..]);
            out.freeze()
        };
        let (head, target) = match read.short() {
            None => (replace(PLACEHOLDER), Some(read)),
            Some(short) if short.as_str().as_bytes() == &bytes[start..stop] => (bytes, None),
            Some(short) => (replace(short.as_str()), None),
        };
        self.largest = self.largest.max(head.len());
        self.notes.push(Note {
            target,
            permit: self.permit.take(),
            refused: None,
        });
        self.looked = 0;
        if self.ahead.is_empty() {
            // It may be the block of a large head.
            self.ahead = BytesMut::new();
        }
        self.state = State::Handing { head, then };
    }
}

impl<IO: AsyncRead + Unpin> Gate<IO> {
    /// Waits for the first request; its first byte may take `idle`, the rest of its head `within`.
    ///
    /// # Errors
    /// [`HeadError::Unused`], [`HeadError::Idle`] and [`HeadError::Cut`]: no client waits for an answer. All
    /// else is answered by the service.
    pub async fn first(&mut self, idle: Duration, within: Duration) -> Result<(), HeadError> {
        let any = timeout(idle, poll_fn(|cx| self.poll_more(cx)));
        if any
            .await
            .map_err(|_| HeadError::Idle)?
            .map_err(HeadError::Cut)?
            == 0
        {
            return Err(HeadError::Unused);
        }
        let whole = timeout(within, poll_fn(|cx| self.poll_head(cx))).await;
        match whole {
            Err(_) => {
                self.refuse(HeadError::Slow(within));
                Ok(())
            }
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(HeadError::Cut(io::ErrorKind::UnexpectedEof.into())),
            Ok(Err(error)) => Err(HeadError::Cut(error)),
        }
    }

    /// Reads a piece; 0 at the end.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.ahead.reserve(4 * 1024);
        tokio_util::io::poll_read_buf(Pin::new(&mut self.io), cx, &mut self.ahead)
    }

    /// Ready when a head is to be handed on; `false`: the connection has ended without.
    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        while matches!(self.state, State::Head) {
            if let Some(end) = head::end_of_head(&self.ahead, self.looked) {
                if end > head::MAX {
                    self.refuse(HeadError::TooLarge)
                } else {
                    self.hand(end)
                }
                break;
            }
            self.looked = self.ahead.len().saturating_sub(3);
            if self.ahead.len() > head::MAX {
                self.refuse(HeadError::TooLarge);
                break;
            }
            if !self.is_admitted(self.ahead.len()) {
                self.refuse(HeadError::Busy);
                break;
            }
            if ready!(self.poll_more(cx))? == 0 {
                return Poll::Ready(Ok(false));
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Discards incoming bytes; ready at their end.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut scratch = [0; DISCARD];
        let mut buffer = ReadBuf::new(&mut scratch);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Ready when the client has ended, or has had its time.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_between = matches!(self.state, State::Head) && self.ahead.is_empty();
        if is_between || matches!(self.state, State::Raw) {
            return Poll::Ready(());
        }
        let linger = self.linger.get_or_insert_with(|| Linger {
            timer: Box::pin(sleep(LINGER)),
            left: LINGER_MAX,
        });
        if linger.timer.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        loop {
            let Ok(count @ 1..) = ready!(self.poll_discard(cx)) else {
                return Poll::Ready(());
            };
            let Some(linger) = &mut self.linger else {
                return Poll::Ready(());
            };
            linger.left = linger.left.saturating_sub(count);
            if linger.left == 0 {
                return Poll::Ready(());
            }
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Gate<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if buffer.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            match &mut this.state {
                State::Head => {
                    if !ready!(this.poll_head(cx))? {
                        return Poll::Ready(Ok(()));
                    }
                }
                // The parser gets a head only whole and checked, however small its buffer is.
                State::Handing { head, then } => {
                    let count = head.len().min(buffer.remaining());
                    buffer.put_slice(&head[..count]);
                    head.advance(count);
                    if head.is_empty() {
                        this.state = match *then {
                            Then::Body(framing) if framing.is_done() => State::Head,
                            Then::Body(framing) => State::Body(framing),
                            Then::Raw => State::Raw,
                            Then::Refused => State::Refused,
                        };
                    }
                    return Poll::Ready(Ok(()));
                }
                State::Body(framing) => {
                    if this.ahead.is_empty() {
                        let before = buffer.filled().len();
                        ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
                        let own = framing.eat(&buffer.filled()[before..]);
                        // What is behind the body belongs to the next head.
                        this.ahead
                            .extend_from_slice(&buffer.filled()[before + own..]);
                        buffer.set_filled(before + own);
                    } else {
                        let most = this.ahead.len().min(buffer.remaining());
                        let own = framing.eat(&this.ahead[..most]);
                        buffer.put_slice(&this.ahead[..own]);
                        this.ahead.advance(own);
                    }
                    if framing.is_lost() {
                        // The next head cannot be found: the rest is passed on, for the parser to reject.
                        this.state = State::Raw;
                    } else if framing.is_done() {
                        this.state = State::Head;
                        this.looked = 0;
                    }
                    return Poll::Ready(Ok(()));
                }
                State::Raw if this.ahead.is_empty() => {
                    return Pin::new(&mut this.io).poll_read(cx, buffer);
                }
                State::Raw => {
                    let count = this.ahead.len().min(buffer.remaining());
                    buffer.put_slice(&this.ahead[..count]);
                    this.ahead.advance(count);
                    if this.ahead.is_empty() {
                        this.ahead = BytesMut::new();
                    }
                    return Poll::Ready(Ok(()));
                }
                State::Refused => {
                    // An end here would make the parser give up the answer.
                    while let Ok(1..) = ready!(this.poll_discard(cx)) {}
                    return Poll::Pending;
                }
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Gate<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger.is_none() {
            ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
        }
        ready!(self.poll_linger(cx));
        Poll::Ready(Ok(()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
    use tokio::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct Always(bool);

    impl Allowance for Always {
        fn admit(&self) -> Option<Permit> {
            self.0.then(|| Arc::new(()) as Permit)
        }
    }

    fn gate(allowed: bool) -> (DuplexStream, Gate<DuplexStream>) {
        let (near, far) = duplex(4096);
        (near, Gate::new(far, |_| 0, Arc::new(Always(allowed))))
    }

    /// What the parser reads of `sent`, written in pieces of that size, and the notes.
    async fn through(sent: &[u8], piece: usize) -> (Vec<u8>, Vec<Note>) {
        let (mut near, mut gate) = gate(true);
        let notes = gate.notes();
        let sent = sent.to_vec();
        let write = tokio::spawn(async move {
            for piece in sent.chunks(piece) {
                near.write_all(piece).await.unwrap();
            }
            near.shutdown().await.unwrap();
            near
        });
        gate.first(SECOND, SECOND).await.unwrap();
        let mut read = Vec::new();
        // A refused body may have no end: the answer is sent first.
        while let Ok(Ok(1..)) = timeout(SECOND, gate.read_buf(&mut read)).await {}
        write.await.unwrap();
        let notes = std::iter::from_fn(|| notes.lock().pop_front()).collect();
        (read, notes)
    }

    #[tokio::test(start_paused = true)]
    async fn good_requests_pass_as_they_are_with_a_note_each() {
        let sent = b"GET /a HTTP/1.1\r\nhost: a\r\n\r\nPOST /b HTTP/1.1\r\ncontent-length: 28\r\n\r\n\
                     GET /no HTTP/1.1\r\nnot: a\r\n\r\nPOST /c HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n\
                     3\r\n\n\n\n\r\n0\r\n\r\nGET /d HTTP/1.1\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nno\n\nhead";
        for piece in [1, 7, 4096] {
            let (read, notes) = through(sent, piece).await;
            assert_eq!(
                String::from_utf8_lossy(&read),
                String::from_utf8_lossy(sent)
            );
            assert_eq!(notes.len(), 4);
            assert!(
                notes
                    .iter()
                    .all(|note| note.refused.is_none() && note.target.is_none())
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_target_goes_round_the_parser() {
        let long = format!("/x?{}", "a".repeat(500_000));
        let sent = format!("GET {long} HTTP/1.1\r\nhost: a\r\n\r\nGET /y HTTP/1.1\r\n\r\n");
        let (read, notes) = through(sent.as_bytes(), 5000).await;
        let expected = "GET / HTTP/1.1\r\nhost: a\r\n\r\nGET /y HTTP/1.1\r\n\r\n";
        assert_eq!(String::from_utf8_lossy(&read), expected);
        assert!(notes[0].target.as_ref().unwrap().as_str() == long);
        assert!(notes[0].permit.is_some() && notes[1].permit.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_head_beyond_the_parsers_room_is_refused() {
        let (mut near, mut gate) = gate(true);
        let notes = gate.notes();
        let long = format!("GET /?{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
        let large = format!("GET /b HTTP/1.1\r\nx: {}\r\n\r\n", "a".repeat(2000));
        let sent = format!("GET /a HTTP/1.1\r\n\r\n{long}{large}");
        let write = tokio::spawn(async move {
            near.write_all(sent.as_bytes()).await.unwrap();
            near.shutdown().await.unwrap();
            near
        });
        gate.first(SECOND, SECOND).await.unwrap();
        gate.make_room(1000);
        let mut read = Vec::new();
        while let Ok(Ok(1..)) = timeout(SECOND, gate.read_buf(&mut read)).await {}
        write.await.unwrap();
        assert!(notes.take().refused.is_none());
        // A long target needs no room in the parser.
        assert!(notes.take().target.is_some());
        assert!(matches!(notes.take().refused, Some(HeadError::NotFirst)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_becomes_a_request_that_the_service_refuses() {
        let good = "GET /a HTTP/1.1\r\n\r\n";
        for (bad, line) in [
            ("PUT /b HTTP/1.1\nx: y\n\n", "PUT /b HTTP/1.1\r\n"),
            ("PUT /b<> HTTP/1.1\r\n\r\n", "PUT / HTTP/1.1\r\n"),
        ] {
            let (read, notes) = through(format!("{good}{bad}{good}").as_bytes(), 4096).await;
            let read = String::from_utf8(read).unwrap();
            let rest = read.strip_prefix(good).unwrap();
            assert!(rest.starts_with(line) && rest.ends_with("connection: close\r\n\r\n"));
            assert_eq!(rest.matches("HTTP").count(), 1, "{rest}");
            assert_eq!(notes.len(), 2);
            assert!(notes[0].refused.is_none() && notes[1].refused.is_some());
        }
        let large = format!("GET /?{} HTTP/1.1\r\n\r\n", "a".repeat(head::MAX));
        let (_, notes) = through(large.as_bytes(), 4096).await;
        assert!(matches!(notes[0].refused, Some(HeadError::TooLarge)));
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_allowance_a_large_head_and_a_slow_one_are_answered() {
        let (mut near, mut far) = gate(false);
        let notes = far.notes();
        let large = format!("GET /?{} HTTP/1.1\r\n\r\n", "a".repeat(100_000));
        let (first, ()) = tokio::join!(far.first(SECOND, SECOND), async {
            let _ = timeout(SECOND, near.write_all(large.as_bytes())).await;
        });
        first.unwrap();
        assert!(matches!(notes.take().refused, Some(HeadError::Busy)));

        let (mut near, mut far) = gate(true);
        let notes = far.notes();
        near.write_all(b"GET / HT").await.unwrap();
        far.first(SECOND, SECOND).await.unwrap();
        assert!(matches!(notes.take().refused, Some(HeadError::Slow(_))));

        let (near, mut far) = gate(true);
        let idle = far.first(SECOND, SECOND).await;
        assert!(matches!(idle, Err(HeadError::Idle)));
        drop(near);
        let unused = far.first(SECOND, SECOND).await;
        assert!(matches!(unused, Err(HeadError::Unused)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_end_with_bytes_on_their_way_waits_for_them_and_no_longer_than_it_must() {
        let head = b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n";
        // A client that goes on sending until it reads the end.
        let (mut near, mut far) = gate(true);
        near.write_all(head).await.unwrap();
        far.first(SECOND, SECOND).await.unwrap();
        far.read_exact(&mut vec![0; head.len()]).await.unwrap();
        let client = tokio::spawn(async move {
            near.write_all(&vec![0; 1_000_000]).await.unwrap();
            near.read_to_end(&mut Vec::new()).await.unwrap();
        });
        far.shutdown().await.unwrap();
        client.await.unwrap();

        // One that does neither.
        let (mut near, mut far) = gate(true);
        near.write_all(head).await.unwrap();
        far.first(SECOND, SECOND).await.unwrap();
        let began = Instant::now();
        far.shutdown().await.unwrap();
        assert_eq!(began.elapsed(), LINGER);

        // One that has sent everything.
        let (mut near, mut far) = gate(true);
        let head = b"GET / HTTP/1.1\r\n\r\n";
        near.write_all(head).await.unwrap();
        far.first(SECOND, SECOND).await.unwrap();
        far.read_exact(&mut vec![0; head.len()]).await.unwrap();
        let began = Instant::now();
        far.shutdown().await.unwrap();
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
