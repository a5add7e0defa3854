use std::sync::mpsc as std_mpsc;
use std::sync::{Condvar, Mutex};

use super::*;

/// What becomes of an event does not depend on what is in it.
fn event(text: &str) -> Event {
    Event {
        request_uri: text.to_owned(),
        annotations: BTreeMap::from([("throwline.dev/cluster", text.to_owned())]),
        ..lost_events(0, "id".to_owned())
    }
}

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

fn limits(queue: usize, required: bool) -> Limits {
    Limits {
        queue,
        required,
        max_wait: Duration::ZERO,
    }
}

fn gated(limits: Limits, metrics: &Metrics) -> (Gate, Sink, std_mpsc::Receiver<String>) {
    let (gate, (written, lines)) = (Gate::default(), std_mpsc::channel());
    let sink = Sink::start(Gated(gate.clone(), written), limits, metrics.clone()).unwrap();
    (gate, sink, lines)
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let soon = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    let waited = timeout(Duration::from_secs(30), soon).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}

/// The lines to the end, and how many events they say were lost.
async fn to_the_end(sink: Sink, lines: std_mpsc::Receiver<String>) -> (usize, u64) {
    drop(sink);
    let lines = tokio::task::spawn_blocking(move || lines.iter().collect::<Vec<_>>());
    let (mut written, mut lost) = (0, 0);
    for line in lines.await.unwrap() {
        let event: serde_json::Value = serde_json::from_str(&line).unwrap();
        match event["annotations"]["throwline.dev/lost-events"].as_str() {
            Some(count) => lost += count.parse::<u64>().unwrap(),
            None => written += 1,
        }
    }
    (written, lost)
}

#[tokio::test]
async fn a_blocked_target_loses_events_and_says_how_many_in_metric_and_audit() {
    let metrics = Metrics::default();
    let (gate, sink, lines) = gated(limits(2, false), &metrics);
    for _ in 0..10 {
        assert_eq!(sink.admit().await, Ok(()));
        sink.write(&event("x"), true);
    }
    // One may be with the writer, two wait.
    until("what waited has given up", || metrics.audit_lost() >= 7).await;
    gate.open();
    let (written, lost) = to_the_end(sink, lines).await;
    assert_eq!(written as u64 + metrics.audit_lost(), 10);
    assert_eq!(lost, metrics.audit_lost());
}

/// 6,000 events behind an output that stands still for a while.
#[tokio::test]
async fn a_stall_slows_requests_down_and_loses_nothing() {
    let metrics = Metrics::default();
    let patient = Limits {
        max_wait: Duration::from_secs(600),
        ..Limits::default()
    };
    let (gate, sink, lines) = gated(patient, &metrics);
    let requests = tokio::spawn({
        let sink = sink.clone();
        async move {
            for _ in 0..6000 {
                sink.admit().await.unwrap();
                sink.write(&event("x"), true);
            }
        }
    });
    until("a request waits", || metrics.audit_waits.get() > 0).await;
    assert!(!requests.is_finished());
    gate.open();
    requests.await.unwrap();
    assert_eq!(to_the_end(sink, lines).await, (6000, 0));
    assert_eq!(metrics.audit_lost(), 0);
}

#[tokio::test]
async fn a_required_audit_that_blocks_refuses_and_loses_nothing_that_was_forwarded() {
    let metrics = Metrics::default();
    let (gate, sink, lines) = gated(limits(4, true), &metrics);
    assert_eq!(sink.admit().await, Ok(()));
    assert!(!sink.refuses());
    for _ in 0..10 {
        sink.write(&event("x"), true);
    }
    assert_eq!(sink.admit().await, Err(Unavailable));
    assert!(sink.refuses());
    // Refused requests, however many, cost no memory.
    for _ in 0..1000 {
        sink.write(&event("refused"), false);
    }
    assert_eq!(metrics.audit_lost(), 1000);
    gate.open();
    until("there is room again", || !sink.refuses()).await;
    assert_eq!(sink.admit().await, Ok(()));
    assert!(sink.flushed(Duration::from_secs(30)).await);
    assert_eq!(to_the_end(sink, lines).await, (10, 1000));
}

#[tokio::test]
async fn a_stop_waits_for_what_is_queued_and_not_for_ever() {
    let metrics = Metrics::default();
    let (gate, sink, lines) = gated(limits(8, false), &metrics);
    for _ in 0..5 {
        sink.write(&event("x"), true);
    }
    assert!(!sink.flushed(Duration::ZERO).await);
    gate.open();
    assert!(sink.flushed(Duration::from_secs(30)).await);
    assert_eq!(lines.try_iter().count(), 5);
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

#[tokio::test]
async fn a_full_disk_refuses_when_required_and_recovers() {
    let (broken, (written, lines)) = (Arc::new(AtomicBool::new(true)), std_mpsc::channel());
    let target = Broken(broken.clone(), written);
    let sink = Sink::start(target, limits(4, true), Metrics::default()).unwrap();
    sink.write(&event("x"), true);
    while sink.admit().await.is_ok() {
        tokio::task::yield_now().await;
    }
    broken.store(false, Ordering::Relaxed);
    // The torn line is ended before the event is written again.
    assert_eq!(lines.recv().unwrap(), "\n");
    assert!(lines.recv().unwrap().contains("audit.k8s.io/v1"));
    while sink.admit().await.is_err() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn off_is_off() {
    let sink = Sink::open(&Audit::Off, limits(1, true), Metrics::default()).unwrap();
    assert_eq!(sink.admit().await, Ok(()));
    sink.write(&event("x"), true);
    assert!(!sink.refuses());
    assert!(sink.flushed(Duration::ZERO).await);
}

#[test]
fn a_file_that_cannot_be_opened_is_said_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let audit = Audit::File(dir.path().join("missing").join("audit.log"));
    assert!(Sink::open(&audit, Limits::default(), Metrics::default()).is_err());
}
