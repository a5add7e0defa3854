//! The carrier to the relay: one for all clusters, dialled when somebody needs it, replaced before
//! it ends where that can be known, and the lines on it.

mod dial;
mod drive;
mod keep;

use dial::line_error;
pub(crate) use dial::{dial_config, dial_error, open_error, refused_by_agent};

use super::{Dial, Dialed, Epoch};
use crate::{
    config::{Outbound, Timing},
    error::Failure,
    metrics::Metrics,
    store::{Credentials, Store},
};
use futures::future::BoxFuture;
use keep::Keeper;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use throwline_certs::{Kind, SpiffeId, Validator, tls};
use throwline_tunnel::{
    carrier::{Carrier, OpenError},
    line::{self, Handle},
    mux,
    proto::{
        self,
        messages::{LineHello, LineKind, Open, RefusalCode},
    },
    session,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, timeout},
};

/// From the open's reply to the line's own. The same reasoning as a handshake's.
const LINE_HELLO: Duration = Duration::from_secs(10);
/// Between attempts to open a session while something on the way to it changes.
const AGAIN: Duration = Duration::from_millis(100);

/// The link to the relay. Clones are the same link.
#[derive(Clone)]
pub(crate) struct Link(Arc<Inner>);

struct Inner {
    store: Store,
    outbound: Outbound,
    timing: Timing,
    metrics: Metrics,
    /// Tells two local proxies of one user apart.
    instance: String,
    credentials: RwLock<Arc<Credentials>>,
    state: watch::Sender<State>,
    epoch: AtomicU64,
    /// Rises with the identity, and when sessions must leave a carrier that has no successor.
    generation: AtomicU64,
    lines: Mutex<Lines>,
    /// There is a line.
    kept: Notify,
    /// Somebody waits for a carrier.
    demand: Notify,
    /// The carrier of this epoch, and any before it, is to be replaced: the identity was, or its
    /// relay takes no new lines.
    replace: watch::Sender<u64>,
    last_use: Mutex<Option<Instant>>,
}

/// The lines that are kept, and who keeps them.
#[derive(Default)]
struct Lines {
    next: u64,
    held: HashMap<u64, (Handle<mux::Stream>, Arc<Notify>)>,
    keepers: JoinSet<()>,
}

#[derive(Clone)]
enum State {
    Down { last: Option<Failure> },
    Up { carrier: Carrier, epoch: u64 },
}

impl Link {
    /// A link that is down until somebody asks for a carrier and [`Link::drive`] runs.
    pub(crate) fn new(
        store: Store,
        credentials: Credentials,
        outbound: Outbound,
        timing: Timing,
        metrics: Metrics,
    ) -> Self {
        Self(Arc::new(Inner {
            store,
            outbound,
            timing,
            metrics,
            instance: format!("{:016x}", rand::random::<u64>()),
            credentials: RwLock::new(Arc::new(credentials)),
            state: watch::Sender::new(State::Down { last: None }),
            epoch: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            lines: Mutex::default(),
            kept: Notify::new(),
            demand: Notify::new(),
            replace: watch::Sender::new(0),
            last_use: Mutex::default(),
        }))
    }

    /// A live carrier, waiting a bounded time for one. An end that nobody's patience can change is
    /// told at once.
    pub(crate) async fn carrier(&self) -> Result<(Carrier, u64), Failure> {
        let wait = self.0.timing.wait_for_relay;
        self.touch();
        let mut state = self.0.state.subscribe();
        let mut last = match &*state.borrow_and_update() {
            State::Up { carrier, epoch } if !carrier.is_closed() => {
                return Ok((carrier.clone(), *epoch));
            }
            State::Up { .. } => None,
            State::Down { last } => last.clone(),
        };
        self.0.demand.notify_one();
        let waited = timeout(wait, async {
            while state.changed().await.is_ok() {
                match &*state.borrow_and_update() {
                    State::Up { carrier, epoch } => return Some(Ok((carrier.clone(), *epoch))),
                    State::Down {
                        last: Some(failure),
                    } if !failure.may_pass() => {
                        return Some(Err(failure.clone()));
                    }
                    State::Down { last: failure } => last = failure.clone().or(last.take()),
                }
                self.0.demand.notify_one();
            }
            None
        })
        .await;
        match waited {
            Ok(Some(result)) => result,
            Ok(None) => Err(Failure::Stopping),
            Err(_) => Err(last.unwrap_or_else(|| Failure::RelayUnreachable {
                relay: self.credentials().relay.url.to_string(),
                why: format!("no connection within {} s", wait.as_secs()),
                transient: true,
            })),
        }
    }

    pub(crate) fn credentials(&self) -> Arc<Credentials> {
        let credentials = &self.0.credentials;
        credentials
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Uses another identity from now on, and moves to a carrier that proves it.
    pub(crate) fn set_credentials(&self, credentials: Credentials) {
        let slot = &self.0.credentials;
        *slot.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(credentials);
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        self.replace(self.0.epoch.load(Ordering::Acquire));
    }

    fn replace(&self, epoch: u64) {
        self.0
            .replace
            .send_modify(|asked| *asked = epoch.max(*asked));
    }

    pub(crate) fn store(&self) -> &Store {
        &self.0.store
    }

    fn touch(&self) {
        let last_use = &self.0.last_use;
        *last_use.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_used(&self) -> bool {
        let last_use = &self.0.last_use;
        let last = *last_use.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| last.elapsed() < self.0.timing.carrier_idle)
    }

    /// Opens a session. What is lost on the way to it has cost nobody anything, and a relay that goes
    /// away is no reason for a request to fail: it is tried again, for as long as a request waits
    /// for a relay.
    async fn open(&self, cluster: &str, kind: LineKind) -> Result<Dialed, Failure> {
        let deadline = Instant::now() + self.0.timing.wait_for_relay;
        loop {
            let failure = match self.open_once(cluster, kind).await {
                Ok(dialed) => return Ok(dialed),
                Err(failure) => failure,
            };
            let may_go_well = match &failure {
                Failure::Lost { .. } => true,
                Failure::Refused { refusal, .. } => refusal.code() == RefusalCode::Draining,
                _ => false,
            };
            if !may_go_well || Instant::now() >= deadline {
                return Err(failure);
            }
            tracing::debug!(cluster, %failure, "a session is opened anew");
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn open_once(&self, cluster: &str, kind: LineKind) -> Result<Dialed, Failure> {
        let line_id: [u8; 16] = rand::random();
        let now = self.epoch();
        let (carrier, epoch) = self.carrier().await?;
        let open = Open {
            version: proto::VERSION,
            cluster: cluster.to_owned(),
            line_id: line_id.to_vec(),
            kind: kind.into(),
            ..Open::default()
        };
        let (stream, reply) = carrier.open(open.into()).await.map_err(|error| {
            // The next one is dialled at once, for the time that a relay gave everybody to move is
            // not for whoever has work.
            let moving = match &error {
                OpenError::CarrierLost(_) => true,
                OpenError::Refused(refusal) => refusal.code() == RefusalCode::Draining,
                _ => false,
            };
            if moving {
                self.replace(epoch);
            }
            open_error(cluster, error)
        })?;
        self.0.metrics.lines.inc();
        let hello = LineHello::new(line_id, self.0.timing.detached);
        let began = Instant::now();
        let line = timeout(LINE_HELLO, line::connect(stream, hello))
            .await
            .map_err(|_| Failure::Timeout {
                cluster: cluster.to_owned(),
                seconds: LINE_HELLO.as_secs(),
            })?
            .map_err(|error| line_error(cluster, &error))?;
        let greeted = began.elapsed();
        let config = self.session_config(cluster, kind)?;
        let began = Instant::now();
        let io = session::connect(line, config, tls::session_name())
            .await
            .map_err(|error| dial::session_error(cluster, &error))?;
        // Each took one; a busy machine makes one longer rather than both.
        let round_trip = greeted.min(began.elapsed());
        let line = io.get_ref().0.handle();
        if let Some(handle) = &line {
            let doubt = Arc::new(Notify::new());
            self.keep(Keeper {
                link: self.clone(),
                handle: handle.clone(),
                cluster: cluster.to_owned(),
                kind,
                agent_instance: reply.agent_instance,
                carrier,
                epoch,
                doubt,
            });
        }
        Ok(Dialed {
            io: Box::new(io),
            epoch: Epoch {
                generation: now.generation,
                carrier: epoch,
            },
            line,
            round_trip,
        })
    }

    /// Has a line kept until it is over.
    fn keep(&self, keeper: Keeper) {
        let mut lines = self.lock_lines();
        while lines.keepers.try_join_next().is_some() {}
        let number = lines.next;
        lines.next += 1;
        let watched = (keeper.handle.clone(), keeper.doubt.clone());
        lines.held.insert(number, watched);
        let link = self.clone();
        lines.keepers.spawn(async move {
            keeper.run().await;
            link.lock_lines().held.remove(&number);
        });
        drop(lines);
        self.0.kept.notify_one();
    }

    fn lines(&self) -> Vec<(Handle<mux::Stream>, Arc<Notify>)> {
        self.lock_lines().held.values().cloned().collect()
    }

    /// Nothing is kept any more, and no agent is to wait for us.
    fn forget_lines(&self) {
        let lines = std::mem::take(&mut *self.lock_lines());
        for (handle, _) in lines.held.values() {
            handle.abandon();
        }
    }

    fn lock_lines(&self) -> MutexGuard<'_, Lines> {
        // Nothing under this lock can panic half-way through a change.
        self.0.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn session_config(
        &self,
        cluster: &str,
        kind: LineKind,
    ) -> Result<Arc<rustls::ClientConfig>, Failure> {
        let internal = |error: &dyn std::fmt::Display| Failure::Internal(error.to_string());
        let credentials = self.credentials();
        let domain = credentials.roots.trust_domain().clone();
        let expect =
            SpiffeId::new(domain.clone(), Kind::Cluster, cluster).map_err(|e| internal(&e))?;
        let validator = Validator::new(credentials.roots.clone(), domain);
        let alpn = match kind {
            LineKind::Upgrade => tls::Alpn::Http11,
            LineKind::Api | LineKind::Unspecified => tls::Alpn::H2,
        };
        tls::session_client(&credentials.identity, &validator, expect, alpn)
            .map_err(|e| internal(&e))
    }
}

impl Dial for Link {
    fn dial<'a>(
        &'a self,
        cluster: &'a str,
        kind: LineKind,
    ) -> BoxFuture<'a, Result<Dialed, Failure>> {
        Box::pin(self.open(cluster, kind))
    }

    fn epoch(&self) -> Epoch {
        Epoch {
            generation: self.0.generation.load(Ordering::Acquire),
            carrier: self.0.epoch.load(Ordering::Acquire),
        }
    }
}
