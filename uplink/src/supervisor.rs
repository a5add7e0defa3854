//! One carrier, kept up until the shutdown: dialled when it is needed, again when it is lost, and
//! replaced while it still works for each [`ReplaceReason`].

use std::mem;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use throwline_ops::network::Changes;
use throwline_ops::{GaugeGuard, LogThrottle, Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::{Carrier, Connection, Incoming};
use throwline_tunnel::proto::close::{CloseCode, CloseReason};
use throwline_tunnel::proto::messages::Drain;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use crate::carriers::Carriers;
use crate::context::Context;
use crate::control::{self, Announced};
use crate::handler::{DialFailure, ReplaceReason, UplinkHandler};
use crate::retire::retire;
use crate::schedule::{Pause, Schedule, jittered, part_of};

/// Logs at a level, or at the level debug if the pool is quiet.
macro_rules! log {
    ($level:ident, $config:expr, $($arguments:tt)+) => {
        if $config.quiet {
            tracing::debug!($($arguments)+);
        } else {
            tracing::$level!($($arguments)+);
        }
    };
}

/// How often a dial that ends at a sibling's relay is repeated before that one is used.
const TRIES: u32 = 4;
/// The mean wait before the first of these; each next one is twice as long.
const TRY_AGAIN: Duration = Duration::from_millis(200);

pub(crate) struct Supervisor<H> {
    number: usize,
    context: Arc<Context<H>>,
    schedule: Schedule,
    identity: watch::Receiver<u64>,
    network: Changes,
    failures: LogThrottle,
    losses: LogThrottle,
    /// Each carrier's tasks, with those of carriers that retire.
    serving: JoinSet<()>,
}

/// What a supervisor leaves behind.
pub(crate) struct Drained {
    pub(crate) carrier: Option<Carrier>,
    pub(crate) serving: JoinSet<()>,
}

#[derive(Default)]
enum State {
    /// No carrier: one is dialled when it is needed.
    #[default]
    Down,
    /// No carrier: the next dial has to wait.
    Waiting(Pause),
    /// A carrier serves.
    Up(Live),
    /// A carrier serves until its successor is up.
    Replacing(Live, Attempt),
}

/// The supervisor's present carrier.
struct Live {
    carrier: Carrier,
    /// Of its TCP connection: this one, and the relay's or a proxy's.
    ends: Option<(SocketAddr, SocketAddr)>,
    epoch: u64,
    since: Instant,
    rotate: Instant,
    announced: watch::Receiver<Announced>,
    /// Asks its sessions to move; so does dropping it.
    retiring: ShutdownTrigger,
    /// A replacement that failed, and when it is attempted again.
    retry: Option<(Instant, Attempt)>,
}

/// An attempt to replace a carrier.
#[derive(Debug, Clone, Copy)]
struct Attempt {
    reason: ReplaceReason,
    /// From 1.
    number: u32,
}

enum Event {
    Lost(CloseReason),
    Unused,
    Replace(Attempt),
}

impl<H: UplinkHandler> Supervisor<H> {
    pub(crate) fn new(number: usize, context: Arc<Context<H>>) -> Self {
        Self {
            number,
            schedule: Schedule::new(context.config.clone()),
            identity: context.carriers.identity(),
            network: context.network.clone(),
            failures: LogThrottle::default(),
            losses: LogThrottle::default(),
            serving: JoinSet::new(),
            context,
        }
    }

    /// Ends with the shutdown only.
    pub(crate) async fn run(mut self) -> Drained {
        let shutdown = self.context.shutdown.clone();
        let mut state = State::default();
        let steps = async {
            loop {
                self.step(&mut state).await;
            }
        };
        tokio::select! {
            () = steps => {}
            () = shutdown.requested() => {}
        }
        let carrier = match state {
            State::Up(live) | State::Replacing(live, _) => Some(live.carrier),
            State::Down | State::Waiting(_) => None,
        };
        Drained {
            carrier,
            serving: self.serving,
        }
    }

    /// Waits for what ends the state. The state changes after the last await, so that a step that is
    /// dropped leaves its carrier in place.
    async fn step(&mut self, state: &mut State) {
        while self.serving.try_join_next().is_some() {}
        match state {
            State::Down => {
                self.context.carriers.wanted(self.number).await;
                self.context.handler.needed().await;
                let connected = self.connect(None).await;
                *state = self.dialled(connected);
            }
            State::Waiting(pause) => {
                let pause = *pause;
                self.pause(pause).await;
                *state = State::Down;
            }
            State::Up(live) => {
                let event = self.next_event(live).await;
                if let State::Up(live) = mem::take(state) {
                    *state = self.happened(live, event);
                }
            }
            State::Replacing(_, attempt) => {
                let reason = attempt.reason;
                let connected = self.connect(Some(reason)).await;
                if let State::Replacing(live, attempt) = mem::take(state) {
                    *state = self.redialled(live, attempt, connected);
                }
            }
        }
    }

    fn dialled(&mut self, connected: Result<Connection, H::Error>) -> State {
        match connected {
            Ok(connection) => State::Up(self.serve(connection)),
            Err(error) => {
                self.count_failure(&error);
                self.context.handler.failed(&error);
                State::Waiting(self.schedule.after_failure(&mut rand::rng()))
            }
        }
    }

    fn happened(&mut self, live: Live, event: Event) -> State {
        match event {
            Event::Replace(attempt) => {
                if attempt.reason == ReplaceReason::Network {
                    let (config, carrier) = (&self.context.config, live.carrier.id());
                    log!(
                        info,
                        config,
                        carrier,
                        "the network has changed; connecting again"
                    );
                }
                State::Replacing(live, attempt)
            }
            Event::Unused => {
                let (config, carrier) = (&self.context.config, live.carrier.id());
                log!(info, config, carrier, "the carrier is no longer needed");
                live.carrier.close(CloseCode::Normal, "not needed");
                self.schedule.lived(live.since.elapsed());
                self.context.release(self.number);
                self.context.handler.disconnected(None);
                State::Down
            }
            Event::Lost(reason) => {
                let now = Instant::now();
                if let Some(left_out) = self.losses.admit("lost", now) {
                    let carrier = live.carrier.id();
                    let config = &self.context.config;
                    log!(warn, config, carrier, %reason, left_out, "the carrier to the relay was lost");
                }
                let age = now.duration_since(live.since);
                self.ended(age);
                self.context.release(self.number);
                self.context.handler.disconnected(Some(&reason));
                let rng = &mut rand::rng();
                State::Waiting(match reason.code {
                    // A dial at once would only repeat the refusal.
                    CloseCode::Revoked => self.schedule.after_failure(rng),
                    _ => self.schedule.after_loss(age, rng),
                })
            }
        }
    }

    fn redialled(
        &mut self,
        mut live: Live,
        attempt: Attempt,
        connected: Result<Connection, H::Error>,
    ) -> State {
        let error = match connected {
            Ok(connection) => {
                let successor = self.serve(connection);
                self.ended(live.since.elapsed());
                // Make before break: the old carrier finishes its streams only now that the
                // successor serves.
                self.retire(live);
                return State::Up(successor);
            }
            Err(error) => error,
        };
        let reason = attempt.reason;
        // A relay that a sibling holds is no failure: no better one was found.
        if !error.is_unwanted() {
            self.count_failure(&error);
            let handler = &self.context.handler;
            handler.not_replaced(&error, reason, attempt.number);
        }
        // A sibling can take what this one had.
        if reason == ReplaceReason::Drain && self.context.carriers.has_sibling(self.number) {
            self.context.release(self.number);
            self.context.handler.disconnected(None);
            self.retire(live);
            return State::Down;
        }
        let wait = self.schedule.after_vain_move(reason, &mut rand::rng());
        let next = Attempt {
            reason,
            number: attempt.number.saturating_add(1),
        };
        live.retry = Some((Instant::now() + wait, next));
        State::Up(live)
    }

    /// Waits out the back-off, less of it while work waits for a carrier, or until there is another
    /// network or identity to try. What a relay has asked for is waited out in full.
    async fn pause(&mut self, pause: Pause) {
        let context = &self.context;
        let urgent = async {
            let Some(wait) = pause.urgent else {
                return std::future::pending().await;
            };
            sleep(wait).await;
            // The sibling carries the work; the relay gets its full back-off.
            if context.carriers.has_sibling(self.number) {
                return std::future::pending().await;
            }
            context.handler.urgent().await;
        };
        tokio::select! {
            () = sleep(pause.wait) => {}
            () = urgent => {}
            () = self.network.any() => {}
            Ok(()) = self.identity.changed() => {}
        }
    }

    /// Connects; from the beginning when the network has changed meanwhile, for a dial into one that
    /// is gone only times out.
    async fn connect(&mut self, reason: Option<ReplaceReason>) -> Result<Connection, H::Error> {
        loop {
            self.network.skip();
            // Also what changed while nothing watched: the dial uses the newest.
            self.identity.mark_unchanged();
            tokio::select! {
                connected = self.context.connect_once(self.number, reason) => return connected,
                () = self.network.any() => {}
            }
        }
    }

    fn serve(&mut self, connection: Connection) -> Live {
        let Connection {
            carrier,
            incoming,
            relay,
            ends,
            ..
        } = connection;
        self.failures.recovered();
        let (id, instance) = (carrier.id(), &relay.instance);
        let context = &self.context;
        log!(
            info,
            context.config,
            carrier = id,
            relay = instance,
            "connected to a relay"
        );
        let epoch = context.hold(self.number, &carrier, &relay);
        let (retiring, retired) = context.shutdown.child();
        let (announce, announced) = watch::channel(Announced::default());
        let control = context
            .config
            .control
            .then(|| control::run(carrier.clone(), context.handler.clone(), announce));
        self.serving
            .spawn(accept_streams(context.clone(), incoming, retired, control));
        let now = Instant::now();
        let max_age = context.handler.max_age();
        let rotate = self.schedule.begin(max_age, &mut rand::rng());
        Live {
            carrier,
            ends,
            epoch,
            since: now,
            rotate: now + rotate,
            announced,
            retiring,
            retry: None,
        }
    }

    /// Waits until the carrier has ended, is not needed, or needs a successor.
    async fn next_event(&mut self, live: &mut Live) -> Event {
        let Context {
            carriers,
            config,
            handler,
            ..
        } = &*self.context;
        let (number, schedule) = (self.number, &mut self.schedule);
        let retried = live.retry.map(|(_, attempt)| attempt.reason);
        let requested = async {
            // A replacement that is to be attempted again is about these as well.
            let reason = tokio::select! {
                () = drained(live.announced.clone(), carriers, schedule),
                    if retried != Some(ReplaceReason::Drain) => ReplaceReason::Drain,
                () = carriers.replace_requested(live.epoch),
                    if retried != Some(ReplaceReason::Requested) => ReplaceReason::Requested,
            };
            sleep(schedule.move_delay(Instant::now().into_std())).await;
            reason
        };
        let duplicate = async {
            carriers.duplicate(number).await;
            // All agents see a new relay at once.
            let wait = part_of(config.spread, &mut rand::rng());
            sleep(wait).await;
            // The sibling may have moved during the wait.
            carriers.duplicate(number).await;
        };
        let retry = async {
            match live.retry {
                Some((at, attempt)) => {
                    sleep_until(at).await;
                    attempt
                }
                None => std::future::pending().await,
            }
        };
        let attempt = tokio::select! {
            // In order of urgency: a carrier that was lost first, and one that is not used last.
            biased;
            reason = live.carrier.closed() => return Event::Lost(reason),
            attempt = retry => attempt,
            reason = requested => reason.into(),
            Ok(()) = self.identity.changed() => ReplaceReason::Identity.into(),
            () = self.network.affecting(live.ends) => ReplaceReason::Network.into(),
            () = sleep_until(live.rotate) => ReplaceReason::Age.into(),
            () = duplicate, if live.retry.is_none() => ReplaceReason::Duplicate.into(),
            () = handler.unused(&live.carrier) => return Event::Unused,
        };
        live.retry = None;
        // A replacement that fails would otherwise be due again at once.
        if attempt.reason == ReplaceReason::Age {
            let again = self.schedule.rotate(handler.max_age(), &mut rand::rng());
            live.rotate = Instant::now() + again;
        }
        Event::Replace(attempt)
    }

    /// A carrier has ended, or was replaced, at this age.
    fn ended(&mut self, age: Duration) {
        self.schedule.lived(age);
        // Not part of a series of losses.
        if age >= self.context.config.backoff.stable {
            self.losses.recovered();
        }
    }

    fn retire(&mut self, old: Live) {
        let config = self.context.config.clone();
        self.serving
            .spawn(retire(old.carrier, old.retiring, config));
    }

    fn count_failure(&mut self, error: &H::Error) {
        let kind = error.kind();
        let failures = &self.context.metrics.connect_failures;
        failures.with_label_values(&[kind]).inc();
        if let Some(after) = error.retry_after() {
            self.schedule.honour(after);
        }
        if let Some(left_out) = self.failures.admit(kind, Instant::now()) {
            let config = &self.context.config;
            log!(warn, config, %error, left_out, "cannot connect to the relay; trying again");
        }
    }
}

impl<H: UplinkHandler> Context<H> {
    /// Dials until it reaches a relay that no sibling holds; after a few tries, any.
    async fn connect_once(
        &self,
        number: usize,
        reason: Option<ReplaceReason>,
    ) -> Result<Connection, H::Error> {
        let mut wait = TRY_AGAIN;
        for _ in 1..TRIES {
            let avoid = self.carriers.relays_of_others(number);
            match Box::pin(self.handler.dial(avoid)).await {
                Err(error) if error.is_unwanted() => {
                    tracing::debug!(supervisor = number, %error, "trying for another relay");
                }
                dialled => return dialled,
            }
            let jittered = jittered(wait, &mut rand::rng());
            sleep(jittered).await;
            wait *= 2;
        }
        // The last try takes any relay, since a second carrier there is better than none; not so
        // where a second carrier is what is to be resolved.
        let avoid = match reason {
            Some(ReplaceReason::Duplicate) => self.carriers.relays_of_others(number),
            _ => Vec::new(),
        };
        Box::pin(self.handler.dial(avoid)).await
    }
}

impl From<ReplaceReason> for Attempt {
    fn from(reason: ReplaceReason) -> Self {
        Self { reason, number: 1 }
    }
}

async fn accept_streams<H: UplinkHandler>(
    context: Arc<Context<H>>,
    mut incoming: Incoming,
    retired: Shutdown,
    control: Option<impl Future<Output = ()> + Send + 'static>,
) {
    let _counted = GaugeGuard::new(&context.metrics.carriers);
    let _control = control.map(|control| AbortOnDropHandle::new(tokio::spawn(control)));
    while let Some(stream) = incoming.next().await {
        context.handler.accept(stream, &retired);
    }
}

/// Ends when the relay has asked to move and the delay that it gave is over. Until then it passes on
/// how many relays there are.
async fn drained(
    mut announced: watch::Receiver<Announced>,
    carriers: &Carriers,
    schedule: &Schedule,
) {
    let mut relays = None;
    let Drain {
        delay_ms,
        spread_ms,
        reason,
    } = loop {
        let now = announced.borrow_and_update().clone();
        if let Some(drain) = now.drain {
            break drain;
        }
        if let Some(count) = now.relays
            && relays.replace(count) != Some(count)
        {
            carriers.announce(count);
        }
        if announced.changed().await.is_err() {
            return std::future::pending().await;
        }
    };
    let (delay, spread) = (
        Duration::from_millis(delay_ms),
        Duration::from_millis(spread_ms),
    );
    let wait = schedule.drain(delay, spread, &mut rand::rng());
    tracing::info!(reason, ?wait, "the relay drains; moving to another");
    sleep(wait).await;
}
