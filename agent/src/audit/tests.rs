use std::sync::mpsc as std_mpsc;
use std::sync::{Condvar, Mutex};

use super::*;
use crate::audit::event::tests::event;

/// Holds every write until it is opened.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

struct Gated(Gate, std_mpsc::Sender<String>);

impl Write for Gated {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut open = self.0.0.0.lock().unwrap();
        while !*open {
            open = self.0.0.1.wait(open).unwrap();
        }
        let _ = self.1.send(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_blocked_target_drops_events_and_counts_them() {
    let (gate, (written, lines)) = (Gate::default(), std_mpsc::channel());
    let metrics = Metrics::default();
    let sink = Sink::start(
        Gated(gate.clone(), written),
        Limits {
            queue: 2,
            required: false,
        },
        metrics.clone(),
    )
    .unwrap();
    for _ in 0..10 {
        assert_eq!(sink.admit(), Ok(()));
        sink.write(&event("x"));
    }
    // One may be with the writer, two wait; the rest is lost, and said to be.
    assert!(metrics.audit_drops() >= 7, "{}", metrics.audit_drops());
    gate.open();
    drop(sink);
    let count = lines.iter().count() as u64;
    assert_eq!(count + metrics.audit_drops(), 10);
}

#[tokio::test]
async fn a_required_audit_that_blocks_refuses_and_loses_nothing() {
    let (gate, (written, lines)) = (Gate::default(), std_mpsc::channel());
    let limits = Limits {
        queue: 4,
        required: true,
    };
    let sink = Sink::start(Gated(gate.clone(), written), limits, Metrics::default()).unwrap();
    assert_eq!(sink.admit(), Ok(()));
    for _ in 0..10 {
        sink.write(&event("x"));
    }
    assert_eq!(sink.admit(), Err(Unavailable));
    gate.open();
    let seen = tokio::task::spawn_blocking(move || lines.iter().take(10).count())
        .await
        .unwrap();
    assert_eq!(seen, 10);
}

struct Broken(Arc<AtomicBool>, std_mpsc::Sender<String>);

impl Write for Broken {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.load(Ordering::Relaxed) {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "disk full"));
        }
        let _ = self.1.send(String::from_utf8_lossy(bytes).into_owned());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_full_disk_refuses_when_required_and_recovers() {
    let (broken, (written, lines)) = (Arc::new(AtomicBool::new(true)), std_mpsc::channel());
    let limits = Limits {
        queue: 4,
        required: true,
    };
    let sink = Sink::start(Broken(broken.clone(), written), limits, Metrics::default()).unwrap();
    sink.write(&event("x"));
    while sink.admit().is_ok() {
        std::thread::yield_now();
    }
    broken.store(false, Ordering::Relaxed);
    // The torn line is ended before the event is written again.
    assert_eq!(lines.recv().unwrap(), "\n");
    assert!(lines.recv().unwrap().contains("audit.k8s.io/v1"));
    while sink.admit().is_err() {
        std::thread::yield_now();
    }
}

#[test]
fn off_is_off() {
    let sink = Sink::open(
        &Audit::Off,
        Limits {
            queue: 1,
            required: true,
        },
        Metrics::default(),
    )
    .unwrap();
    assert_eq!(sink.admit(), Ok(()));
    sink.write(&event("x"));
}

#[test]
fn a_file_that_cannot_be_opened_is_said_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::File(dir.path().join("missing").join("audit.log"));
    assert!(Sink::open(&audit, Limits::default(), Metrics::default()).is_err());
}
