//! The API session: HTTP/2 on a sealed session, for all plain requests to one cluster.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use throwline_kube_wire::http2::interim::Bounded;
use throwline_ops::GaugeGuard;
use throwline_tunnel::line::Handle;
use throwline_tunnel::proto::messages::LineKind;
use throwline_tunnel::sizes::BULK_CHUNK;
use throwline_tunnel::{bdp, mux};
use tokio::time::Instant;

use crate::failure::{Cause, Failure};
use crate::mutex::lock;
use crate::session::body::ApiBody;
use crate::session::context::SessionContext;
use crate::session::dial::{Epoch, SessionBasis};
use crate::session::errors::lost;
use crate::session::long_transfers::{LongTransfers, Transfer};

/// The maximum of HTTP/2, so that a stalled stream exhausts its own window and no other's.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Largest frame that is accepted. Larger ones would delay small answers behind large ones.
const MAX_FRAME: u32 = BULK_CHUNK as u32;
const HEADER_LIST: u32 = 64 * 1024;

type Sender = http2::SendRequest<ApiBody>;

/// One API session, as its cluster holds it. Dropping it lets its streams finish.
pub(crate) struct ApiSession {
    sender: Sender,
    is_far: bool,
    /// Requests at once, at most.
    max_streams: usize,
    basis: SessionBasis,
    long_transfers: LongTransfers,
    in_flight: Arc<AtomicUsize>,
    last_used: Arc<Mutex<Instant>>,
    ended: Arc<OnceLock<Failure>>,
}

/// The right to one stream; give it to the response's body.
pub(crate) struct Lease {
    pub(crate) sender: Sender,
    in_flight: Arc<AtomicUsize>,
    last_used: Arc<Mutex<Instant>>,
    ended: Arc<OnceLock<Failure>>,
    line: Option<Handle<mux::Stream>>,
    long_transfers: LongTransfers,
    answer: Transfer,
}

impl Lease {
    /// Bytes of the answer's body have come.
    pub(crate) fn received(&mut self, bytes: usize) {
        self.answer.count(bytes);
    }

    /// Counts the request's body.
    pub(crate) fn upload(&self) -> Transfer {
        self.long_transfers.begin()
    }

    /// The line below, if that outlives its carrier.
    pub(crate) fn line(&self) -> Option<Handle<mux::Stream>> {
        self.line.clone()
    }

    /// Why the agent ended the session, where that is more specific than a lost request.
    pub(crate) fn ended(&self) -> Option<Failure> {
        self.ended.get().cloned()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.in_flight.fetch_sub(1, Ordering::AcqRel);
        *lock(&self.last_used) = Instant::now();
    }
}

impl ApiSession {
    /// `may_be_far`: whether it may have the larger windows of a long path, see [`bdp`].
    pub(crate) async fn open(
        context: &Arc<SessionContext>,
        cluster: &str,
        may_be_far: bool,
    ) -> Result<Self, Failure> {
        let dialed = context.dial.dial(cluster, LineKind::Api).await?;
        // The windows are announced at the start of the session, so the round trip has to be known
        // before.
        let is_far = may_be_far && dialed.round_trip >= bdp::THRESHOLD;
        let limits = context.limits;
        let window = if is_far {
            bdp::stream_window(dialed.round_trip).min(limits.far_stream_window)
        } else {
            limits.stream_window
        };
        let basis = SessionBasis::of(&dialed);
        let long_transfers = LongTransfers::default();
        if let Some(line) = &basis.line {
            line.classify_by(long_transfers.bytes());
        }
        // A resumable line detects a lost peer without a PING.
        let ping = basis.line.is_none().then_some(context.timing.session_ping);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_send_buf_size(limits.send_buffer)
            .max_header_list_size(HEADER_LIST)
            .keep_alive_interval(ping)
            .keep_alive_timeout(context.timing.session_ping)
            .keep_alive_while_idle(true);
        let (sender, connection) = builder
            .handshake::<_, ApiBody>(TokioIo::new(Bounded::new(dialed.io)))
            .await
            .map_err(|error| Failure::Lost {
                cluster: cluster.to_owned(),
                source: Cause::Handshake(Arc::new(error)),
            })?;
        let held = GaugeGuard::new(&context.metrics.api_sessions);
        let name = cluster.to_owned();
        let ended = Arc::new(OnceLock::new());
        let end = ended.clone();
        context.spawn(async move {
            let _held = held;
            match connection.await {
                Ok(()) => tracing::debug!(cluster = name, "api session ended"),
                Err(error) => {
                    tracing::debug!(cluster = name, %error, "api session failed");
                    let failure = lost(&name, error);
                    // The requests on it only see a closed connection; this reason is final, and so
                    // kept for them.
                    if matches!(failure, Failure::AgentRefusesUs { .. }) {
                        let _ = end.set(failure);
                    }
                }
            }
        });
        Ok(Self {
            sender,
            is_far,
            max_streams: if is_far {
                limits.far_streams
            } else {
                limits.streams
            },
            basis,
            long_transfers,
            in_flight: Arc::default(),
            last_used: Arc::new(Mutex::new(Instant::now())),
            ended,
        })
    }

    pub(crate) fn lease(&self) -> Lease {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        *lock(&self.last_used) = Instant::now();
        Lease {
            sender: self.sender.clone(),
            in_flight: self.in_flight.clone(),
            last_used: self.last_used.clone(),
            ended: self.ended.clone(),
            line: self.basis.line.clone(),
            long_transfers: self.long_transfers.clone(),
            answer: self.long_transfers.begin(),
        }
    }

    pub(crate) fn is_usable(&self, now: Epoch) -> bool {
        self.basis.is_current(now) && !self.sender.is_closed()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.basis.is_connected()
    }

    /// Whether its line moves bulk now, behind which a small answer would wait.
    pub(crate) fn is_bulk(&self) -> bool {
        let line = self.basis.line.as_ref();
        line.is_some_and(|line| line.phase().class.is_bulk())
    }

    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) < self.max_streams
    }

    pub(crate) fn is_far(&self) -> bool {
        self.is_far
    }

    pub(crate) fn is_used(&self, now: Instant, idle: Duration) -> bool {
        !self.sender.is_closed()
            && (self.in_flight.load(Ordering::Acquire) > 0
                || now.saturating_duration_since(*lock(&self.last_used)) <= idle)
    }
}
