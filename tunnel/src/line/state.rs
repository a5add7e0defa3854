//! The state of a line: what its reader, its writer and its supervisor share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::task::{ArcWake, AtomicWaker};
use tokio::sync::watch;

use crate::proto::line::machine::Machine;
use crate::proto::line::resume::Key;
use crate::proto::line::stall_detector::StallDetector;
use crate::proto::line::window_autotune::WindowAutotune;
use crate::proto::traffic::{TrafficClass, TrafficMeter};

use super::LineError;
use super::memory::{LineBudgets, LineMemory};

/// What the two ends have agreed on.
pub(super) struct Terms {
    pub(super) id: Vec<u8>,
    pub(super) window: u32,
    pub(super) peer_window: u32,
    pub(super) detached: Duration,
}

/// Shared by a line and its handles.
pub(super) struct Shared<S> {
    pub(super) id: Vec<u8>,
    /// How long the line may be without a stream; zero: not at all.
    pub(super) detached: Duration,
    core: Mutex<Core<S>>,
    pub(super) wakers: Arc<Wakers>,
    pub(super) phase: watch::Sender<Phase>,
}

/// A snapshot of a line's state, for its supervisor. Derived from the state; never set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Phase {
    /// Counts the streams that the line had, or was to have.
    pub epoch: u64,
    /// A stream carries the line.
    pub attached: bool,
    /// The other end asks that the line be resumed over another carrier, because this one is to end.
    pub move_requested: bool,
    /// Its reader and writer were dropped; what was written may still be on its way.
    pub released: bool,
    /// There is nothing left to resume.
    pub over: bool,
    /// What the line moves, as measured by this end; see [`Handle::tick`](super::Handle::tick).
    pub class: TrafficClass,
}

/// The line's state, under one lock.
pub(super) struct Core<S> {
    /// There is one exactly while the machine is attached and the line is not over; a line that is
    /// over may keep it to close it.
    pub(super) stream: Option<S>,
    pub(super) machine: Machine,
    pub(super) lifecycle: Lifecycle,
    pub(super) owner: Owner,
    /// Authenticates a resumption of the line; `None` before the session on it is established.
    pub(super) key: Option<Key>,
    pub(super) stall_detector: StallDetector,
    pub(super) autotune: WindowAutotune,
    pub(super) memory: LineMemory,
    pub(super) traffic: TrafficMeter,
    /// Counts what the meter is to count; `None`: all bytes of the line.
    pub(super) traffic_source: Option<Arc<AtomicU64>>,
    /// A writer waits for room, and is to be woken when there is some.
    pub(super) writer_waits: bool,
    /// Bytes received at the last [`Handle::tick`](super::Handle::tick).
    pub(super) last_received: u64,
    /// Streams dropped because of invalid frames on them.
    pub(super) dropped_streams: u32,
}

/// Whether there is something left of the line to read, to write or to resume.
#[derive(Debug)]
pub(super) enum Lifecycle {
    /// Has a stream, or can be resumed.
    Open,
    /// Over without an error that this end would have to report.
    Over,
    /// Over, and the stream was shut down after both ends had sent FIN.
    Closed,
    /// Over, with the error that its reader and writer get.
    Failed(LineError),
}

impl Lifecycle {
    pub(super) fn is_over(&self) -> bool {
        !matches!(self, Self::Open)
    }

    pub(super) fn failure(&self) -> Option<&LineError> {
        match self {
            Self::Failed(error) => Some(error),
            Self::Open | Self::Over | Self::Closed => None,
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self, Self::Closed)
    }
}

/// Whether the line still has its reader and writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    Held,
    /// They were dropped. The supervisor drives the line until the peer has what was written.
    Released,
}

/// Wakes the reader and the writer of one line, and its supervisor where that has to drive it.
#[derive(Default)]
pub(super) struct Wakers {
    pub(super) reader: AtomicWaker,
    pub(super) writer: AtomicWaker,
    pub(super) supervisor: AtomicWaker,
    pub(super) supervisor_drives: AtomicBool,
}

impl ArcWake for Wakers {
    fn wake_by_ref(wakers: &Arc<Self>) {
        wakers.reader.wake();
        wakers.writer.wake();
        if wakers.supervisor_drives.load(Ordering::Acquire) {
            wakers.supervisor.wake();
        }
    }
}

impl<S> Shared<S> {
    pub(super) fn new(stream: S, terms: Terms, budgets: LineBudgets) -> Self {
        let resumable = !terms.detached.is_zero();
        let core = Core {
            stream: Some(stream),
            machine: Machine::new(terms.window, terms.peer_window, resumable),
            lifecycle: Lifecycle::Open,
            owner: Owner::Held,
            key: None,
            stall_detector: StallDetector::default(),
            autotune: WindowAutotune::default(),
            memory: LineMemory::new(budgets),
            traffic: TrafficMeter::default(),
            traffic_source: None,
            writer_waits: false,
            last_received: 0,
            dropped_streams: 0,
        };
        Self {
            id: terms.id,
            detached: terms.detached,
            wakers: Arc::default(),
            phase: watch::Sender::new(core.phase()),
            core: Mutex::new(core),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Core<S>> {
        // Nothing under this lock can panic half-way through a change.
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a change of phase to the supervisor.
    pub(super) fn publish(&self, core: &Core<S>) {
        // Without an owner, only the supervisor polls the line; and a retransmission must not depend on the
        // owner's next read or write.
        let drives = core.owner == Owner::Released || core.machine.is_retransmitting();
        self.wakers
            .supervisor_drives
            .store(drives, Ordering::Release);
        let phase = core.phase();
        self.phase.send_if_modified(|known| {
            let changed = *known != phase;
            *known = phase;
            changed
        });
    }

    pub(super) fn wake_all(&self) {
        self.wakers.reader.wake();
        self.wakers.writer.wake();
    }
}

impl<S> Core<S> {
    fn phase(&self) -> Phase {
        Phase {
            epoch: self.machine.epoch(),
            attached: self.stream.is_some(),
            move_requested: self.machine.is_move_requested(),
            released: self.owner == Owner::Released,
            over: self.lifecycle.is_over(),
            class: self.traffic.class(),
        }
    }

    /// A lost stream does not end the line.
    pub(super) fn may_resume(&self) -> bool {
        self.key.is_some() && self.machine.is_resumable() && !self.lifecycle.is_over()
    }
}
