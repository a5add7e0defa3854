//! What the local proxy decides about its carrier: it is dialled on demand, dialled again while it is
//! in use, and closed when it is not. `throwline-uplink` does the rest.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use throwline_ops::{Shutdown, network};
use throwline_tunnel::carrier::{Carrier, Connection, IncomingStream};
use throwline_tunnel::proto::close::{CloseCode, CloseReason};
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_tunnel::revocations;
use throwline_uplink::{
    CONTROL_STREAMS, Config, Environment, FirstRetry, Metrics, Pool, ReplaceReason, UplinkHandler,
};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Link;
use super::path::{Path, State};
use super::revocations::Lists;
use crate::config::Timing;
use crate::failure::Failure;

/// While a request waits, a dial is made this often, whatever the back-off is; and a carrier whose
/// successor cannot be dialled is attempted to be replaced as often.
const EAGER: Duration = Duration::from_secs(1);
/// Lines wait when a carrier is lost that had worked: the first dial is made within a part of a second.
const FIRST_RETRY: FirstRetry = FirstRetry {
    within: Duration::from_millis(200),
    settled: Duration::from_secs(2),
};
/// The longest that a relay can ask us to stay on a carrier that we should leave.
const MAX_DRAIN: Duration = Duration::from_secs(300);
/// How long a replaced carrier may go on for the streams that it has.
const RETIRE: Duration = Duration::from_secs(24 * 3600);

fn config(timing: &Timing) -> Config {
    Config {
        count: 1,
        first_retry: Some(FIRST_RETRY),
        urgent: EAGER,
        rotate: timing.carrier_life,
        replace_retry: Some(EAGER),
        retire: Some(RETIRE),
        max_drain: MAX_DRAIN,
        ..Config::default()
    }
}

impl Link {
    /// Keeps a carrier up while one is needed; ends with `stop`.
    pub(crate) async fn drive(self, stop: CancellationToken) {
        let (stopping, shutdown) = Shutdown::new();
        let network = network::changes();
        let pools = TrafficClass::ALL.map(|class| {
            let environment = Environment {
                shutdown: shutdown.clone(),
                ready: None,
                network: network.clone(),
                metrics: Metrics::new("local_proxy").expect("the name is of letters"),
            };
            let uplink = Uplink {
                link: self.clone(),
                class,
            };
            Pool::start(
                Arc::new(uplink),
                self.path(class).carriers.clone(),
                config(&self.0.timing),
                environment,
            )
        });
        stop.run_until_cancelled(self.look()).await;
        self.forget_lines();
        stopping.trigger();
        let closed = pools.map(|pool| async {
            let remaining = pool.ended().await;
            // The process may end after it. An agent that did not receive the close waits for each line.
            remaining.close("the local proxy stops").await;
        });
        join_all(closed).await;
        for class in TrafficClass::ALL {
            self.path(class).set(State::Down { last: None });
        }
    }
}

/// The carrier of one class.
struct Uplink {
    link: Link,
    class: TrafficClass,
}

impl Uplink {
    fn path(&self) -> &Path {
        self.link.path(self.class)
    }

    fn used_until(&self) -> Option<Instant> {
        self.path().used_until(self.link.0.timing.carrier_idle)
    }
}

impl UplinkHandler for Uplink {
    type Error = Failure;

    async fn dial(&self, _avoid: Vec<String>) -> Result<Connection, Failure> {
        self.link.0.dial(self.class).await
    }

    /// A relay has nothing to open towards a local proxy.
    fn accept(&self, stream: IncomingStream, retiring: &Shutdown) {
        let refusal = match retiring.is_requested() {
            true => Refusal::new(RefusalCode::Draining, "this carrier was replaced"),
            false => Refusal::new(RefusalCode::Unsupported, "a local proxy accepts no streams"),
        };
        tokio::spawn(stream.refuse(refusal));
    }

    fn failed(&self, failure: &Failure) {
        let last = Some(failure.clone());
        self.path().set(State::Down { last });
    }

    fn not_replaced(&self, _failure: &Failure, reason: ReplaceReason, attempt: u32) {
        // There is no other relay: the sessions that only wait for work must not hold up the relay
        // that is to stop.
        if reason == ReplaceReason::Drain && attempt == 1 {
            self.link.0.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn connected(&self, carrier: &Carrier, epoch: u64) {
        self.link.0.metrics.carriers.inc();
        let carrier = carrier.clone();
        self.path().set(State::Up { carrier, epoch });
    }

    fn disconnected(&self, reason: Option<&CloseReason>) {
        // Those that wait receive that failure; the next request causes another dial.
        let is_revoked = reason.is_some_and(|reason| reason.code == CloseCode::Revoked);
        let last = is_revoked.then_some(Failure::Revoked);
        self.path().set(State::Down { last });
    }

    async fn follow_revocations(&self, carrier: Carrier, newest: watch::Receiver<u64>) {
        revocations::follow(carrier, newest, Lists::of(&self.link)).await;
    }

    async fn needed(&self) {
        let is_used = || self.used_until().is_some_and(|end| Instant::now() < end);
        while !is_used() {
            self.path().demanded().await;
        }
    }

    async fn unused(&self, carrier: &Carrier) {
        loop {
            // Sessions that are kept count as use.
            carrier.idle(CONTROL_STREAMS).await;
            match self.used_until() {
                Some(end) if Instant::now() < end => sleep_until(end).await,
                _ if carrier.streams() <= CONTROL_STREAMS => return,
                _ => {}
            }
        }
    }

    async fn urgent(&self) {
        self.path().demanded().await;
    }

    /// Well before the certificate ends, with which the relay would end the carrier.
    fn max_age(&self) -> Duration {
        let not_after = self.link.credentials().identity.not_after();
        let left = not_after.duration_since(SystemTime::now());
        left.unwrap_or_default().mul_f64(0.8).max(EAGER)
    }
}
