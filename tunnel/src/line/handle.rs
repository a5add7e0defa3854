//! For the supervisor of a line: observes the loss of a stream and attaches another one.
//!
//! The local proxy sends a RESUME ([`Handle::resume`]), the agent accepts it ([`Handle::accept_resume`]).
//! Both first fence off the stream that the line had, so that at no time two streams count.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::proto::line::resume::{ID_LEN, Key};
use crate::proto::line::stall_detector::Action;
use crate::proto::line::{Header, Position, ResetCode, Violation, kind};
use crate::proto::messages::LineResumed;

use super::handshake::{self, ResumeRequest};
use super::state::{Core, Owner, Phase, Shared};
use super::{Line, LineError};

/// Longest exchange of RESUME and its answer, on a stream that the agent has just accepted.
const EXCHANGE: Duration = Duration::from_secs(5);

/// A handle on a line whose reader and writer are elsewhere.
pub struct Handle<S> {
    shared: Arc<Shared<S>>,
}

impl<S> Clone for Handle<S> {
    fn clone(&self) -> Self {
        Self {
            shared: self.shared.clone(),
        }
    }
}

/// Why a line was not resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The line has ended meanwhile.
    #[error("the line is over")]
    Over,
    /// Unverified: a relay could have sent this answer.
    #[error("the other end has no such line")]
    Gone,
    /// The stream was lost again, or an intermediary altered it. Another stream may work.
    #[error("the stream was of no use: {0}")]
    Stream(#[from] LineError),
    /// The answer's MAC is invalid.
    #[error("the answer was not from the other end of the session")]
    Forged,
}

impl<S> Core<S> {
    /// The key by which ends prove themselves, as long as there is a line to prove it for.
    fn resume_key(&self) -> Option<&Key> {
        self.key.as_ref().filter(|_| !self.lifecycle.is_over())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Line<S> {
    /// For the supervisor of an armed line that can be resumed.
    pub fn handle(&self) -> Option<Handle<S>> {
        let may_resume = self.shared.lock().may_resume();
        (may_resume && self.is_resumable()).then(|| Handle::new(self.shared.clone()))
    }

    /// [Ends](Handle::end) the line from elsewhere, also one that cannot be resumed.
    pub fn ender(&self) -> Handle<S> {
        Handle::new(self.shared.clone())
    }
}

impl<S> Handle<S> {
    fn new(shared: Arc<Shared<S>>) -> Self {
        Self { shared }
    }

    /// The line's id.
    pub fn id(&self) -> &[u8] {
        &self.shared.id
    }

    /// How long the line may be without a stream.
    pub fn detached_life(&self) -> Duration {
        self.shared.detached
    }

    /// The line's present phase.
    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// The same, to look at without keeping the line.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.shared.phase.subscribe()
    }

    /// The error that ended the line, if one did.
    pub fn failure(&self) -> Option<LineError> {
        self.shared.lock().lifecycle.failure().cloned()
    }

    /// A MAC by which the other end verifies that this end presents the certificate with this SHA-256
    /// fingerprint for the line; `None` for a line that is over.
    pub fn sign_credential(&self, fingerprint: &[u8; 32]) -> Option<Vec<u8>> {
        let core = self.shared.lock();
        let key = core.resume_key()?;
        Some(key.sign_credential(&self.shared.id, fingerprint))
    }

    /// Whether that MAC is valid, at the other end.
    pub fn verify_credential(&self, fingerprint: &[u8; 32], mac: &[u8]) -> bool {
        let core = self.shared.lock();
        let key = core.resume_key();
        key.is_some_and(|key| key.verify_credential(&self.shared.id, fingerprint, mac))
    }

    /// Bytes that had to be sent again so far.
    pub fn retransmitted(&self) -> u64 {
        self.shared.lock().machine.retransmitted()
    }

    /// Bytes kept until they are acknowledged.
    pub fn buffered(&self) -> u64 {
        self.shared.lock().machine.buffered()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Handle<S> {
    /// Waits for a phase.
    pub async fn wait_until(&self, wanted: impl FnMut(&Phase) -> bool) -> Phase {
        let mut phases = self.shared.phase.subscribe();
        let phase = phases.wait_for(wanted).await.map(|phase| *phase);
        // The sender is in `shared`.
        phase.unwrap_or_else(|_| self.phase())
    }

    /// The same for the one supervisor that a line has. Meanwhile it drives what no reader or writer
    /// would: a line without an owner, and a retransmission.
    pub async fn drive_until(&self, wanted: impl FnMut(&Phase) -> bool) -> Phase {
        let mut phases = self.shared.phase.subscribe();
        let mut watching = std::pin::pin!(phases.wait_for(wanted));
        poll_fn(|cx| {
            self.shared.wakers.supervisor.register(cx.waker());
            self.drive();
            watching.as_mut().poll(cx)
        })
        .await
        // The sender is in `shared`.
        .map_or_else(|_| self.phase(), |phase| *phase)
    }

    fn drive(&self) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.owner == Owner::Released && !core.lifecycle.is_over() {
            core.drain(shared);
        } else if core.machine.is_retransmitting() {
            // The reader and the writer may both be blocked on kubectl, while the peer waits for
            // these bytes.
            core.try_drain(shared);
            if !core.machine.is_retransmitting() {
                shared.publish(core);
            }
        }
    }

    /// The carrier below the stream of this epoch is known to be gone.
    pub fn detach(&self, epoch: u64) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() == epoch && core.stream.is_some() {
            // If that fails the line, its reader and writer get the error.
            let _ = core.on_stream_lost(shared, LineError::Cut);
        }
    }

    /// Asks the other end to resume the line elsewhere, if it is still on the stream of this epoch.
    pub fn request_move(&self, epoch: u64) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() == epoch && core.stream.is_some() {
            core.machine.request_move();
            let _ = core.poll_flush(shared);
        }
    }

    /// To be called a few times a second: acknowledges everything and frees memory on an idle line,
    /// classifies it by the bytes that it moves, and detects a stalled path.
    pub fn tick(&self, now: Instant) -> Action {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.stream.is_none() || core.lifecycle.is_over() {
            return Action::Nothing;
        }
        let received = core.machine.received();
        let class = core.traffic.class();
        let moved = match &core.traffic_source {
            Some(bytes) => bytes.load(Ordering::Relaxed),
            None => received + core.machine.sent(),
        };
        if core.traffic.observe(now, moved) != class {
            shared.publish(core);
        }
        // On an idle line an ACK delays no bulk, and lets the peer free its send buffer.
        if received == core.last_received {
            core.machine.acknowledge_all();
            core.machine.release_memory();
            // The growth is taken from a budget that all lines share.
            if core.memory.has_grown_window() && core.machine.shrink_window() {
                core.memory.release_window_growth();
            }
        }
        core.last_received = received;
        let unanswered = core.machine.unanswered();
        let action = core.stall_detector.check(now, received, unanswered);
        if action == Action::Probe {
            core.machine.ping();
        }
        if core.machine.has_frames() {
            let _ = core.poll_flush(shared);
        }
        action
    }

    /// Classifies the line by this count instead of all its bytes, where its owner can tell bulk from many
    /// small messages.
    pub fn classify_by(&self, bytes: Arc<AtomicU64>) {
        self.shared.lock().traffic_source = Some(bytes);
    }

    /// Ends the line with an error that its reader and writer get.
    pub fn give_up(&self, error: LineError) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        core.fail(shared, error);
        core.stream = None;
    }

    /// Ends the line with a RESET, best effort, so that the other end does not wait for a resumption.
    pub fn abandon(&self) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if !core.lifecycle.is_over() {
            core.reset_and_leave(shared);
            core.fail(shared, LineError::Cut);
        }
    }

    /// Ends the line because this process stops: with a RESET of that reason, behind everything that
    /// was written.
    pub fn stop(&self) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if !core.lifecycle.is_over() {
            core.reset_with_and_leave(shared, ResetCode::Stopped);
            core.fail(shared, LineError::Cut);
        }
    }

    /// Ends the line at once, with a RESET of this reason, best effort; data still on its way is lost.
    pub fn end(&self, code: ResetCode, reason: &str) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if !core.lifecycle.is_over() {
            core.machine.reset(code, reason);
            core.try_drain(shared);
            core.leave(shared);
            core.fail(shared, LineError::Cut);
        }
    }

    /// Local proxy side: resumes the line on a stream that the agent has accepted. The stream that it
    /// had is dropped, whatever the outcome.
    ///
    /// # Errors
    /// All but [`ResumeError::Over`] leave the line without a stream, to be tried again.
    pub async fn resume(&self, mut stream: S) -> Result<(), ResumeError> {
        // Fences off the old stream first: a byte that is read from it later would make the
        // position in RESUME false.
        let (key, epoch, at) = self.begin().ok_or(ResumeError::Over)?;
        let resume = key.sign_resume(&self.shared.id, epoch, rand::random(), at);
        let exchange = async {
            handshake::send(&mut stream, kind::RESUME, epoch, &resume).await?;
            match handshake::head(&mut stream).await? {
                (
                    Header::Ok {
                        epoch: answered,
                        len,
                    },
                    _,
                ) => {
                    let answer: LineResumed = handshake::body(&mut stream, len).await?;
                    // The MAC covers both nonces, so a relay cannot replay the OK of an earlier
                    // attempt.
                    if answered == epoch && key.verify_resumed(&resume, &answer, epoch) {
                        Ok(Position::from(&answer))
                    } else {
                        Err(ResumeError::Forged)
                    }
                }
                (Header::Gone { len, .. }, _) => {
                    // The reason is read and ignored: its sender is not authenticated.
                    let _ = handshake::text(&mut stream, len).await;
                    Err(ResumeError::Gone)
                }
                (_, kind) => Err(LineError::from(Violation::OutOfPlace(kind)).into()),
            }
        };
        let at = match tokio::time::timeout(EXCHANGE, exchange).await {
            Ok(answered) => answered?,
            Err(_) => return Err(LineError::Timeout.into()),
        };
        self.attach(epoch, at, stream)
    }

    fn begin(&self) -> Option<(Key, u64, Position)> {
        let core = &mut *self.shared.lock();
        let key = core.resume_key()?.clone();
        let epoch = core.machine.epoch() + 1;
        Some((key, epoch, self.fence(core, epoch)?))
    }

    /// Drops the stream that the line has; its position then.
    fn fence(&self, core: &mut Core<S>, epoch: u64) -> Option<Position> {
        let at = core.machine.fence(epoch)?;
        core.stream = None;
        core.autotune
            .on_stream_lost(tokio::time::Instant::now().into_std());
        self.shared.publish(core);
        Some(at)
    }

    /// Agent side: accepts a RESUME that carries a valid MAC, and returns the new epoch.
    ///
    /// # Errors
    /// The MAC is invalid, or the line is over: the answer does not tell which, and the line stays as
    /// it was. An error of the stream leaves the line without one.
    pub async fn accept_resume(&self, request: ResumeRequest<S>) -> Result<u64, ResumeError> {
        let ResumeRequest { epoch, .. } = request;
        let Some((key, at)) = self.verify(&request) else {
            request.reject().await;
            return Err(ResumeError::Forged);
        };
        let ResumeRequest {
            message,
            mut stream,
            ..
        } = request;
        let nonce: [u8; ID_LEN] = rand::random();
        let answer = key.sign_resumed(&message, epoch, nonce, at);
        let sent = handshake::send(&mut stream, kind::OK, epoch, &answer);
        match tokio::time::timeout(EXCHANGE, sent).await {
            Ok(sent) => sent?,
            Err(_) => return Err(LineError::Timeout.into()),
        }
        // Behind OK: frames of a line that is attached earlier could overtake it on the stream.
        self.attach(epoch, Position::from(&message), stream)?;
        Ok(epoch)
    }

    fn verify(&self, request: &ResumeRequest<S>) -> Option<(Key, Position)> {
        let core = &mut *self.shared.lock();
        let key = core.resume_key()?.clone();
        let is_valid = request.message.line_id == self.shared.id
            && key.verify_resume(&request.message, request.epoch);
        if !is_valid {
            return None;
        }
        // Only behind a valid MAC: an unauthenticated RESUME must not cost the line its stream.
        Some((key, self.fence(core, request.epoch)?))
    }

    fn attach(&self, epoch: u64, at: Position, stream: S) -> Result<(), ResumeError> {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() != epoch || core.lifecycle.is_over() {
            // Another attempt has fenced this one off, or the line has ended.
            return Err(ResumeError::Over);
        }
        if let Err(violation) = core.machine.attach(epoch, at) {
            // The position was authenticated, so the other end itself is at fault.
            core.machine
                .reset(ResetCode::Protocol, &violation.to_string());
            return Err(core.fail(shared, violation.into()).into());
        }
        core.stream = Some(stream);
        core.stall_detector.on_new_stream();
        core.autotune
            .on_new_stream(tokio::time::Instant::now().into_std());
        core.writer_waits = false;
        let _ = core.poll_flush(shared);
        shared.publish(core);
        shared.wake_all();
        shared.wakers.supervisor.wake();
        Ok(())
    }
}
