//! The supervisor of one line: puts another stream under it when its own is lost, before it is lost
//! where that can be known, and when nothing is received on it any more.

use std::sync::Arc;
use std::time::Duration;

use throwline_ops::GaugeGuard;
use throwline_tunnel::carrier::{Carrier, OpenError};
use throwline_tunnel::line::{Handle, LineError, ResumeError};
use throwline_tunnel::proto::line::stall_detector::Action;
use throwline_tunnel::proto::messages::{LineKind, Open, RefusalCode};
use throwline_tunnel::proto::origin;
use throwline_tunnel::proto::pacer::Pacer;
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_tunnel::{mux, proto};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout_at};

use super::Link;
use crate::failure::Failure;
use crate::session::errors::open_error;

/// How often the lines are looked at, for silence and for what rests in them.
const LOOK: Duration = Duration::from_millis(500);
/// Between attempts, at first and at most. Each asks the relay, which itself waits for an agent that
/// is on its way.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A carrier on which something was received this recently is not the one to blame for silence.
const RECENTLY_RECEIVED: Duration = Duration::from_secs(2);
/// "No such line" is not authenticated. It is accepted after so many answers in a row.
const GONE_LIMIT: u32 = 2;

/// How many times in a row a line moves on request, and the interval after that. A relay can forge
/// such requests.
const MOVES: (u32, Duration) = (3, Duration::from_secs(2));

/// Between two moves of a line to a carrier of its class.
const RECLASSIFY: Duration = Duration::from_secs(10);

/// One line, as its supervisor has it.
pub(super) struct LineSupervisor {
    pub(super) link: Link,
    pub(super) handle: Handle<mux::Stream>,
    pub(super) cluster: String,
    pub(super) kind: LineKind,
    /// The agent's process, which alone has the other end.
    pub(super) agent_instance: String,
    /// What carries the line now.
    pub(super) carrier: Carrier,
    pub(super) epoch: u64,
    /// What that carrier is for.
    pub(super) class: TrafficClass,
    pub(super) suspect: Arc<Notify>,
    /// Not before, the line moves to a carrier of its own class.
    pub(super) reclassify_at: Instant,
}

/// Why a line is to have another stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Cut,
    /// The agent asks for it: it closes this carrier.
    Asked,
    /// There is a newer carrier to the relay.
    Newer,
    /// Nothing is received.
    Silence,
    /// It has become bulk, or is so no longer.
    Class,
}

/// A line has no other stream yet.
enum Attempt {
    /// Another attempt may succeed.
    Vain(NotResumed),
    /// None will.
    Final(NotResumed),
    /// The line has ended by itself.
    Over,
}

#[derive(Debug, thiserror::Error)]
enum NotResumed {
    #[error("the relay was not reached")]
    NotReached,
    #[error(transparent)]
    Failure(#[from] Failure),
    #[error("the agent of cluster {cluster} no longer has what ran there; run the command again")]
    Gone { cluster: String },
    #[error(transparent)]
    Resume(#[from] ResumeError),
}

impl LineSupervisor {
    /// Ends with the line.
    pub(super) async fn run(mut self) {
        let _held = GaugeGuard::new(&self.link.0.metrics.kept_lines);
        let mut moves = Pacer::new(MOVES.0, MOVES.1);
        while let Some(why) = self.next().await {
            match why {
                Why::Cut => self.recover().await,
                Why::Asked => {
                    let wait = moves.delay(Instant::now().into_std());
                    if self.stays_for(wait).await {
                        self.move_on(why).await;
                    }
                }
                Why::Newer | Why::Silence => self.move_on(why).await,
                Why::Class => self.reclassify().await,
            }
        }
    }

    /// `None`: the line is over.
    async fn next(&self) -> Option<Why> {
        loop {
            let epoch = self.handle.phase().epoch;
            let phase = tokio::select! {
                phase = self.handle.drive_until(|phase| {
                    phase.over || !phase.attached || phase.move_requested || phase.released
                }) => phase,
                _ = self.carrier.closed() => {
                    // Without a reader, the loss would not be noticed otherwise.
                    self.handle.detach(epoch);
                    continue;
                }
                () = self.link.path(self.class).has_newer(self.epoch) => return Some(Why::Newer),
                () = self.suspect.notified() => return Some(Why::Silence),
                () = self.changed_class() => return Some(Why::Class),
            };
            if phase.over {
                return None;
            }
            if !phase.attached {
                return Some(Why::Cut);
            }
            if phase.move_requested {
                return Some(Why::Asked);
            }
            if self.see_off().await {
                return None;
            }
        }
    }

    /// Ends when the line is of another class than its carrier, and may move to one of its own.
    async fn changed_class(&self) {
        (self.handle.wait_until(|phase| phase.class != self.class)).await;
        sleep_until(self.reclassify_at).await;
        // It may have changed back meanwhile.
        (self.handle.wait_until(|phase| phase.class != self.class)).await;
    }

    /// Moves to a carrier of the line's present class; stays where it is if that is not to be had.
    async fn reclassify(&mut self) {
        let class = self.handle.phase().class;
        self.reclassify_at = Instant::now() + RECLASSIFY;
        let lost = (self.handle).wait_until(|phase| phase.over || !phase.attached);
        let (carrier, epoch) = tokio::select! {
            carrier = self.link.carrier(class) => match carrier {
                Ok(found) => found,
                Err(error) => {
                    tracing::debug!(cluster = self.cluster, ?class, %error, "no carrier of a line's class");
                    return;
                }
            },
            // Recovered first.
            _ = lost => return,
        };
        match self.attempt_on(carrier, epoch, class, &mut 0).await {
            Ok(()) => tracing::debug!(
                cluster = self.cluster,
                ?class,
                "a line has changed its class"
            ),
            Err(Attempt::Over) => {}
            Err(Attempt::Vain(error) | Attempt::Final(error)) => {
                tracing::debug!(cluster = self.cluster, ?class, %error, "a line stays where it is");
            }
        }
    }

    /// Whether the line still has its stream after that time; false as soon as it has not.
    async fn stays_for(&self, wait: Duration) -> bool {
        let lost = self
            .handle
            .drive_until(|phase| phase.over || !phase.attached);
        wait.is_zero() || tokio::time::timeout(wait, lost).await.is_err()
    }

    /// A line that its owner has dropped still sends its end. True: it is over.
    async fn see_off(&self) -> bool {
        let life = self.handle.detached_life();
        let sent = self
            .handle
            .drive_until(|phase| phase.over || !phase.attached);
        tokio::select! {
            sent = tokio::time::timeout(life, sent) => match sent {
                Ok(phase) => phase.over,
                Err(_) => {
                    self.give_up(LineError::Timeout, "expired");
                    true
                }
            },
            _ = self.carrier.closed() => {
                self.handle.detach(self.handle.phase().epoch);
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
        let mut last = NotResumed::NotReached;
        tracing::debug!(cluster = self.cluster, "a line was cut");
        loop {
            match timeout_at(deadline, self.attempt(&mut gone)).await {
                Ok(Ok(())) => return self.resumed(since.elapsed()),
                Ok(Err(Attempt::Over)) => return,
                Ok(Err(Attempt::Final(error))) => {
                    return self.give_up(LineError::Gone(within_sentence(&error)), "gone");
                }
                Ok(Err(Attempt::Vain(error))) => {
                    tracing::debug!(cluster = self.cluster, %error, "a line was not resumed yet");
                    last = error;
                }
                Err(_) => {}
            }
            if self.handle.phase().over {
                return;
            }
            if Instant::now() + wait >= deadline {
                let error = LineError::Expired {
                    after: life,
                    why: within_sentence(&last),
                };
                return self.give_up(error, "expired");
            }
            sleep(wait).await;
            wait = (wait * 2).min(AGAIN.1);
        }
    }

    /// The stream still works: has another one ready before it is released.
    async fn move_on(&mut self, why: Why) {
        if why == Why::Silence && self.carrier.last_received().elapsed() > RECENTLY_RECEIVED {
            // The carrier itself may be silent: another is dialled beside it, and when that is
            // up, this line moves to it.
            self.link.replace(self.class, self.epoch);
            return;
        }
        let mut gone = 0;
        match self.attempt(&mut gone).await {
            Ok(()) => {}
            Err(Attempt::Over) => {}
            Err(Attempt::Vain(error) | Attempt::Final(error)) => {
                tracing::debug!(
                    cluster = self.cluster,
                    ?why,
                    %error,
                    "a line stays where it is"
                );
                let is_lost = self
                    .handle
                    .drive_until(|phase| phase.over || !phase.attached);
                let _ = tokio::time::timeout(AGAIN.1, is_lost).await;
            }
        }
    }

    /// Opens a stream to the agent's process, then puts it under the line.
    async fn attempt(&mut self, gone: &mut u32) -> Result<(), Attempt> {
        // Without its carrier, bulk goes on over the other one, and returns later.
        let is_usable = !self.class.is_bulk() || self.link.path(self.class).present().is_some();
        let class = if is_usable {
            self.class
        } else {
            TrafficClass::Interactive
        };
        let (carrier, epoch) =
            self.link
                .carrier(class)
                .await
                .map_err(|failure| match failure.may_pass() {
                    true => Attempt::Vain(failure.into()),
                    false => Attempt::Final(failure.into()),
                })?;
        self.attempt_on(carrier, epoch, class, gone).await
    }

    /// The same over this carrier, which is of that class.
    async fn attempt_on(
        &mut self,
        carrier: Carrier,
        epoch: u64,
        class: TrafficClass,
        gone: &mut u32,
    ) -> Result<(), Attempt> {
        let open = Open {
            version: proto::VERSION,
            cluster: self.cluster.clone(),
            line_id: self.handle.id().to_vec(),
            kind: self.kind.into(),
            detached_ms: u32::try_from(self.handle.detached_life().as_millis()).unwrap_or(u32::MAX),
            // The line's other end is in the memory of this process; another replica could only
            // answer GONE.
            agent_instance: self.agent_instance.clone(),
            bulk: class.is_bulk(),
            ..Open::default()
        };
        let stream = match carrier.open(open.into()).await {
            Ok((stream, _)) => stream,
            Err(error) => return Err(self.not_opened(class, epoch, error)),
        };
        let since = Instant::now();
        let was_attached = self.handle.phase().attached;
        let replayed = self.handle.retransmitted();
        match self.handle.resume(stream).await {
            Ok(()) => {}
            Err(ResumeError::Over) => return Err(Attempt::Over),
            Err(ResumeError::Gone) => {
                // GONE has no MAC, so a relay can forge it: one answer is not final
                // (docs/adr/0003).
                *gone += 1;
                let cluster = self.cluster.clone();
                let error = NotResumed::Gone { cluster };
                return Err(match *gone < GONE_LIMIT {
                    true => Attempt::Vain(error),
                    false => Attempt::Final(error),
                });
            }
            Err(error) => return Err(Attempt::Vain(error.into())),
        }
        // Only after success: until then the old carrier's end is what has to be observed.
        (self.carrier, self.epoch, self.class) = (carrier, epoch, class);
        let metrics = &self.link.0.metrics;
        metrics
            .replayed_bytes
            .inc_by(self.handle.retransmitted().saturating_sub(replayed));
        if was_attached {
            self.resumed(since.elapsed());
        }
        Ok(())
    }

    fn not_opened(&self, class: TrafficClass, epoch: u64, error: OpenError) -> Attempt {
        let is_final = match &error {
            OpenError::CarrierLost(_) => {
                self.link.replace(class, epoch);
                false
            }
            OpenError::Refused(refusal) => match refusal.code() {
                RefusalCode::Draining => {
                    self.link.replace(class, epoch);
                    false
                }
                RefusalCode::InstanceGone
                | RefusalCode::NotAllowed
                | RefusalCode::Revoked
                | RefusalCode::UnknownCluster
                | RefusalCode::Unauthenticated => true,
                _ => false,
            },
            _ => false,
        };
        let failure = open_error(&self.cluster, error);
        match is_final {
            true => Attempt::Final(failure.into()),
            false => Attempt::Vain(failure.into()),
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

/// The text as a part of a sentence of this proxy, which names itself.
fn within_sentence(error: &NotResumed) -> String {
    origin::without(&error.to_string()).to_owned()
}

impl Link {
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
            for line in lines {
                if line.handle.tick(now) == Action::Suspect {
                    line.suspect.notify_one();
                }
            }
        }
    }
}
