//! The line: a byte stream between a local proxy and an agent that knows its own end, and that
//! outlives the stream that carries it.
//!
//! A line has no task. Reading and writing each drive what they need: a reader sends
//! acknowledgements, a writer without room takes in acknowledgements. The two may be in different
//! tasks; the stream below is polled with a waker that wakes both, so that neither takes the
//! other's.
//!
//! Small writes are gathered into one DATA frame until a flush, a full frame, or pressure.
//! What may be unacknowledged is bounded ([`WINDOW`](crate::proto::line::WINDOW)), and the receiver acknowledges
//! what was read, not what arrived: a reader that stops holds up its writer, from end to end. On a
//! long path the bound grows, within what all lines of the process may have together.
//!
//! A line that was [armed](Line::arm) does not end with its stream: reads wait, writes fill the
//! window, and whoever holds a [`Handle`] puts another stream under it.

mod error;
mod handle;
mod handshake;

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::task::{ArcWake, AtomicWaker, waker_ref};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::watch;
use tokio_util::io::poll_read_buf;

use crate::piece::SEALED;
use crate::proto::line::WINDOW;
use crate::proto::line::growth::Growth;
use crate::proto::line::machine::{Ended, Machine, Read};
use crate::proto::line::resume::Key;
use crate::proto::line::silence::Silence;
use crate::splice::{Budget, Grant};

pub use error::LineError;
pub use handle::{Handle, ResumeError};
pub use handshake::{Accepted, Asked, accept, connect};

/// Longest exchange of hellos.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// Streams that a line lets go because frames on them were out of order. After as many, the other
/// end is not what it should be.
const FORGIVEN: u32 = 8;

/// Bytes by which the windows of all lines of a process may have outgrown the first ones: 64 MiB.
/// That is how much more than a window each they may have to keep for peers that stopped reading.
static GROWN: LazyLock<Budget> = LazyLock::new(|| Budget::new(64 << 20));

/// Bytes that all lines of a process may have set aside, beyond a first window each, for writers
/// that wait for acknowledgements behind them: 64 MiB. A peer may send as much as it was told it
/// may, but none of ours sends more than a window that nobody reads.
static ASIDE: LazyLock<Budget> = LazyLock::new(|| Budget::new(64 << 20));

/// What is taken of [`ASIDE`] at once.
const ASIDE_STEP: usize = 256 * 1024;

/// Bytes asked of the stream at once.
const READ: usize = SEALED;

/// A line. A clean end (`Ok` with nothing read) means that the peer said FIN and every byte before
/// it was read; anything else is an error of kind `ConnectionReset` with a [`LineError`] inside.
/// `shutdown` says FIN; dropping without it says RESET, as well as can be. What was written before
/// either still arrives when an armed line is dropped, as long as somebody holds its [`Handle`].
pub struct Line<S: AsyncRead + AsyncWrite + Unpin> {
    shared: Arc<Shared<S>>,
}

/// What a line and its handles share.
struct Shared<S> {
    id: Vec<u8>,
    /// How long the line may be without a stream; zero: not at all.
    detached: Duration,
    core: Mutex<Core<S>>,
    wakers: Arc<Wakers>,
    phase: watch::Sender<Phase>,
}

/// Where a line is in its life, for those who keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// How often the line was given another stream, or was to be given one.
    pub epoch: u64,
    /// It has a stream.
    pub attached: bool,
    /// The other end asks that it be resumed elsewhere, for this way is to end.
    pub asked_to_move: bool,
    /// Whoever read and wrote has gone; what was said is still on its way.
    pub let_go: bool,
    /// There is nothing left to resume.
    pub over: bool,
}

struct Core<S> {
    stream: Option<S>,
    machine: Machine,
    failed: Option<LineError>,
    key: Option<Key>,
    silence: Silence,
    growth: Growth,
    grown: Vec<Grant>,
    aside: Vec<Grant>,
    /// The stream's end was said below.
    shut: bool,
    let_go: bool,
    over: bool,
    /// A writer waits for room.
    is_blocked: bool,
    /// Heard at the last look.
    seen: u64,
    /// Streams that were let go for what came on them.
    forgiven: u32,
}

/// Wakes the reader and the writer of one line, and its keeper where that has to move it.
#[derive(Default)]
struct Wakers {
    reader: AtomicWaker,
    writer: AtomicWaker,
    keeper: AtomicWaker,
    keeper_drives: AtomicBool,
}

impl ArcWake for Wakers {
    fn wake_by_ref(wakers: &Arc<Self>) {
        wakers.reader.wake();
        wakers.writer.wake();
        if wakers.keeper_drives.load(Ordering::Acquire) {
            wakers.keeper.wake();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> std::fmt::Debug for Line<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Line")
            .field("phase", &*self.shared.phase.borrow())
            .finish_non_exhaustive()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    fn new(stream: S, id: Vec<u8>, window: u32, peer_window: u32, detached: Duration) -> Self {
        let machine = Machine::new(window, peer_window, !detached.is_zero());
        Self {
            shared: Arc::new(Shared {
                id,
                detached,
                wakers: Arc::default(),
                phase: watch::Sender::new(Phase {
                    epoch: 0,
                    attached: true,
                    asked_to_move: false,
                    let_go: false,
                    over: false,
                }),
                core: Mutex::new(Core {
                    stream: Some(stream),
                    machine,
                    failed: None,
                    key: None,
                    silence: Silence::default(),
                    growth: Growth::default(),
                    grown: Vec::new(),
                    aside: Vec::new(),
                    shut: false,
                    let_go: false,
                    over: false,
                    is_blocked: false,
                    seen: 0,
                    forgiven: 0,
                }),
            }),
        }
    }

    /// The id that the local proxy gave this line.
    pub fn id(&self) -> &[u8] {
        &self.shared.id
    }

    /// Both ends have agreed that the line may be without a stream for a while.
    pub fn is_resumable(&self) -> bool {
        !self.shared.detached.is_zero()
    }

    /// From now on a lost stream is not the end, if both sides have agreed on that. The key is what
    /// the session on this line gave to both ends; before it is there, nobody could prove that he
    /// may resume the line.
    pub fn arm(&self, key: Key) {
        self.shared.lock().key = Some(key);
    }

    /// What keeps the line, for one that was armed and may be resumed.
    pub fn handle(&self) -> Option<Handle<S>> {
        let may_resume = self.shared.lock().may_resume();
        (may_resume && self.is_resumable()).then(|| Handle::new(self.shared.clone()))
    }
}

impl<S> Shared<S> {
    fn lock(&self) -> MutexGuard<'_, Core<S>> {
        // Nothing under this lock can panic half-way through a change.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the keeper what has changed.
    fn publish(&self, core: &Core<S>) {
        let drives = core.let_go || core.machine.is_replaying();
        self.wakers.keeper_drives.store(drives, Ordering::Release);
        let phase = Phase {
            epoch: core.machine.epoch(),
            attached: core.stream.is_some(),
            asked_to_move: core.machine.asked_to_move(),
            let_go: core.let_go,
            over: core.over,
        };
        self.phase.send_if_modified(|known| {
            let changed = *known != phase;
            *known = phase;
            changed
        });
    }

    fn wake_all(&self) {
        self.wakers.reader.wake();
        self.wakers.writer.wake();
    }
}

impl<S> Core<S> {
    fn may_resume(&self) -> bool {
        self.key.is_some() && self.machine.is_resumable() && !self.over && self.failed.is_none()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Core<S> {
    fn fail(&mut self, shared: &Shared<S>, error: LineError) -> LineError {
        if let Some(failed) = &self.failed {
            return failed.clone();
        }
        self.failed = Some(error.clone());
        if self.machine.ended().is_some() {
            // The RESET that says why.
            let _ = self.poll_drain(shared);
        }
        self.end(shared);
        shared.wake_all();
        error
    }

    /// Nothing is left to resume.
    fn end(&mut self, shared: &Shared<S>) {
        if !self.over {
            self.over = true;
            shared.publish(self);
        }
    }

    /// Frames came that may not come. Whoever carries the stream may be at fault as well as the
    /// other end, so a line that can be resumed lets go of the stream. `Ok`: it goes on without it.
    fn broke(&mut self, shared: &Shared<S>, ended: Ended) -> Result<(), LineError> {
        let is_forgiven = self.may_resume() && self.forgiven < FORGIVEN && self.machine.forgive();
        if !is_forgiven {
            return Err(self.fail(shared, ended.into()));
        }
        tracing::debug!(?ended, "a line lets go of a stream that is out of order");
        self.forgiven += 1;
        self.stream = None;
        shared.publish(self);
        Ok(())
    }

    /// The stream is lost. `Ok`: the line goes on without it.
    fn lose(&mut self, shared: &Shared<S>, error: LineError) -> Result<(), LineError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        if self.over {
            self.stream = None;
            return Ok(());
        }
        if self.may_resume() {
            self.take_rest(shared);
            self.machine.detach();
        } else {
            // The peer's RESET, when it is there, says more than the broken stream.
            while let Ok(true) = self.machine.take_in() {}
        }
        if let Some(ended) = self.machine.ended().cloned() {
            return self.broke(shared, ended);
        }
        if !self.may_resume() {
            return Err(self.fail(shared, error));
        }
        self.stream = None;
        shared.publish(self);
        shared.wakers.reader.wake();
        Ok(())
    }

    /// A stream that takes nothing more may still have something to give, which the peer need not
    /// send again, or no longer can. At most a window.
    fn take_rest(&mut self, shared: &Shared<S>) {
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        while let Some(stream) = &mut self.stream {
            let input = self.machine.input();
            input.reserve(READ);
            let Poll::Ready(Ok(n @ 1..)) = poll_read_buf(Pin::new(stream), cx, input) else {
                return;
            };
            self.machine.on_input(n);
            while let Ok(true) = self.machine.take_in() {}
            if self.machine.ended().is_some() {
                return;
            }
        }
    }

    /// Hands down what waits. The caller has registered its waker. Without a stream, what was
    /// written is kept, and that is all that can be done for it.
    fn poll_drain(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        loop {
            let Some(chunk) = self.machine.chunk() else {
                return Poll::Ready(Ok(()));
            };
            let Some(stream) = &mut self.stream else {
                return Poll::Ready(Ok(()));
            };
            match ready!(Pin::new(stream).poll_write(cx, chunk)) {
                Ok(0) => return Poll::Ready(self.lose(shared, LineError::Cut)),
                Ok(n) => self.machine.on_written(n),
                Err(error) => return Poll::Ready(self.lose(shared, error::lost(error))),
            }
        }
    }

    /// As much as goes without waiting.
    fn try_drain(&mut self, shared: &Shared<S>) {
        let _ = self.poll_drain(shared);
    }

    /// Reads more of the stream. Pending also while there is none.
    fn poll_fill(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        if let Some(failed) = &self.failed {
            return Poll::Ready(Err(failed.clone()));
        }
        let Some(stream) = &mut self.stream else {
            return Poll::Pending;
        };
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        let input = self.machine.input();
        input.reserve(READ);
        let error = match ready!(poll_read_buf(Pin::new(stream), cx, input)) {
            Ok(0) if self.machine.is_delivered() && self.machine.has_peer_ended() => {
                self.stream = None;
                self.end(shared);
                return Poll::Pending;
            }
            Ok(0) => LineError::Cut,
            Ok(n) => {
                self.machine.on_input(n);
                return Poll::Ready(Ok(()));
            }
            Err(error) => error::lost(error),
        };
        match self.lose(shared, error) {
            Ok(()) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error)),
        }
    }

    /// What frames that were taken in mean to others.
    fn notice(&mut self, shared: &Shared<S>) {
        if self.growth.awaits(self.machine.acked()) {
            self.may_grow();
        }
        if self.machine.aside() == 0 {
            self.aside.clear();
        }
        if self.is_blocked && self.machine.has_room() {
            self.is_blocked = false;
            shared.wakers.writer.wake();
        }
        if self.machine.asked_to_move() && !shared.phase.borrow().asked_to_move {
            shared.publish(self);
        }
    }

    fn may_grow(&mut self) {
        let acked = self.machine.acked();
        let by = match self.growth.on_acknowledged(Instant::now(), acked) {
            true => self.machine.may_grow(),
            false => 0,
        };
        self.grow(by);
    }

    /// If there is something left of what all lines may have.
    fn grow(&mut self, by: u64) {
        if by > 0
            && let Some(grant) = GROWN.take(by)
        {
            self.machine.grow(by);
            self.grown.push(grant);
            self.growth
                .on_grown(self.grown.iter().map(Grant::bytes).sum());
        }
    }

    /// Whether more may be set aside for a reader that does not come for it.
    fn may_set_aside(&mut self) -> bool {
        let beyond = self.machine.aside().saturating_sub(WINDOW as usize);
        while beyond > self.aside.len() * ASIDE_STEP {
            match ASIDE.take(ASIDE_STEP as u64) {
                Some(grant) => self.aside.push(grant),
                None => return false,
            }
        }
        true
    }

    /// For a writer without room: takes frames in until an acknowledgement makes some.
    fn poll_room(&mut self, shared: &Shared<S>) -> Poll<Result<(), LineError>> {
        loop {
            if self.machine.has_room() {
                return Poll::Ready(Ok(()));
            }
            if !self.may_set_aside() {
                // Until the reader has taken some of it, and what stands behind it.
                self.is_blocked = true;
                return Poll::Pending;
            }
            let moved = match self.machine.take_in() {
                Ok(moved) => moved,
                Err(ended) => {
                    self.broke(shared, ended)?;
                    continue;
                }
            };
            if moved {
                self.notice(shared);
                if self.machine.has_waiting() {
                    shared.wakers.reader.wake();
                }
                continue;
            }
            // The peer can only acknowledge what has left.
            if let Poll::Ready(Err(error)) = self.poll_drain(shared) {
                return Poll::Ready(Err(error));
            }
            self.is_blocked = true;
            ready!(self.poll_fill(shared))?;
        }
    }

    fn write_error(&self) -> Option<io::Error> {
        match &self.failed {
            Some(failed) => Some(failed.clone().into()),
            None if self.machine.fin_said() => Some(io::ErrorKind::BrokenPipe.into()),
            None => None,
        }
    }

    fn poll_append(
        &mut self,
        shared: &Shared<S>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Some(error) = self.write_error() {
            return Poll::Ready(Err(error));
        }
        if bufs.iter().all(|buf| buf.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        if !self.machine.has_room() {
            self.growth.on_used();
            ready!(self.poll_room(shared))?;
        }
        if self.machine.is_corked() {
            ready!(self.poll_drain(shared))?;
        }
        let mut taken = 0;
        for buf in bufs {
            let n = self.machine.write(buf);
            taken += n;
            if n < buf.len() {
                break;
            }
        }
        if self.machine.is_window_half_used() {
            self.growth.on_used();
            if self.grown.is_empty() {
                self.grow(self.growth.proven());
            }
        }
        if self.growth.wants_sample() {
            self.growth.on_sent(Instant::now(), self.machine.sent());
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(&mut self, shared: &Shared<S>) -> Poll<io::Result<()>> {
        if let Some(failed) = &self.failed {
            return Poll::Ready(Err(failed.clone().into()));
        }
        ready!(self.poll_drain(shared))?;
        let Some(stream) = &mut self.stream else {
            return Poll::Ready(Ok(()));
        };
        let waker = waker_ref(&shared.wakers);
        let cx = &mut Context::from_waker(&waker);
        match ready!(Pin::new(stream).poll_flush(cx)) {
            Ok(()) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(self.lose(shared, error::lost(error)).map_err(Into::into)),
        }
    }

    /// Ends the stream below, once both sides have said their end and all has left.
    fn finish(&mut self, shared: &Shared<S>) {
        if self.machine.is_settled() && !self.shut {
            if let Some(stream) = &mut self.stream {
                let waker = waker_ref(&shared.wakers);
                let cx = &mut Context::from_waker(&waker);
                self.shut = Pin::new(stream).poll_shutdown(cx).is_ready();
            } else {
                self.shut = true;
            }
            if self.shut {
                self.end(shared);
            }
        }
    }

    /// Moves a line that nobody reads or writes any more: until the peer has all that was said.
    fn see_off(&mut self, shared: &Shared<S>) {
        loop {
            loop {
                match self.machine.take_in_and_drop() {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(ended) => {
                        // Gone on without it, or over.
                        let _ = self.broke(shared, ended);
                        self.stream = None;
                        return;
                    }
                }
            }
            self.notice(shared);
            self.machine.acknowledge_all();
            self.try_drain(shared);
            let is_said = self.machine.is_delivered() && !self.machine.has_peer_ended();
            let is_abandoned = self.machine.is_abandoned() && !self.owes(shared);
            if is_said {
                self.abandon(shared);
                return;
            }
            if is_abandoned {
                self.leave(shared);
                return;
            }
            self.finish(shared);
            if self.over {
                self.stream = None;
                return;
            }
            match self.poll_fill(shared) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) | Poll::Pending => return,
            }
        }
    }

    /// Something that was written has still to be handed down, or may have to be once more.
    fn owes(&mut self, shared: &Shared<S>) -> bool {
        self.try_drain(shared);
        let is_to_leave = self.stream.is_some() && self.machine.has_output();
        is_to_leave || (self.may_resume() && self.machine.kept() > 0)
    }

    /// Says RESET, as well as can be, and nothing more.
    fn abandon(&mut self, shared: &Shared<S>) {
        self.machine.abandon();
        self.try_drain(shared);
        self.leave(shared);
    }

    /// Lets go of the stream, with a line that has said all it will.
    fn leave(&mut self, shared: &Shared<S>) {
        if let Some(mut stream) = self.stream.take() {
            let waker = waker_ref(&shared.wakers);
            let _ = Pin::new(&mut stream).poll_flush(&mut Context::from_waker(&waker));
        }
        self.end(shared);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Line<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let shared = &*self.shared;
        shared.wakers.reader.register(cx.waker());
        let core = &mut *shared.lock();
        loop {
            let read = core.machine.read(buf);
            core.notice(shared);
            match read {
                Ok(Read::Bytes(_) | Read::End) => {
                    // A reader may be the only one that moves this line.
                    if core.machine.has_frames() {
                        core.try_drain(shared);
                    }
                    core.finish(shared);
                    return Poll::Ready(Ok(()));
                }
                Ok(Read::Empty) => {}
                Err(ended) => core.broke(shared, ended)?,
            }
            if core.machine.has_frames() {
                core.try_drain(shared);
            }
            core.machine.shrink();
            ready!(core.poll_fill(shared))?;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Line<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        shared.lock().poll_append(shared, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        shared.lock().poll_flush(shared)
    }

    /// Says FIN. The other direction goes on.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shared = &*self.shared;
        shared.wakers.writer.register(cx.waker());
        let core = &mut *shared.lock();
        if !core.machine.fin_said() {
            if let Some(failed) = &core.failed {
                return Poll::Ready(Err(failed.clone().into()));
            }
            core.machine.finish();
        }
        if core.shut {
            return Poll::Ready(Ok(()));
        }
        ready!(core.poll_flush(shared))?;
        core.finish(shared);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Drop for Line<S> {
    fn drop(&mut self) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        core.let_go = true;
        let is_over = core.over || core.failed.is_some();
        let is_said = core.machine.fin_said() && core.machine.has_peer_ended();
        let is_kept = core.may_resume() && Arc::strong_count(&self.shared) > 1;
        if is_over || (is_said && !core.may_resume()) {
            core.try_drain(shared);
            core.finish(shared);
            core.stream = None;
            core.end(shared);
            return;
        }
        if !core.machine.fin_said() {
            core.machine.abandon();
        }
        if is_kept && (core.machine.fin_said() || core.owes(shared)) {
            // What was said before the end is still to arrive: the keeper sees to it.
            shared.publish(core);
            shared.wakers.keeper.wake();
        } else {
            core.abandon(shared);
        }
    }
}
