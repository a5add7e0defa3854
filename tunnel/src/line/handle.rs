//! What keeps a line: sees its stream go and puts another one under it.
//!
//! The local proxy's keeper resumes ([`Handle::resume`]), the agent's is resumed
//! ([`Handle::resumed`]). Both first fence the stream that the line had, so that at no time two
//! streams count.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use crate::proto::line::resume::{ID_LEN, Key};
use crate::proto::line::silence::Action;
use crate::proto::line::{Header, Position, ResetCode, Violation, kind};
use crate::proto::messages::LineResumed;

use super::handshake::{self, Asked};
use super::{Core, LineError, Phase, Shared};

/// From RESUME to its answer, on a stream that the agent has just accepted.
const ANSWER: Duration = Duration::from_secs(5);

/// A way to keep a line that somebody else reads and writes.
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

/// Why an attempt to resume a line did not do it.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// The line has ended meanwhile.
    #[error("the line is over")]
    Over,
    /// It says so; a relay could have said it.
    #[error("the other end has no such line")]
    Gone,
    /// The stream was lost again, or somebody in between is not honest. Another may do.
    #[error("the stream was of no use: {0}")]
    Stream(#[from] LineError),
    #[error("the answer was not from the other end of the session")]
    Forged,
}

impl<S> Handle<S> {
    pub(super) fn new(shared: Arc<Shared<S>>) -> Self {
        Self { shared }
    }

    pub fn id(&self) -> &[u8] {
        &self.shared.id
    }

    /// How long the line may be without a stream.
    pub fn detached_life(&self) -> Duration {
        self.shared.detached
    }

    pub fn phase(&self) -> Phase {
        *self.shared.phase.borrow()
    }

    /// The same, to look at without keeping the line.
    pub fn phases(&self) -> watch::Receiver<Phase> {
        self.shared.phase.subscribe()
    }

    /// Why the line has ended, if it has and not well.
    pub fn failed(&self) -> Option<LineError> {
        self.shared.lock().failed.clone()
    }

    /// Bytes that had to be sent again so far.
    pub fn replayed(&self) -> u64 {
        self.shared.lock().machine.replayed()
    }

    /// Bytes kept until they are acknowledged.
    pub fn kept(&self) -> u64 {
        self.shared.lock().machine.kept()
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Handle<S> {
    /// Waits for a phase.
    pub async fn until(&self, wanted: impl FnMut(&Phase) -> bool) -> Phase {
        let mut phases = self.shared.phase.subscribe();
        let phase = phases.wait_for(wanted).await.map(|phase| *phase);
        // The sender is in `shared`.
        phase.unwrap_or_else(|_| self.phase())
    }

    /// The same for the one keeper that a line has. Meanwhile it moves what nobody else would: a
    /// line that was let go, and what is sent again.
    pub async fn keep_until(&self, wanted: impl FnMut(&Phase) -> bool) -> Phase {
        let mut phases = self.shared.phase.subscribe();
        let mut watching = std::pin::pin!(phases.wait_for(wanted));
        poll_fn(|cx| {
            self.shared.wakers.keeper.register(cx.waker());
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
        if core.let_go && !core.over {
            core.see_off(shared);
        } else if core.machine.is_replaying() {
            core.try_drain(shared);
            if !core.machine.is_replaying() {
                shared.publish(core);
            }
        }
    }

    /// The carrier below the stream of this epoch is known to be gone.
    pub fn cut(&self, epoch: u64) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() == epoch && core.stream.is_some() {
            // The error, if it is one, is the reader's.
            let _ = core.lose(shared, LineError::Cut);
        }
    }

    /// Asks the other end to resume the line elsewhere, if it is still on the stream of this epoch.
    pub fn ask_to_move(&self, epoch: u64) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() == epoch && core.stream.is_some() {
            core.machine.ask_to_move();
            let _ = core.poll_flush(shared);
        }
    }

    /// To be called some times a second: lets a line that rests be forgotten on the other side, and
    /// notices silence.
    pub fn look(&self, now: Instant) -> Action {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.stream.is_none() || core.over {
            return Action::Nothing;
        }
        let heard = core.machine.heard();
        if heard == core.seen {
            core.machine.acknowledge_all();
            core.machine.rest();
            if !core.grown.is_empty() && core.machine.shrink_window() {
                core.grown.clear();
            }
        }
        core.seen = heard;
        let outstanding = core.machine.outstanding();
        let action = core.silence.look(now, heard, outstanding);
        if action == Action::Probe {
            core.machine.ping();
        }
        if core.machine.has_frames() {
            let _ = core.poll_flush(shared);
        }
        action
    }

    /// Ends the line with an error that its reader and writer get.
    pub fn give_up(&self, error: LineError) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        core.fail(shared, error);
        core.stream = None;
    }

    /// Ends the line and tells the other end, as well as can be, so that it waits for nobody.
    pub fn abandon(&self) {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if !core.over {
            core.abandon(shared);
            core.fail(shared, LineError::Cut);
        }
    }

    /// Takes the line up on a stream that the agent has accepted, as the local proxy. The stream
    /// that it had is no more, whatever comes of it.
    ///
    /// # Errors
    /// All but [`ResumeError::Over`] leave the line without a stream, to be tried again.
    pub async fn resume(&self, mut stream: S) -> Result<(), ResumeError> {
        let (key, epoch, at) = self.begin().ok_or(ResumeError::Over)?;
        let asked = key.ask(&self.shared.id, epoch, rand::random(), at);
        let exchange = async {
            handshake::send(&mut stream, kind::RESUME, epoch, &asked).await?;
            match handshake::head(&mut stream).await? {
                (
                    Header::Ok {
                        epoch: answered,
                        len,
                    },
                    _,
                ) => {
                    let answer: LineResumed = handshake::body(&mut stream, len).await?;
                    let is_honest = answered == epoch && key.has_answered(&asked, &answer, epoch);
                    match is_honest {
                        true => Ok(Position::from(&answer)),
                        false => Err(ResumeError::Forged),
                    }
                }
                (Header::Gone { len, .. }, _) => {
                    // The word alone counts; what else it says is nobody's that we know.
                    let _ = handshake::text(&mut stream, len).await;
                    Err(ResumeError::Gone)
                }
                (_, kind) => Err(LineError::from(Violation::OutOfPlace(kind)).into()),
            }
        };
        let at = match tokio::time::timeout(ANSWER, exchange).await {
            Ok(answered) => answered?,
            Err(_) => return Err(LineError::Timeout.into()),
        };
        self.attach(epoch, at, stream)
    }

    fn begin(&self) -> Option<(Key, u64, Position)> {
        let core = &mut *self.shared.lock();
        if core.over {
            return None;
        }
        let key = core.key.clone()?;
        let epoch = core.machine.epoch() + 1;
        Some((key, epoch, self.fence(core, epoch)?))
    }

    /// Takes the line from the stream that it has; where it stands then.
    fn fence(&self, core: &mut Core<S>, epoch: u64) -> Option<Position> {
        let at = core.machine.fence(epoch)?;
        core.stream = None;
        self.shared.publish(core);
        Some(at)
    }

    /// Lets whoever asks take the line up, as the agent, if he proves that he may. Gives back the
    /// epoch that the line is now in.
    ///
    /// # Errors
    /// The asker may not, or the line is over: he is told the same, and the line stays as it was.
    /// An error of the stream leaves the line without one.
    pub async fn resumed(&self, asked: Asked<S>) -> Result<u64, ResumeError> {
        let Asked { epoch, .. } = asked;
        let Some((key, at)) = self.admit(&asked) else {
            asked.gone().await;
            return Err(ResumeError::Forged);
        };
        let Asked {
            message,
            mut stream,
            ..
        } = asked;
        let nonce: [u8; ID_LEN] = rand::random();
        let answer = key.answer(&message, epoch, nonce, at);
        let sent = handshake::send(&mut stream, kind::OK, epoch, &answer);
        match tokio::time::timeout(ANSWER, sent).await {
            Ok(sent) => sent?,
            Err(_) => return Err(LineError::Timeout.into()),
        }
        self.attach(epoch, Position::from(&message), stream)?;
        Ok(epoch)
    }

    fn admit(&self, asked: &Asked<S>) -> Option<(Key, Position)> {
        let core = &mut *self.shared.lock();
        let key = core.key.clone().filter(|_| !core.over)?;
        let is_his =
            asked.message.line_id == self.shared.id && key.has_asked(&asked.message, asked.epoch);
        if !is_his {
            return None;
        }
        Some((key, self.fence(core, asked.epoch)?))
    }

    fn attach(&self, epoch: u64, at: Position, stream: S) -> Result<(), ResumeError> {
        let shared = &*self.shared;
        let core = &mut *shared.lock();
        if core.machine.epoch() != epoch || core.over {
            // Another attempt has fenced this one, or the line has ended.
            return Err(ResumeError::Over);
        }
        if let Err(violation) = core.machine.attach(epoch, at) {
            // It was proven to be from the other end, so that one has lost its way.
            core.machine
                .reset(ResetCode::Protocol, &violation.to_string());
            return Err(core.fail(shared, violation.into()).into());
        }
        core.stream = Some(stream);
        core.silence.moved();
        core.growth.moved();
        core.is_blocked = false;
        let _ = core.poll_flush(shared);
        shared.publish(core);
        shared.wake_all();
        shared.wakers.keeper.wake();
        Ok(())
    }
}
