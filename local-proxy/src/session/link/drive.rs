//! The life of the carrier: dialled on demand, redialled while in use, replaced before it ends.

use super::{Link, State};
use crate::error::Failure;
use rand::Rng as _;
use std::{
    sync::atomic::Ordering,
    time::{Duration, SystemTime},
};
use throwline_tunnel::{
    carrier::{Carrier, Connection, Incoming},
    message, mux,
    proto::{
        backoff::{self, Backoff},
        close::CloseCode,
        messages::{Control, ControlKind, ControlMessage, Drain, Refusal, RefusalCode, StreamKind},
        wire::CONTROL_CAP,
    },
};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

/// While somebody waits, a dial is tried this often, whatever the back-off says.
const EAGER: Duration = Duration::from_secs(1);
/// Within this time a carrier that had worked is dialled anew, the first time that it is lost.
const AT_ONCE: Duration = Duration::from_millis(200);
/// How long a carrier must have lived for that.
const SETTLED: Duration = Duration::from_secs(2);
/// How often to look whether a carrier is still needed.
const LOOK: Duration = Duration::from_secs(5);
/// How long a replaced carrier may go on for the streams it has.
const RETIRE: Duration = Duration::from_secs(24 * 3600);
/// The longest a relay can tell us to wait before we leave it.
const MAX_DRAIN: Duration = Duration::from_secs(300);

/// Why a carrier is no longer the current one.
enum Ended {
    Lost,
    Idle,
    /// The successor, which is already up.
    Replaced(Connection),
}

impl Link {
    /// Keeps a carrier up while one is needed; ends with `stop`.
    pub(crate) async fn drive(self, stop: CancellationToken) {
        stop.run_until_cancelled(async { tokio::join!(self.run(), self.look()) })
            .await;
        self.forget_lines();
        let state = self.0.state.send_replace(State::Down { last: None });
        if let State::Up { carrier, .. } = state {
            carrier.close(CloseCode::GoingAway, "the local proxy stops");
            // The process may end then. An agent that was not told waits for each line's return.
            carrier.gone().await;
        }
    }

    async fn run(&self) {
        // They end with this function.
        let mut retired = JoinSet::new();
        let mut backoff = Backoff::new(backoff::Config::default());
        let mut network = throwline_ops::network::changes();
        loop {
            let mut lost = false;
            while !self.is_used() {
                self.0.demand.notified().await;
            }
            let mut next = match self.dial_anew(&mut network).await {
                Ok(connection) => Some(connection),
                Err(failure) => {
                    tracing::warn!(%failure, "cannot reach the relay");
                    self.0.state.send_replace(State::Down {
                        last: Some(failure),
                    });
                    None
                }
            };
            while let Some(connection) = next.take() {
                let since = Instant::now();
                match self.hold(connection, &mut retired, &mut network).await {
                    Ended::Replaced(successor) => next = Some(successor),
                    ended => {
                        lost = matches!(ended, Ended::Lost) && since.elapsed() > SETTLED;
                        self.0.state.send_replace(State::Down { last: None });
                    }
                }
                backoff.lived(since.elapsed());
            }
            let delay = match lost {
                // Lines wait. Whoever else was on the same relay comes at once, too: hence a part
                // of a second.
                true => AT_ONCE.mul_f64(rand::rng().random::<f64>()),
                false => backoff.next(&mut rand::rng()),
            };
            tokio::select! {
                () = self.pause(delay) => {}
                Ok(()) = network.changed() => {}
            }
        }
    }

    /// Waits out the back-off, or less while somebody waits for a carrier.
    async fn pause(&self, delay: Duration) {
        let eager = async {
            sleep(EAGER.min(delay)).await;
            self.0.demand.notified().await;
        };
        tokio::select! {
            () = sleep(delay) => {}
            () = eager => {}
        }
    }

    /// Lets a carrier serve until it ends or has a successor.
    async fn hold(
        &self,
        connection: Connection,
        retired: &mut JoinSet<()>,
        network: &mut watch::Receiver<u64>,
    ) -> Ended {
        let Connection {
            carrier,
            mut incoming,
            ..
        } = connection;
        let epoch = self.0.epoch.fetch_add(1, Ordering::AcqRel) + 1;
        self.0.metrics.carriers.inc();
        tracing::info!(carrier = carrier.id(), "connected to the relay");
        self.0.state.send_replace(State::Up {
            carrier: carrier.clone(),
            epoch,
        });

        let mut replace = self.0.replace.subscribe();
        let drain = listen(carrier.clone());
        let rotate = sleep(self.rotate_after());
        tokio::pin!(drain, rotate);
        let mut look = interval(LOOK);
        let (mut due, mut heard, mut leaving) = (false, false, false);
        loop {
            tokio::select! {
                reason = carrier.closed() => {
                    tracing::warn!(carrier = carrier.id(), %reason, "the carrier ended");
                    return Ended::Lost;
                }
                stream = incoming.next() => match stream {
                    // A relay has nothing to open towards a local proxy.
                    Some(stream) => {
                        let code = RefusalCode::Unsupported;
                        stream.refuse(Refusal::new(code, "a local proxy accepts no streams")).await;
                        continue;
                    }
                    None => {
                        carrier.closed().await;
                        return Ended::Lost;
                    }
                },
                wait = &mut drain, if !heard => {
                    heard = true;
                    if let Some(wait) = wait {
                        tracing::info!(carrier = carrier.id(), ?wait, "the relay asks us to move");
                        rotate.as_mut().reset(Instant::now() + wait);
                        leaving = true;
                    }
                    continue;
                }
                () = &mut rotate, if !due => due = true,
                () = is_asked(&mut replace, epoch), if !due => due = true,
                // The carrier may be dead and not know it.
                Ok(()) = network.changed() => due = true,
                _ = look.tick() => {
                    // The control stream is one; sessions that are kept count as use.
                    if !self.is_used() && carrier.streams() <= 1 {
                        tracing::info!(carrier = carrier.id(), "the carrier is no longer needed");
                        carrier.close(CloseCode::Normal, "not needed");
                        return Ended::Idle;
                    }
                    if !due {
                        continue;
                    }
                }
            }
            if !due {
                continue;
            }
            // Make before break; without a successor the old one goes on, and is asked again at
            // the next look.
            match self.dial_anew(network).await {
                Ok(successor) => {
                    while retired.try_join_next().is_some() {}
                    retired.spawn(retire(carrier, incoming));
                    return Ended::Replaced(successor);
                }
                Err(failure) => {
                    tracing::warn!(%failure, "cannot replace the carrier yet");
                    // There is no other relay: the sessions that only wait for work must not
                    // hold up the one that wants to stop.
                    if std::mem::take(&mut leaving) {
                        self.0.generation.fetch_add(1, Ordering::AcqRel);
                    }
                    look.reset_after(EAGER);
                }
            }
        }
    }

    /// Dials; from the beginning when the network has changed meanwhile, for a dial into one that is
    /// gone only times out.
    async fn dial_anew(&self, network: &mut watch::Receiver<u64>) -> Result<Connection, Failure> {
        loop {
            network.mark_unchanged();
            tokio::select! {
                dialled = self.0.dial() => return dialled,
                Ok(()) = network.changed() => {}
            }
        }
    }

    fn rotate_after(&self) -> Duration {
        let not_after = self.credentials().identity.not_after();
        let left = not_after
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        let age = self
            .0
            .timing
            .rotate
            .mul_f64(rand::rng().random_range(0.8..1.2));
        age.min(left.mul_f64(0.8)).max(EAGER)
    }
}

/// Ends when the carrier of this epoch is to be replaced.
async fn is_asked(replace: &mut watch::Receiver<u64>, epoch: u64) {
    if replace.wait_for(|asked| *asked >= epoch).await.is_err() {
        std::future::pending().await
    }
}

/// Opens the control stream and waits for the relay to say that it drains; how long to stay then.
async fn listen(carrier: Carrier) -> Option<Duration> {
    let mut stream: mux::Stream = match carrier.open(StreamKind::Control(Control {}).into()).await {
        Ok((stream, _)) => stream,
        Err(error) => {
            tracing::debug!(%error, "no control stream");
            return None;
        }
    };
    loop {
        let message = message::read::<ControlMessage, _>(&mut stream, CONTROL_CAP).await;
        match message.ok()?.kind {
            Some(ControlKind::Drain(Drain {
                delay_ms,
                spread_ms,
                ..
            })) => {
                let spread = Duration::from_millis(spread_ms).min(MAX_DRAIN);
                let delay = Duration::from_millis(delay_ms).min(MAX_DRAIN);
                return Some(delay + spread.mul_f64(rand::rng().random::<f64>()));
            }
            // Which relay it is and how many there are matters to agents only.
            Some(ControlKind::AgentStatus(_) | ControlKind::RelaySet(_)) | None => {}
        }
    }
}

/// Keeps a replaced carrier until its streams have ended.
async fn retire(carrier: Carrier, mut incoming: Incoming) {
    let emptied = async {
        let mut look = interval(LOOK);
        // The first look is at once, when sessions have not moved yet.
        look.tick().await;
        while carrier.streams() > 1 {
            look.tick().await;
        }
    };
    let ended = async {
        while let Some(stream) = incoming.next().await {
            stream
                .refuse(Refusal::new(
                    RefusalCode::Draining,
                    "this carrier was replaced",
                ))
                .await;
        }
    };
    let _ = timeout(RETIRE, async {
        tokio::select! {
            () = emptied => {}
            () = ended => {}
            _ = carrier.closed() => {}
        }
    })
    .await;
    carrier.close(CloseCode::Normal, "replaced");
}
