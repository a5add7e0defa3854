//! The audit: one event a request, one line an event, written by a separate thread so that a slow disk or
//! a blocked pipe never delays a request without a trace.
//!
//! An output that does not keep up slows requests down before it loses events: a new request waits for
//! room, a bounded time. If there is none then, a required audit refuses the request, and any other loses
//! events, which is counted, logged, and written into the audit itself once its output accepts events.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use throwline_kube_wire::audit::{AuditUser, Event, Stage, timestamp};
use tokio::sync::{Notify, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use crate::metrics::Metrics;

mod file;
mod record;

pub use record::{Record, Subject};

/// Between two attempts to write a required event.
const RETRY: Duration = Duration::from_secs(1);

/// Where the audit goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Audit {
    #[default]
    Stdout,
    /// Appended to, made with mode 0600. A file that was moved away is created again within 1 s
    /// of the next event, so that rotating it needs no signal.
    File(PathBuf),
    Off,
}

/// How the audit treats requests when it cannot keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Events waiting to be written. Default 4096; worst case about 64 KiB each, when every request
    /// carries a URI of the largest size. As many again may wait for a place in this queue.
    pub queue: usize,
    /// How long a new request waits while three quarters of the queue wait. Default 5 s.
    pub max_wait: Duration,
    /// Refuse requests with 503 while their audit could not be written. Default false: they are
    /// then forwarded, and what is lost of their events is counted in
    /// `throwline_agent_audit_dropped_total` and recorded by a separate event.
    pub required: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue: 4096,
            max_wait: Duration::from_secs(5),
            required: false,
        }
    }
}

/// The audit is required and cannot be written now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the agent's audit cannot be written, and it is set to be required")]
pub struct Unavailable;

/// Cheap to clone; the writer ends when the last clone is gone and the queue is written.
#[derive(Clone)]
pub struct Sink {
    lines: Option<mpsc::Sender<Item>>,
    shared: Arc<Shared>,
    /// Of events that wait for a place in the queue.
    places: Arc<Semaphore>,
    limits: Limits,
    metrics: Metrics,
}

enum Item {
    Line(String),
    /// Answered when all items before it are written.
    Flush(oneshot::Sender<()>),
}

/// What the writer and requests share.
#[derive(Default)]
struct Shared {
    /// The last attempt to write failed.
    failing: AtomicBool,
    /// A request has waited without result, and none has found room since.
    stalled: AtomicBool,
    /// The writer has taken something out of the queue.
    taken: Notify,
}

impl Sink {
    /// Opens the target and starts its writer.
    ///
    /// # Errors
    /// The file cannot be opened: an error at the start rather than at the first request.
    pub fn open(audit: &Audit, limits: Limits, metrics: Metrics) -> io::Result<Self> {
        match audit {
            Audit::Off => Ok(Self {
                lines: None,
                shared: Arc::default(),
                places: Arc::new(Semaphore::new(0)),
                limits,
                metrics,
            }),
            Audit::Stdout => Self::start(io::stdout(), limits, metrics),
            Audit::File(path) => Self::start(file::LogFile::open(path)?, limits, metrics),
        }
    }

    /// Writes to any target, from a separate thread because writing may block.
    ///
    /// # Errors
    /// There can be no more threads.
    pub fn start<W: Write + Send + 'static>(
        target: W,
        limits: Limits,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let (lines, queue) = mpsc::channel(limits.queue.max(1));
        let shared = Arc::<Shared>::default();
        let writer = Writer {
            target,
            shared: Arc::clone(&shared),
            required: limits.required,
            recorded_lost: 0,
            metrics: metrics.clone(),
        };
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(queue))?;
        Ok(Self {
            lines: Some(lines),
            shared,
            places: Arc::new(Semaphore::new(limits.queue.max(1))),
            limits,
            metrics,
        })
    }

    /// Called before a request is forwarded. Waits for room, [`Limits::max_wait`] at most; a required audit
    /// for which another request has waited without result refuses at once until there is room.
    ///
    /// # Errors
    /// [`Unavailable`] when the audit is required and is failing, or three quarters of its queue wait:
    /// the last quarter is for the ends of requests that are under way.
    pub async fn admit(&self) -> Result<(), Unavailable> {
        let Some(lines) = &self.lines else {
            return Ok(());
        };
        if self.has_room(lines) {
            self.flows();
            return Ok(());
        }
        // One request has waited in vain; the others are refused at once instead of piling up.
        if self.limits.required && self.shared.stalled.load(Ordering::Relaxed) {
            return Err(Unavailable);
        }
        self.metrics.audit_waits.inc();
        let room = async {
            loop {
                // Before the check, so that no notification is missed.
                let taken = self.shared.taken.notified();
                if self.has_room(lines) {
                    return;
                }
                taken.await;
            }
        };
        if timeout(self.limits.max_wait, room).await.is_ok() {
            self.flows();
            return Ok(());
        }
        if !self.shared.stalled.swap(true, Ordering::Relaxed) {
            let required = self.limits.required;
            tracing::error!(required, "the audit's output takes no more events");
        }
        if self.limits.required {
            return Err(Unavailable);
        }
        Ok(())
    }

    /// Whether a required audit refuses requests now.
    pub fn refuses(&self) -> bool {
        let is_stuck = |lines| !self.has_room(lines) && self.shared.stalled.load(Ordering::Relaxed);
        self.limits.required && self.lines.as_ref().is_some_and(is_stuck)
    }

    /// Puts one event into the queue; never waits. `is_admitted`: its request was forwarded. The
    /// event of one that was is kept until there is room, that of another is not worth the memory.
    pub fn write(&self, event: &Event, is_admitted: bool) {
        let Some(lines) = &self.lines else { return };
        let Some(line) = event.to_line() else {
            return self.metrics.audit_dropped();
        };
        match lines.try_send(Item::Line(line)) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(line)) if is_admitted => self.wait(lines, line),
            Err(_) => self.metrics.audit_dropped(),
        }
    }

    /// Waits until all events so far are written, `deadline` at most; whether they are.
    pub async fn flushed(&self, deadline: Duration) -> bool {
        let Some(lines) = &self.lines else {
            return true;
        };
        let (done, is_done) = oneshot::channel();
        let flush = async { lines.send(Item::Flush(done)).await.is_ok() && is_done.await.is_ok() };
        timeout(deadline, flush).await.unwrap_or(false)
    }

    /// Waits in a separate task. A required audit has at most as many of them as requests under way.
    fn wait(&self, lines: &mpsc::Sender<Item>, line: Item) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.metrics.audit_dropped();
        };
        let max_wait = self.limits.max_wait;
        let (lines, metrics) = (lines.clone(), self.metrics.clone());
        if self.limits.required {
            runtime.spawn(async move { lines.send(line).await.is_ok() });
            return;
        }
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            return self.metrics.audit_dropped();
        };
        runtime.spawn(async move {
            let _place = place;
            if !matches!(timeout(max_wait, lines.send(line)).await, Ok(Ok(()))) {
                metrics.audit_dropped();
            }
        });
    }

    fn has_room(&self, lines: &mpsc::Sender<Item>) -> bool {
        let fits = lines.capacity() > lines.max_capacity() / 4 && !lines.is_closed();
        fits && !(self.limits.required && self.shared.failing.load(Ordering::Relaxed))
    }

    fn flows(&self) {
        if self.shared.stalled.load(Ordering::Relaxed)
            && self.shared.stalled.swap(false, Ordering::Relaxed)
        {
            tracing::info!("the audit's output takes events again");
        }
    }
}

struct Writer<W> {
    target: W,
    shared: Arc<Shared>,
    required: bool,
    /// How many of the lost events the audit has recorded.
    recorded_lost: u64,
    metrics: Metrics,
}

impl<W: Write> Writer<W> {
    fn run(mut self, mut queue: mpsc::Receiver<Item>) {
        let mut torn = false;
        while let Some(item) = queue.blocking_recv() {
            self.shared.taken.notify_waiters();
            match item {
                Item::Flush(done) => {
                    self.record_lost();
                    // The receiver may have timed out.
                    let _ = done.send(());
                }
                Item::Line(line) => {
                    if !self.shared.failing.load(Ordering::Relaxed) {
                        self.record_lost();
                    }
                    // After a failure the last line may be torn: it is ended before the next one begins.
                    while let Err(error) = self.write(&line, torn) {
                        torn = true;
                        self.is_broken(&error);
                        if !self.required {
                            self.metrics.audit_dropped();
                            break;
                        }
                        // The process ends: a disk that stays full must not hold it.
                        if queue.is_closed() {
                            return;
                        }
                        std::thread::sleep(RETRY);
                    }
                    torn = self.shared.failing.load(Ordering::Relaxed);
                }
            }
        }
        self.record_lost();
    }

    /// Records a gap of the audit in the audit itself. Where that fails, it is repeated later.
    fn record_lost(&mut self) {
        let lost = self.metrics.audit_lost();
        let since = lost - self.recorded_lost;
        if since == 0 {
            return;
        }
        let line = lost_events(since, uuid::Uuid::new_v4().to_string())
            .to_line()
            .unwrap_or_default();
        if self.target.write_all(line.as_bytes()).is_ok() {
            self.recorded_lost = lost;
        }
    }

    fn write(&mut self, line: &str, torn: bool) -> io::Result<()> {
        if torn {
            self.target.write_all(b"\n")?;
        }
        self.target.write_all(line.as_bytes())?;
        self.target.flush()?;
        if self.shared.failing.swap(false, Ordering::Relaxed) {
            self.shared.taken.notify_waiters();
            tracing::info!("the audit is written again");
        }
        Ok(())
    }

    fn is_broken(&self, error: &io::Error) {
        if !self.shared.failing.swap(true, Ordering::Relaxed) {
            tracing::error!(%error, required = self.required, "the audit cannot be written");
        }
    }
}

/// That `count` events are missing before this one, because they could not be written.
fn lost_events(count: u64, audit_id: String) -> Event {
    let now = timestamp(SystemTime::now());
    Event {
        kind: "Event",
        api_version: "audit.k8s.io/v1",
        level: "Metadata",
        audit_id,
        stage: Stage::ResponseComplete,
        request_uri: String::new(),
        verb: String::new(),
        user: AuditUser {
            username: "throwline-agent".to_owned(),
            groups: Vec::new(),
            extra: BTreeMap::new(),
        },
        source_ips: Vec::new(),
        user_agent: String::new(),
        object_ref: None,
        response_status: None,
        request_received_timestamp: now.clone(),
        stage_timestamp: now,
        annotations: BTreeMap::from([("throwline.dev/lost-events", count.to_string())]),
    }
}

#[cfg(test)]
mod tests;
