//! The API session: HTTP/2 on a sealed session, for all plain requests to one cluster.

use super::{Epoch, Ground, Shared, lock};
use crate::{body::Upload, error::Failure, forward::lost, metrics::Held};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::{
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use throwline_tunnel::{far, line::Handle, mux, piece::PIECE, proto::messages::LineKind};
use tokio::time::Instant;

/// What one stalled reader can make us hold on an API session.
const STREAM_WINDOW: u32 = 512 * 1024;
/// The one session to a cluster that may be far away has windows for that, see [`far`], and few
/// streams, so that readers which stop hold 144 MiB at most; those beyond have another session.
const FAR_STREAMS: usize = 8;
/// From this round trip on 512 KiB would hold bulk up, and a busy machine is not the reason.
const FAR: Duration = Duration::from_millis(20);
/// The most that HTTP/2 can say: a stalled stream uses its own window up and no other's.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;
/// Bytes of a request body held for a stream before its source is no longer read.
const SEND_BUFFER: usize = 128 * 1024;
/// Frame size we accept: a piece of bulk. More would only lengthen the wait of small answers behind
/// large ones.
const MAX_FRAME: u32 = PIECE as u32;
const HEADER_LIST: u32 = 64 * 1024;
/// Streams before another session is opened. The agent allows 200; the rest is room for requests
/// that were leased a moment ago.
const STREAMS: usize = 180;

type Sender = http2::SendRequest<Upload>;

/// One API session, as its cluster holds it. Dropping it lets its streams finish.
pub(crate) struct ApiSession {
    sender: Sender,
    is_far: bool,
    ground: Ground,
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
}

impl Lease {
    /// The line below, if that outlives its carrier.
    pub(crate) fn line(&self) -> Option<Handle<mux::Stream>> {
        self.line.clone()
    }

    /// Why the agent ended the session, where that says more than that a request was lost.
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
    /// `may_be_far`: it may have the windows of a long path, if that is what it is on.
    pub(crate) async fn open(
        shared: &Arc<Shared>,
        cluster: &str,
        may_be_far: bool,
    ) -> Result<Self, Failure> {
        let dialed = shared.dial.dial(cluster, LineKind::Api).await?;
        let is_far = may_be_far && dialed.round_trip >= FAR;
        let window = match is_far {
            true => far::stream_window(dialed.round_trip),
            false => STREAM_WINDOW,
        };
        let ground = Ground::of(&dialed);
        // A line that outlives its carriers knows by itself whether its other end is there.
        let ping = ground.line.is_none().then_some(shared.timing.session_ping);
        let mut builder = http2::Builder::new(TokioExecutor::new());
        builder
            .timer(TokioTimer::new())
            .initial_stream_window_size(window)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_send_buf_size(SEND_BUFFER)
            .max_header_list_size(HEADER_LIST)
            .keep_alive_interval(ping)
            .keep_alive_timeout(shared.timing.session_ping)
            .keep_alive_while_idle(true);
        let (sender, connection) = builder
            .handshake::<_, Upload>(TokioIo::new(dialed.io))
            .await
            .map_err(|error| Failure::Lost {
                cluster: cluster.to_owned(),
                why: error.to_string(),
            })?;
        let held = Held::one(&shared.metrics.api_sessions);
        let name = cluster.to_owned();
        let ended = Arc::new(OnceLock::new());
        let end = ended.clone();
        shared.spawn(async move {
            let _held = held;
            match connection.await {
                Ok(()) => tracing::debug!(cluster = name, "api session ended"),
                Err(error) => {
                    tracing::debug!(cluster = name, %error, "api session failed");
                    let failure = lost(&name, &error);
                    if matches!(failure, Failure::AgentRefusesUs { .. }) {
                        let _ = end.set(failure);
                    }
                }
            }
        });
        Ok(Self {
            sender,
            is_far,
            ground,
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
            line: self.ground.line.clone(),
        }
    }

    pub(crate) fn is_usable(&self, now: Epoch) -> bool {
        self.ground.is_current(now) && !self.sender.is_closed()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.ground.is_connected()
    }

    pub(crate) fn has_room(&self) -> bool {
        let most = if self.is_far { FAR_STREAMS } else { STREAMS };
        self.in_flight.load(Ordering::Acquire) < most
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
