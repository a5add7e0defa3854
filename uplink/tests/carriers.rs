//! Carriers over pipes to relays in the same process, in paused time.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use throwline_ops::network::Changes;
use throwline_ops::{Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::{
    self, AcceptConfig, Carrier, Connection, DialConfig, DialError, IncomingStream, Prover,
};
use throwline_tunnel::proto::close::{CloseCode, CloseReason};
use throwline_tunnel::proto::messages::{
    ControlKind, ControlMessage, Drain, LineKind, Open, Role, StreamHeader, StreamKind, StreamReply,
};
use throwline_tunnel::proto::wire::CONTROL_CAP;
use throwline_tunnel::{message, mux};
use throwline_uplink::{
    Carriers, Config, Environment, Metrics, Pool, ReplaceReason, UplinkHandler,
};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use url::Url;

/// Longer than any wait of a pool but the age of a carrier.
const PATIENCE: Duration = Duration::from_secs(600);

/// The relay's ends of the carriers, in the order of their dials.
type Relays = mpsc::UnboundedReceiver<Connection>;

struct Fake {
    relays: mpsc::UnboundedSender<Connection>,
    /// The relays that dials reach, in turn.
    names: Vec<&'static str>,
    dials: AtomicUsize,
    fails: AtomicBool,
    needed: watch::Sender<bool>,
    idle: Option<Duration>,
    accepted: mpsc::UnboundedSender<(IncomingStream, Shutdown)>,
    vain: Mutex<Vec<(ReplaceReason, u32)>>,
    ends: Mutex<Vec<Option<CloseCode>>>,
}

impl UplinkHandler for Fake {
    type Error = DialError;

    async fn dial(&self, avoid: Vec<String>) -> Result<Connection, DialError> {
        let number = self.dials.fetch_add(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) {
            return Err(DialError::Timeout {
                after: Duration::from_secs(1),
                phase: "connecting",
            });
        }
        let (near, far) = tokio::io::duplex(64 * 1024);
        let prover = Arc::new(Prover {
            assertion: Box::new(|_| Ok("assertion".to_owned())),
            sign: Box::new(|message| Ok(message.to_vec())),
            sha256: |_| [7; 32],
            id: "spiffe://test/cluster/c".to_owned(),
        });
        let url = Url::parse("http://localhost").unwrap();
        let mut dialling = DialConfig::new(url, None, prover, Role::Agent, "instance");
        dialling.avoid = avoid;
        let accepting = AcceptConfig {
            relays: u32::try_from(self.names.len()).unwrap(),
            ..AcceptConfig::new(self.names[number % self.names.len()])
        };
        let (dialled, accepted) = tokio::join!(
            carrier::dial_over(near, &dialling),
            carrier::accept(far, accepting, |_, _| Ok(()))
        );
        if let Ok((accepted, _)) = accepted {
            let _ = self.relays.send(accepted);
        }
        dialled
    }

    fn accept(&self, stream: IncomingStream, retiring: &Shutdown) {
        let _ = self.accepted.send((stream, retiring.clone()));
    }

    fn not_replaced(&self, _error: &DialError, reason: ReplaceReason, attempt: u32) {
        self.vain.lock().unwrap().push((reason, attempt));
    }

    fn disconnected(&self, reason: Option<&CloseReason>) {
        let code = reason.map(|reason| reason.code);
        self.ends.lock().unwrap().push(code);
    }

    async fn needed(&self) {
        let _ = self.needed.subscribe().wait_for(|needed| *needed).await;
    }

    async fn unused(&self, carrier: &Carrier) {
        match self.idle {
            Some(idle) => carrier.idle_for(1, idle).await,
            None => std::future::pending().await,
        }
    }
}

struct Stage {
    fake: Arc<Fake>,
    relays: Relays,
    accepted: mpsc::UnboundedReceiver<(IncomingStream, Shutdown)>,
    carriers: Carriers,
    metrics: Metrics,
    pool: Pool,
    stop: ShutdownTrigger,
}

fn start(names: &[&'static str], count: usize, idle: Option<Duration>) -> Stage {
    let (tell, relays) = mpsc::unbounded_channel();
    let (accept, accepted) = mpsc::unbounded_channel();
    let fake = Arc::new(Fake {
        relays: tell,
        names: names.to_vec(),
        dials: AtomicUsize::new(0),
        fails: AtomicBool::new(false),
        needed: watch::Sender::new(true),
        idle,
        accepted: accept,
        vain: Mutex::default(),
        ends: Mutex::default(),
    });
    let (stop, shutdown) = Shutdown::new();
    let metrics = Metrics::new("test").unwrap();
    let carriers = Carriers::new();
    let config = Config {
        count,
        ..Config::default()
    };
    let environment = Environment {
        shutdown,
        ready: None,
        network: Changes::never(),
        metrics: metrics.clone(),
    };
    let pool = Pool::start(fake.clone(), carriers.clone(), config, environment);
    Stage {
        fake,
        relays,
        accepted,
        carriers,
        metrics,
        pool,
        stop,
    }
}

impl Stage {
    async fn relay(&mut self) -> Connection {
        let dialled = timeout(PATIENCE, self.relays.recv()).await;
        dialled.expect("a dial").unwrap()
    }

    async fn stop(self) {
        self.stop.trigger();
        self.pool.ended().await.close("the test is over").await;
    }
}

async fn closed(relay: &Connection) -> CloseReason {
    let closed = timeout(PATIENCE, relay.carrier.closed()).await;
    closed.expect("the carrier is closed")
}

async fn control(relay: &mut Connection) -> mux::Stream {
    let stream = timeout(PATIENCE, relay.incoming.next())
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(stream.header.kind, Some(StreamKind::Control(_))));
    stream.accept(StreamReply::accepted()).await.unwrap()
}

async fn drain(control: &mut mux::Stream) {
    let drain = ControlMessage {
        kind: Some(ControlKind::Drain(Drain::default())),
    };
    message::write(control, &drain, CONTROL_CAP).await.unwrap();
}

fn line() -> StreamHeader {
    let open = Open {
        version: 1,
        cluster: "c".to_owned(),
        line_id: vec![0; 16],
        kind: LineKind::Api.into(),
        ..Open::default()
    };
    open.into()
}

#[tokio::test(start_paused = true)]
async fn a_lost_carrier_is_dialled_again_after_the_back_off() {
    let mut stage = start(&["relay-1"], 1, None);
    let first = stage.relay().await;
    let began = Instant::now();
    first.carrier.close(CloseCode::GoingAway, "");
    let second = stage.relay().await;
    assert!(began.elapsed() >= Duration::from_millis(500));
    stage.carriers.carrier().await;
    assert_eq!(stage.carriers.epoch(), 2);
    let ends = stage.fake.ends.lock().unwrap().clone();
    assert_eq!(ends, [Some(CloseCode::GoingAway)]);
    stage.stop().await;
    assert_eq!(closed(&second).await.code, CloseCode::GoingAway);
}

#[tokio::test(start_paused = true)]
async fn a_carrier_that_drains_has_its_successor_first_and_ends_with_its_last_stream() {
    let mut stage = start(&["relay-1"], 1, None);
    let mut old = stage.relay().await;
    let mut its_control = control(&mut old).await;
    let (opened, accepted) = tokio::join!(old.carrier.open(line()), async {
        let (stream, retiring) = stage.accepted.recv().await.unwrap();
        (
            stream.accept(StreamReply::accepted()).await.unwrap(),
            retiring,
        )
    });
    let (near, retiring) = accepted;
    drain(&mut its_control).await;

    let new = stage.relay().await;
    assert!(!old.carrier.is_closed(), "it has a stream");
    timeout(PATIENCE, retiring.requested()).await.unwrap();
    assert!(timeout(PATIENCE, old.carrier.closed()).await.is_err());
    assert_eq!(stage.metrics.carriers.get(), 2);

    drop((near, opened));
    let reason = closed(&old).await;
    assert_eq!(reason.reason, "replaced by another carrier");
    assert!(!new.carrier.is_closed());
    assert!(stage.fake.ends.lock().unwrap().is_empty());
    stage.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_carrier_without_a_successor_stays() {
    let mut stage = start(&["relay-1"], 1, None);
    let mut old = stage.relay().await;
    let mut its_control = control(&mut old).await;
    stage.fake.fails.store(true, Ordering::SeqCst);
    drain(&mut its_control).await;
    while stage.fake.vain.lock().unwrap().len() < 3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let vain = stage.fake.vain.lock().unwrap().clone();
    let drained = |attempt| (ReplaceReason::Drain, attempt);
    assert_eq!(vain[..3], [drained(1), drained(2), drained(3)]);
    assert!(!old.carrier.is_closed());
    stage.fake.fails.store(false, Ordering::SeqCst);
    let _new = stage.relay().await;
    closed(&old).await;
    stage.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_replacement_is_made_for_a_request_and_for_a_new_identity() {
    let mut stage = start(&["relay-1"], 1, None);
    let first = stage.relay().await;
    stage.carriers.carrier().await;
    stage.carriers.replace(stage.carriers.epoch());
    let second = stage.relay().await;
    closed(&first).await;
    // A request for a carrier that was replaced is over.
    stage.carriers.replace(1);
    assert!(timeout(PATIENCE, stage.relays.recv()).await.is_err());
    stage.carriers.replace_all();
    let _third = stage.relay().await;
    closed(&second).await;
    stage.stop().await;
}

#[tokio::test(start_paused = true)]
async fn two_carriers_are_at_two_relays() {
    // The second supervisor's first dial ends at the first one's relay.
    let mut stage = start(&["relay-1", "relay-1", "relay-2"], 2, None);
    let first = stage.relay().await;
    let second = stage.relay().await;
    let mut names = [&first.relay.instance, &second.relay.instance];
    names.sort_unstable();
    assert_eq!(names, ["relay-1", "relay-2"]);
    assert_eq!(stage.fake.dials.load(Ordering::SeqCst), 3);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(stage.metrics.relays.get(), 2);
    stage.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_carrier_that_is_not_needed_is_closed_and_dialled_on_demand() {
    let idle = Duration::from_secs(300);
    let mut stage = start(&["relay-1"], 1, Some(idle));
    let mut first = stage.relay().await;
    let _control = control(&mut first).await;
    stage.fake.needed.send_replace(false);
    let began = Instant::now();
    // A stream restarts the time, however short it was open.
    tokio::time::sleep(Duration::from_secs(200)).await;
    let (opened, _accepted) = tokio::join!(first.carrier.open(line()), async {
        let (stream, _) = stage.accepted.recv().await.unwrap();
        stream.accept(StreamReply::accepted()).await.unwrap()
    });
    drop((opened, _accepted));
    let reason = closed(&first).await;
    assert_eq!(reason.reason, "not needed");
    assert!(
        began.elapsed() >= Duration::from_secs(500),
        "{:?}",
        began.elapsed()
    );
    assert!(timeout(PATIENCE, stage.relays.recv()).await.is_err());
    stage.fake.needed.send_replace(true);
    stage.relay().await;
    stage.stop().await;
}
