//! The audit: one event a request, one line an event, written by a thread of its own so that a slow
//! disk or a blocked pipe never holds a request up in silence.

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::metrics::Metrics;

mod event;
mod record;
mod target;

pub use event::{Event, ResponseStatus, Stage};
pub use record::{Record, Subject};

/// Between two attempts to write a required event.
const RETRY: Duration = Duration::from_secs(1);

/// Where the audit goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Audit {
    #[default]
    Stdout,
    /// Appended to, made with mode 0600. A file that was moved away is made anew within 1 s of the
    /// next event, so that rotating it needs no signal.
    File(PathBuf),
    Off,
}

/// How the audit treats requests when it cannot keep up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Events waiting to be written. Default 4096; worst case about 64 KiB each, when every request
    /// carries a URI of the largest size.
    pub queue: usize,
    /// Refuse requests with 503 while their audit could not be written. Default false: events are
    /// then dropped, counted in `throwline_agent_audit_dropped_total` and said in the log.
    pub required: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue: 4096,
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
    lines: Option<mpsc::Sender<String>>,
    failing: Arc<AtomicBool>,
    limits: Limits,
    metrics: Metrics,
}

impl Sink {
    /// Opens the target and starts its writer.
    ///
    /// # Errors
    /// The file cannot be opened: said at once rather than at the first request.
    pub fn open(audit: &Audit, limits: Limits, metrics: Metrics) -> io::Result<Self> {
        match audit {
            Audit::Off => Ok(Self {
                lines: None,
                failing: Arc::default(),
                limits,
                metrics,
            }),
            Audit::Stdout => Self::start(io::stdout(), limits, metrics),
            Audit::File(path) => Self::start(target::LogFile::open(path)?, limits, metrics),
        }
    }

    /// Writes to any target, from a thread of its own because writing may block.
    pub fn start<W: Write + Send + 'static>(
        target: W,
        limits: Limits,
        metrics: Metrics,
    ) -> io::Result<Self> {
        let (lines, queue) = mpsc::channel(limits.queue.max(1));
        let failing = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            target,
            failing: failing.clone(),
            required: limits.required,
            metrics: metrics.clone(),
        };
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || writer.run(queue))?;
        Ok(Self {
            lines: Some(lines),
            failing,
            limits,
            metrics,
        })
    }

    /// Asked before a request is forwarded.
    ///
    /// # Errors
    /// [`Unavailable`] when the audit is required and is failing, or three quarters of its queue wait:
    /// the last quarter is for the ends of requests that are under way.
    pub fn admit(&self) -> Result<(), Unavailable> {
        let Some(lines) = self.lines.as_ref().filter(|_| self.limits.required) else {
            return Ok(());
        };
        let full = lines.capacity() <= lines.max_capacity() / 4;
        if full || lines.is_closed() || self.failing.load(Ordering::Relaxed) {
            Err(Unavailable)
        } else {
            Ok(())
        }
    }

    /// Puts one event into the queue; never waits.
    pub fn write(&self, event: &Event) {
        let Some(lines) = &self.lines else { return };
        let Some(line) = event.to_line() else {
            return self.metrics.audit_dropped();
        };
        match lines.try_send(line) {
            Ok(()) => {}
            // The number of requests under way bounds how many wait here.
            Err(mpsc::error::TrySendError::Full(line)) if self.limits.required => {
                let lines = lines.clone();
                if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                    runtime.spawn(async move { lines.send(line).await });
                } else {
                    self.metrics.audit_dropped();
                }
            }
            Err(_) => self.metrics.audit_dropped(),
        }
    }
}

struct Writer<W> {
    target: W,
    failing: Arc<AtomicBool>,
    required: bool,
    metrics: Metrics,
}

impl<W: Write> Writer<W> {
    fn run(mut self, mut queue: mpsc::Receiver<String>) {
        let mut torn = false;
        while let Some(line) = queue.blocking_recv() {
            // After a failure the last line may be torn: it gets its end before the next begins.
            while let Err(error) = self.write(&line, torn) {
                torn = true;
                self.is_broken(&error);
                if !self.required {
                    self.metrics.audit_dropped();
                    break;
                }
                if queue.is_closed() {
                    return;
                }
                std::thread::sleep(RETRY);
            }
            torn = self.failing.load(Ordering::Relaxed);
        }
    }

    fn write(&mut self, line: &str, torn: bool) -> io::Result<()> {
        if torn {
            self.target.write_all(b"\n")?;
        }
        self.target.write_all(line.as_bytes())?;
        self.target.flush()?;
        if self.failing.swap(false, Ordering::Relaxed) {
            tracing::info!("the audit is written again");
        }
        Ok(())
    }

    fn is_broken(&self, error: &io::Error) {
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::error!(%error, required = self.required, "the audit cannot be written");
        }
    }
}

#[cfg(test)]
mod tests;
