//! One carrier, kept for ever: dialled anew when it is lost, replaced when the relay drains, the
//! certificate was renewed, it has grown old, or its relay is one that a sibling holds too.

use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::{Carrier, Connection, Incoming, dial};
use throwline_tunnel::proto::backoff::Backoff;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::Drain;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::control::{self, Told};
use super::failure::Failure;
use super::set::Set;
use crate::metrics::Held;
use crate::said::Said;

/// How often a dial that ends at a sibling's relay is tried anew before that one is taken.
const TRIES: u32 = 4;
/// The mean wait before the first of these; each next one is twice as long.
const TRY_AGAIN: Duration = Duration::from_millis(200);
/// When a slot that could not get a relay of its own looks for one again. At first soon, for a
/// balancer may not know yet that a relay is back; then ever more seldom, for it can be sticky.
const LOOK_AGAIN: (Duration, Duration) = (Duration::from_secs(8), Duration::from_secs(10 * 60));

/// The mean wait before the next dial while lines that were cut wait for a carrier. They do for the
/// detached life at most (120 s), so it costs some forty dials of the agents that have any.
const AWAITED: Duration = Duration::from_secs(3);

pub(super) struct Slot {
    number: usize,
    set: Arc<Set>,
    identity: watch::Receiver<u64>,
    network: watch::Receiver<u64>,
    said: Said,
    backoff: Backoff,
    /// Each carrier's tasks, the old ones that are let go among them.
    serving: JoinSet<()>,
}

/// What a slot leaves behind.
pub(super) struct Left {
    pub(super) carrier: Option<Carrier>,
    pub(super) serving: JoinSet<()>,
}

/// The slot's present carrier.
struct Live {
    carrier: Carrier,
    since: Instant,
    rotate: Instant,
    told: watch::Receiver<Told>,
    /// Tells its sessions to move; dropping it does too.
    leave: ShutdownTrigger,
    /// A move that failed and is tried again then.
    again: Option<(Instant, Why)>,
    /// After the next vain look for a relay of its own.
    look_again: Duration,
}

/// Why a carrier that still works should have a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Why {
    Drain,
    Renewed,
    Old,
    Double,
    /// The machine's addresses have changed, or it has slept: the carrier may be dead.
    Network,
}

enum Due {
    Lost,
    Move(Why),
}

impl Slot {
    pub(super) fn new(number: usize, set: Arc<Set>) -> Self {
        Self {
            number,
            identity: set.identity(),
            network: set.network.clone(),
            said: Said::default(),
            backoff: Backoff::new(set.config.backoff),
            serving: JoinSet::new(),
            set,
        }
    }

    /// Ends with the shutdown only.
    pub(super) async fn run(mut self) -> Left {
        let shutdown = self.set.shutdown.clone();
        let mut current = None;
        tokio::select! {
            () = self.keep(&mut current) => {}
            () = shutdown.requested() => {}
        }
        Left {
            carrier: current.map(|live: Live| live.carrier),
            serving: self.serving,
        }
    }

    /// Never ends; may be dropped at any await.
    async fn keep(&mut self, current: &mut Option<Live>) {
        loop {
            while self.serving.try_join_next().is_some() {}
            let Some(live) = current else {
                self.set.wanted(self.number).await;
                match self.connect(None).await {
                    Ok(connection) => *current = Some(self.serve(connection)),
                    Err(failure) => {
                        self.failed(&failure);
                        self.pause().await;
                    }
                }
                continue;
            };
            match self.until_due(live).await {
                Due::Lost => {
                    self.set.release(self.number);
                    self.backoff.lived(live.since.elapsed());
                    *current = None;
                    self.pause().await;
                }
                Due::Move(why) => match self.connect(Some(why)).await {
                    Ok(connection) => {
                        let successor = self.serve(connection);
                        if let Some(old) = current.replace(successor) {
                            self.backoff.lived(old.since.elapsed());
                            self.let_go(old);
                        }
                    }
                    Err(failure) => {
                        if !failure.is_unwanted() {
                            self.failed(&failure);
                        }
                        // A sibling can take what this one had.
                        if why == Why::Drain && self.set.has_sibling(self.number) {
                            self.set.release(self.number);
                            if let Some(old) = current.take() {
                                self.let_go(old);
                            }
                            continue;
                        }
                        let wait = match why {
                            Why::Double => {
                                let wait = live.look_again;
                                live.look_again = (wait * 2).min(LOOK_AGAIN.1);
                                jittered(wait)
                            }
                            _ => self.backoff.next(&mut rand::rng()),
                        };
                        live.again = Some((Instant::now() + wait, why));
                    }
                },
            }
        }
    }

    /// Waits out the back-off, less of it while lines wait for a carrier, or until there is another
    /// network to try. What a relay has asked for is heeded in full.
    async fn pause(&mut self) {
        let is_asked = self.backoff.is_asked();
        let wait = self.backoff.next(&mut rand::rng());
        let set = &self.set;
        let awaited = async {
            tokio::time::sleep(jittered(AWAITED)).await;
            if is_asked || set.has_sibling(self.number) || !set.owner.is_awaited() {
                std::future::pending().await
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = awaited => {}
            Ok(()) = self.network.changed() => {}
        }
    }

    /// Connects; from the beginning when the network has changed meanwhile, for a dial into one that
    /// is gone only times out.
    async fn connect(&mut self, why: Option<Why>) -> Result<Connection, Failure> {
        let mut network = self.network.clone();
        loop {
            network.mark_unchanged();
            tokio::select! {
                connected = self.connect_once(why) => return connected,
                Ok(()) = network.changed() => {}
            }
        }
    }

    /// Dials until it gets to a relay that no sibling holds; after a few tries, to any.
    async fn connect_once(&mut self, why: Option<Why>) -> Result<Connection, Failure> {
        // Also what changed while nobody watched: the dial takes the newest.
        self.identity.mark_unchanged();
        let mut dialling = self.set.owner.dialling()?;
        let mut wait = TRY_AGAIN;
        for _ in 1..TRIES {
            dialling.avoid = self.set.relays_of_others(self.number);
            match Box::pin(dial(&dialling)).await.map_err(Failure::from) {
                Err(failure) if failure.is_unwanted() => {
                    tracing::debug!(slot = self.number, %failure, "trying for another relay");
                }
                dialled => return dialled,
            }
            tokio::time::sleep(jittered(wait)).await;
            wait *= 2;
        }
        dialling.avoid = match why {
            Some(Why::Double) => self.set.relays_of_others(self.number),
            _ => Vec::new(),
        };
        Ok(Box::pin(dial(&dialling)).await?)
    }

    fn serve(&mut self, connection: Connection) -> Live {
        let Connection {
            carrier,
            incoming,
            relay,
            ..
        } = connection;
        let (id, instance) = (carrier.id(), &relay.instance);
        if self.said.recovered() {
            tracing::info!(carrier = id, relay = instance, "connected to a relay again");
        } else {
            tracing::info!(carrier = id, relay = instance, "connected to a relay");
        }
        self.set.hold(self.number, carrier.clone(), &relay);
        let (leave, leaving) = self.set.shutdown.child();
        let (tell, told) = watch::channel(Told::default());
        let control = control::run(carrier.clone(), self.set.owner.status(), tell);
        self.serving
            .spawn(take_streams(self.set.clone(), incoming, leaving, control));
        let now = Instant::now();
        Live {
            carrier,
            since: now,
            rotate: now + jittered(self.set.config.rotate),
            told,
            leave,
            again: None,
            look_again: LOOK_AGAIN.0,
        }
    }

    /// Waits until the carrier needs a successor.
    async fn until_due(&mut self, live: &mut Live) -> Due {
        let drain = drained(
            live.told.clone(),
            self.set.clone(),
            self.set.config.backoff.max_asked,
        );
        let double = async {
            self.set.double(self.number).await;
            // All agents see a new relay at once.
            tokio::time::sleep(part_of(self.set.config.spread)).await;
            self.set.double(self.number).await;
        };
        let again = async {
            match live.again {
                Some((at, why)) => {
                    tokio::time::sleep_until(at).await;
                    why
                }
                None => std::future::pending().await,
            }
        };
        let due = tokio::select! {
            biased;
            reason = live.carrier.closed() => {
                if let Some(silent) = self.said.say("lost", Instant::now()) {
                    tracing::warn!(carrier = live.carrier.id(), %reason, silent, "the carrier to the relay was lost");
                }
                return Due::Lost;
            }
            why = again => Due::Move(why),
            // A move that is to be tried again is about these as well.
            () = drain, if live.again.is_none_or(|(_, why)| why != Why::Drain) => Due::Move(Why::Drain),
            Ok(()) = self.identity.changed() => Due::Move(Why::Renewed),
            Ok(()) = self.network.changed() => Due::Move(Why::Network),
            () = tokio::time::sleep_until(live.rotate) => Due::Move(Why::Old),
            () = double, if live.again.is_none() => Due::Move(Why::Double),
        };
        live.again = None;
        if let Due::Move(Why::Old) = due {
            live.rotate = Instant::now() + jittered(self.set.config.rotate);
        }
        due
    }

    /// Lets an old carrier go: when other ways are known, its sessions are asked to move; when
    /// they have, it ends. The relay ends it with its certificate at the latest.
    fn let_go(&mut self, old: Live) {
        let settle = self.set.config.settle;
        self.serving.spawn(async move {
            let Live { carrier, leave, .. } = old;
            tokio::select! {
                _ = carrier.closed() => return,
                () = tokio::time::sleep(settle) => {}
            }
            leave.trigger();
            // The control stream stays to the end.
            while carrier.streams() > 1 {
                tokio::select! {
                    _ = carrier.closed() => return,
                    () = tokio::time::sleep(Duration::from_millis(200)) => {}
                }
            }
            // A stream that the relay has just opened is answered before.
            tokio::time::sleep(settle).await;
            carrier.close(CloseCode::Normal, "replaced by another carrier");
        });
    }

    fn failed(&mut self, failure: &Failure) {
        let kind = failure.kind();
        let failures = &self.set.metrics.connect_failures;
        failures.with_label_values(&[kind]).inc();
        if let Some(after) = failure.retry_after() {
            self.backoff.honour(after);
        }
        if let Some(silent) = self.said.say(kind, Instant::now()) {
            tracing::warn!(error = %failure, silent, "cannot connect to the relay; trying on");
        }
        self.set.owner.failed(failure);
    }
}

async fn take_streams(
    set: Arc<Set>,
    mut incoming: Incoming,
    leaving: Shutdown,
    control: impl Future<Output = ()> + Send + 'static,
) {
    let _held = Held::new(&set.metrics.carriers);
    let _control = AbortOnDropHandle::new(tokio::spawn(control));
    while let Some(stream) = incoming.next().await {
        set.owner.take(stream, &leaving);
    }
}

/// Ends when the relay has asked to move and the time that it gave is over; tells the set how
/// many relays there are on the way.
async fn drained(mut told: watch::Receiver<Told>, set: Arc<Set>, most: Duration) {
    let mut relays = None;
    let Drain {
        delay_ms,
        spread_ms,
        reason,
    } = loop {
        let now = told.borrow_and_update().clone();
        if let Some(drain) = now.drain {
            break drain;
        }
        if let Some(count) = now.relays
            && relays.replace(count) != Some(count)
        {
            set.told(count);
        }
        if told.changed().await.is_err() {
            return std::future::pending().await;
        }
    };
    let delay = Duration::from_millis(delay_ms).min(most);
    let wait = delay + part_of(Duration::from_millis(spread_ms).min(most));
    tracing::info!(reason, ?wait, "the relay drains; moving to another");
    tokio::time::sleep(wait).await;
}

fn part_of(spread: Duration) -> Duration {
    spread.mul_f64(rand::rng().random::<f64>())
}

fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(0.8 + 0.4 * rand::rng().random::<f64>())
}
