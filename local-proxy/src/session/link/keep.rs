//! The keeper of one line: puts another stream under it when its own is lost, before it is lost
//! where that can be known, and when nothing is heard on it any more.

use super::{Link, State, open_error};
use crate::metrics::Held;
use std::sync::Arc;
use std::time::Duration;
use throwline_tunnel::{
    carrier::{Carrier, OpenError},
    line::{Handle, LineError, ResumeError},
    mux,
    proto::{
        self,
        line::silence::Action,
        messages::{LineKind, Open, RefusalCode},
    },
};
use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout_at},
};

/// How often the lines are looked at, for silence and for what rests in them.
const LOOK: Duration = Duration::from_millis(500);
/// Between attempts, at first and at most. Each asks the relay, which itself waits for an agent that
/// is on its way.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A carrier on which something was heard this recently is not the one to blame for silence.
const FRESH: Duration = Duration::from_secs(2);
/// "No such line" is anybody's word; said so often, by whoever is asked, it is believed.
const BELIEVE_GONE: u32 = 2;

/// One line, as its keeper has it.
pub(super) struct Keeper {
    pub(super) link: Link,
    pub(super) handle: Handle<mux::Stream>,
    pub(super) cluster: String,
    pub(super) kind: LineKind,
    /// The agent's process, which alone has the other end.
    pub(super) agent_instance: String,
    /// What carries the line now.
    pub(super) carrier: Carrier,
    pub(super) epoch: u64,
    pub(super) doubt: Arc<Notify>,
}

/// Why a line is to have another stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Cut,
    /// The agent lets this way go.
    Asked,
    /// There is a newer carrier to the relay.
    Newer,
    /// Nothing is heard.
    Silence,
}

enum Attempt {
    /// Another may succeed.
    Vain(String),
    /// None will.
    Final(String),
    /// The line has ended by itself.
    Over,
}

impl Keeper {
    /// Ends with the line.
    pub(super) async fn run(mut self) {
        let _held = Held::one(&self.link.0.metrics.kept_lines);
        while let Some(why) = self.next().await {
            match why {
                Why::Cut => self.recover().await,
                Why::Asked | Why::Newer | Why::Silence => self.move_on(why).await,
            }
        }
    }

    /// `None`: the line is over.
    async fn next(&self) -> Option<Why> {
        loop {
            let epoch = self.handle.phase().epoch;
            let phase = tokio::select! {
                phase = self.handle.keep_until(|phase| {
                    phase.over || !phase.attached || phase.asked_to_move || phase.let_go
                }) => phase,
                _ = self.carrier.closed() => {
                    // Nobody may be reading, who would notice.
                    self.handle.cut(epoch);
                    continue;
                }
                () = self.link.has_newer(self.epoch) => return Some(Why::Newer),
                () = self.doubt.notified() => return Some(Why::Silence),
            };
            if phase.over {
                return None;
            }
            if !phase.attached {
                return Some(Why::Cut);
            }
            if phase.asked_to_move {
                return Some(Why::Asked);
            }
            if self.see_off().await {
                return None;
            }
        }
    }

    /// A line that was let go has its last words to say. True: it is over.
    async fn see_off(&self) -> bool {
        let life = self.handle.detached_life();
        let said = self
            .handle
            .keep_until(|phase| phase.over || !phase.attached);
        tokio::select! {
            said = tokio::time::timeout(life, said) => match said {
                Ok(phase) => phase.over,
                Err(_) => {
                    self.give_up(LineError::Timeout, "expired");
                    true
                }
            },
            _ = self.carrier.closed() => {
                self.handle.cut(self.handle.phase().epoch);
                false
            }
        }
    }

    /// The stream is lost: tries until the line has another one, or its time is over.
    async fn recover(&mut self) {
        let life = self.handle.detached_life();
        let since = Instant::now();
        let deadline = since + life;
        let (mut wait, mut gone) = (AGAIN.0, 0);
        let mut last = "the relay was not reached".to_owned();
        tracing::debug!(cluster = self.cluster, "a line was cut");
        loop {
            let why = match timeout_at(deadline, self.attempt(&mut gone)).await {
                Ok(Ok(())) => return self.resumed(since.elapsed()),
                Ok(Err(Attempt::Over)) => return,
                Ok(Err(Attempt::Final(why))) => {
                    return self.give_up(LineError::Gone(why), "gone");
                }
                Ok(Err(Attempt::Vain(why))) => why,
                Err(_) => String::new(),
            };
            if !why.is_empty() {
                tracing::debug!(cluster = self.cluster, why, "a line was not resumed yet");
                last = why;
            }
            if self.handle.phase().over {
                return;
            }
            if Instant::now() + wait >= deadline {
                let error = LineError::Expired {
                    after: life,
                    why: last,
                };
                return self.give_up(error, "expired");
            }
            sleep(wait).await;
            wait = (wait * 2).min(AGAIN.1);
        }
    }

    /// The stream still works: has another one ready before it lets it go.
    async fn move_on(&mut self, why: Why) {
        if why == Why::Silence && self.carrier.heard().elapsed() > FRESH {
            // The carrier may be what is silent: another is dialled beside it, and if that comes
            // up, this line will hear of it.
            self.link.replace(self.epoch);
            return;
        }
        let mut gone = 0;
        match self.attempt(&mut gone).await {
            Ok(()) => {}
            Err(Attempt::Over) => {}
            Err(Attempt::Vain(text) | Attempt::Final(text)) => {
                tracing::debug!(
                    cluster = self.cluster,
                    ?why,
                    text,
                    "a line stays where it is"
                );
                let is_lost = self
                    .handle
                    .keep_until(|phase| phase.over || !phase.attached);
                let _ = tokio::time::timeout(AGAIN.1, is_lost).await;
            }
        }
    }

    /// Opens a stream to the agent's process, then puts it under the line.
    async fn attempt(&mut self, gone: &mut u32) -> Result<(), Attempt> {
        let (carrier, epoch) = self.link.carrier().await.map_err(|failure| {
            let text = failure.to_string();
            match failure.may_pass() {
                true => Attempt::Vain(text),
                false => Attempt::Final(text),
            }
        })?;
        let open = Open {
            version: proto::VERSION,
            cluster: self.cluster.clone(),
            line_id: self.handle.id().to_vec(),
            kind: self.kind.into(),
            agent_instance: self.agent_instance.clone(),
            ..Open::default()
        };
        let stream = match carrier.open(open.into()).await {
            Ok((stream, _)) => stream,
            Err(error) => return Err(self.not_opened(epoch, error)),
        };
        let since = Instant::now();
        let was_attached = self.handle.phase().attached;
        let replayed = self.handle.replayed();
        match self.handle.resume(stream).await {
            Ok(()) => {}
            Err(ResumeError::Over) => return Err(Attempt::Over),
            Err(ResumeError::Gone) => {
                *gone += 1;
                let text = format!(
                    "the agent of cluster {} no longer has what ran there; run the command again",
                    self.cluster
                );
                return Err(match *gone < BELIEVE_GONE {
                    true => Attempt::Vain(text),
                    false => Attempt::Final(text),
                });
            }
            Err(error) => return Err(Attempt::Vain(error.to_string())),
        }
        (self.carrier, self.epoch) = (carrier, epoch);
        let metrics = &self.link.0.metrics;
        metrics
            .replayed_bytes
            .inc_by(self.handle.replayed().saturating_sub(replayed));
        if was_attached {
            self.resumed(since.elapsed());
        }
        Ok(())
    }

    fn not_opened(&self, epoch: u64, error: OpenError) -> Attempt {
        let is_final = match &error {
            OpenError::CarrierLost(_) => {
                self.link.replace(epoch);
                false
            }
            OpenError::Refused(refusal) => match refusal.code() {
                RefusalCode::Draining => {
                    self.link.replace(epoch);
                    false
                }
                RefusalCode::InstanceGone
                | RefusalCode::NotAllowed
                | RefusalCode::UnknownCluster
                | RefusalCode::Unauthenticated => true,
                _ => false,
            },
            _ => false,
        };
        let text = open_error(&self.cluster, error).to_string();
        match is_final {
            true => Attempt::Final(text),
            false => Attempt::Vain(text),
        }
    }

    fn resumed(&self, pause: Duration) {
        let metrics = &self.link.0.metrics;
        metrics.resumptions.inc();
        metrics.line_pause_seconds.observe(pause.as_secs_f64());
        tracing::debug!(cluster = self.cluster, ?pause, "a line was resumed");
    }

    fn give_up(&self, error: LineError, label: &str) {
        let metrics = &self.link.0.metrics;
        metrics.lines_given_up.with_label_values(&[label]).inc();
        let what = match self.kind {
            LineKind::Upgrade => "an exec, attach, cp or port-forward",
            LineKind::Api | LineKind::Unspecified => "watches and other requests",
        };
        tracing::warn!(cluster = self.cluster, %error, what, "a line is given up");
        self.handle.give_up(error);
    }
}

impl Link {
    /// Ends when there is a carrier that came after the one of this epoch.
    async fn has_newer(&self, epoch: u64) {
        let mut state = self.0.state.subscribe();
        let is_newer = |state: &State| match state {
            State::Up { epoch: up, .. } => *up > epoch,
            State::Down { .. } => false,
        };
        // `self` keeps the channel open.
        let _ = state.wait_for(is_newer).await;
    }

    /// Looks at all lines, some times a second while there are any. Never ends.
    pub(super) async fn look(&self) {
        let mut every = interval(LOOK);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let lines = self.lines();
            if lines.is_empty() {
                self.0.kept.notified().await;
                continue;
            }
            let now = std::time::Instant::now();
            for (handle, doubt) in lines {
                if handle.look(now) == Action::Suspect {
                    doubt.notify_one();
                }
            }
        }
    }
}
