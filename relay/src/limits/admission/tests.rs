//! A machine of given capacity and its peers in virtual time, and the steps of the queue one by one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use super::queue::{Arrived, LATEST, MAX_QUEUE_DELAY, OVERDUE, Queue, STALLED, Verdict};
use super::ring::Network;
use super::{Admitted, HandshakeAdmission};

fn from(number: u32) -> Network {
    Some(IpAddr::from(number.to_be_bytes()))
}

fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Peers that dial a relay on a machine that can do so many handshakes in a second, in steps of
/// 10 ms of virtual time.
struct Machine {
    queue: Queue<usize>,
    now: Instant,
    /// Handshakes that it does in a step, shared equally by all that are under way.
    per_step: f64,
    /// Peer, ticket if it was admitted, what is left to do, and when the peer gives up.
    under_way: Vec<(usize, Option<u64>, f64, Instant)>,
    tickets: HashMap<usize, u64>,
    /// When each that is away dials again.
    away: BTreeMap<(Instant, usize), ()>,
    done: usize,
    gave_up: usize,
    sent_away: usize,
}

/// What a peer costs that is sent away, of a whole handshake: its key share and two packets.
const ANSWERED: f64 = 0.05;
/// How long a peer tries.
const TRIES: Duration = Duration::from_secs(10);

impl Machine {
    fn new(limit: u32, capacity: f64) -> Self {
        let now = Instant::now();
        Self {
            queue: Queue::new(limit, now),
            now,
            per_step: capacity / 100.0,
            under_way: Vec::new(),
            tickets: HashMap::new(),
            away: BTreeMap::new(),
            done: 0,
            gave_up: 0,
            sent_away: 0,
        }
    }

    fn dial(&mut self, peer: usize, network: Network, is_known: bool) {
        let gives_up = self.now + TRIES;
        match self.queue.arrive(self.now, network, is_known, peer) {
            Arrived::Admitted(ticket) => {
                self.under_way.push((peer, Some(ticket), 1.0, gives_up));
            }
            Arrived::Waits(ticket) => {
                self.tickets.insert(peer, ticket);
            }
            Arrived::RetryAfter(wait) => self.send_away(peer, wait),
        }
    }

    fn send_away(&mut self, peer: usize, wait: Duration) {
        self.sent_away += 1;
        self.under_way
            .push((peer, None, ANSWERED, self.now + TRIES));
        // As `Backoff` honours it, with its jitter.
        let jitter = 1.0 + 0.2 * ((peer * 7919 % 1000) as f64 / 1000.0);
        self.away
            .insert((self.now + wait.mul_f64(jitter), peer), ());
    }

    fn step(&mut self) {
        self.now += millis(10);
        while let Some(((at, peer), ())) = self.away.pop_first() {
            if at > self.now {
                self.away.insert((at, peer), ());
                break;
            }
            let number = u32::try_from(peer).unwrap();
            self.dial(peer, from(number), false);
        }
        for (peer, verdict) in self.queue.advance(self.now) {
            let ticket = self.tickets.remove(&peer).unwrap();
            match verdict {
                Verdict::Admitted => {
                    let gives_up = self.now + TRIES;
                    self.under_way.push((peer, Some(ticket), 1.0, gives_up));
                }
                Verdict::RetryAfter(wait) => self.send_away(peer, wait),
            }
        }
        let share = self.per_step / self.under_way.len().max(1) as f64;
        let now = self.now;
        let mut ended = Vec::new();
        self.under_way.retain_mut(|(peer, ticket, left, gives_up)| {
            *left -= share;
            let is_over = *left <= 0.0 || *gives_up <= now;
            if is_over {
                ended.push((*peer, *ticket, *left <= 0.0));
            }
            !is_over
        });
        for (peer, ticket, is_done) in ended {
            let Some(ticket) = ticket else { continue };
            if is_done {
                self.queue.completed(ticket, now);
                self.done += 1;
            } else {
                self.gave_up += 1;
                self.away.insert((now + millis(500), peer), ());
            }
            self.queue.leave(ticket);
        }
    }

    fn elapsed_since(&self, start: Instant) -> f64 {
        self.now.duration_since(start).as_secs_f64()
    }
}

#[test]
fn a_storm_ends_about_as_soon_as_the_machine_can_end_it() {
    for capacity in [60.0, 120.0, 190.0, 1000.0] {
        const PEERS: usize = 5000;
        let mut machine = Machine::new(200, capacity);
        let start = machine.now;
        for peer in 0..PEERS {
            // Full jitter of the first back-off.
            let soon = millis(500 + peer as u64 * 131 % 500);
            machine.away.insert((start + soon, peer), ());
        }
        while machine.done < PEERS && machine.elapsed_since(start) < 600.0 {
            machine.step();
        }
        let took = machine.elapsed_since(start);
        let pure = PEERS as f64 / capacity.min(200.0);
        println!(
            "{capacity}/s: {took:.1} s, {:.2} times the pure time; {} gave up, {} sent away; bound {:.0}",
            took / pure,
            machine.gave_up,
            machine.sent_away,
            machine.queue.bound.limit
        );
        assert_eq!(machine.done, PEERS);
        assert_eq!(machine.gave_up, 0, "admitted, and not served in time");
        assert!(took < 1.2 * pure + 2.0, "{took:.1} s, not {pure:.1} s");
    }
}

#[test]
fn a_flood_from_one_network_delays_others_by_one_turn() {
    let mut machine = Machine::new(50, 50.0);
    let flood = from(u32::MAX);
    let mut honest = 0;
    for step in 0..3000_usize {
        // 400 a second from one address, and one a second from another each.
        for number in 0..4 {
            machine.dial(1_000_000 + 4 * step + number, flood, false);
        }
        if step % 100 == 0 {
            let before = machine.queue.classes[1].ahead_of(0);
            let number = u32::try_from(step).unwrap();
            let arrived = machine.queue.arrive(machine.now, from(number), false, step);
            assert!(
                !matches!(arrived, Arrived::RetryAfter(_)),
                "sent away behind {before}"
            );
            if let Arrived::Waits(ticket) = arrived {
                machine.tickets.insert(step, ticket);
            }
            honest += 1;
        }
        machine.away.clear();
        machine.step();
    }
    assert_eq!(honest, 30);
    // Nothing of the flood stays behind when it ends.
    let waiting: Vec<u64> = machine.queue.waiting.keys().copied().collect();
    for ticket in waiting {
        machine.queue.leave(ticket);
    }
    assert!(
        machine
            .queue
            .classes
            .iter()
            .all(|class| class.len == 0 && class.turns.is_empty() && class.by_network.is_empty())
    );
}

#[test]
fn known_networks_go_first_and_others_are_not_starved() {
    let now = Instant::now();
    let mut queue = Queue::new(1, now);
    assert!(matches!(
        queue.arrive(now, from(0), false, 0),
        Arrived::Admitted(_)
    ));
    queue.pace.per_second = 100.0;
    for number in 1..=10 {
        let waits = queue.arrive(now, from(number), number > 5, number);
        assert!(matches!(waits, Arrived::Waits(_)), "{number}: {waits:?}");
    }
    let mut order = Vec::new();
    for second in 1..=6 {
        let at = now + Duration::from_secs(second);
        order.extend(queue.advance(at).into_iter().map(|(number, _)| number));
    }
    assert_eq!(order, [6, 7, 8, 9, 1, 10]);
}

#[test]
fn networks_take_turns() {
    let now = Instant::now();
    let mut queue = Queue::new(1, now);
    queue.pace.per_second = 100.0;
    assert!(matches!(
        queue.arrive(now, from(0), false, 0),
        Arrived::Admitted(_)
    ));
    for (peer, network) in [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3)] {
        queue.arrive(now, from(network), false, peer);
    }
    let mut order = Vec::new();
    for second in 1..=5 {
        let at = now + Duration::from_secs(second);
        order.extend(queue.advance(at).into_iter().map(|(peer, _)| peer));
    }
    assert_eq!(order, [1, 4, 5, 2, 3]);
}

#[test]
fn what_stalls_holds_no_place_and_what_waits_too_long_is_told_so() {
    let start = Instant::now();
    let mut queue = Queue::new(1000, start);
    queue.bound.limit = 8.0;
    for number in 0..8 {
        let arrived = queue.arrive(start, from(number), false, number);
        assert!(matches!(arrived, Arrived::Admitted(_)));
    }
    queue.pace.per_second = 1000.0;
    assert!(matches!(
        queue.arrive(start, from(9), false, 9),
        Arrived::Waits(_)
    ));
    assert!(queue.advance(start + millis(10)).is_empty());
    assert_eq!(queue.next(start), Some(start + STALLED));
    let admitted = queue.advance(start + STALLED);
    assert_eq!(admitted, [(9, Verdict::Admitted)]);

    queue.bound.limit = 0.0;
    let later = start + STALLED;
    queue.pace.per_second = 1000.0;
    assert!(matches!(
        queue.arrive(later, from(10), false, 10),
        Arrived::Waits(_)
    ));
    let told = queue.advance(later + OVERDUE);
    assert!(
        matches!(told[..], [(10, Verdict::RetryAfter(_))]),
        "{told:?}"
    );
    assert!(queue.waiting.is_empty() && queue.classes[1].len == 0);
}

#[test]
fn one_that_is_sent_away_is_told_a_moment_of_its_own() {
    let now = Instant::now();
    let mut queue = Queue::new(100, now);
    let mut told = Vec::new();
    for number in 0..20_000 {
        if let Arrived::RetryAfter(wait) = queue.arrive(now, from(number), false, number) {
            told.push(wait);
        }
    }
    // A second's burst, and what is expected within the patience.
    assert!((19_000..19_600).contains(&told.len()), "{}", told.len());
    assert!(
        told.is_sorted()
            && told
                .iter()
                .all(|wait| (MAX_QUEUE_DELAY..=LATEST).contains(wait))
    );
    assert!(told[1] > told[0]);
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_is_dropped_lets_the_next_in() {
    let admission = HandshakeAdmission::new(1);
    let driving = admission.clone();
    let driver = tokio::spawn(async move { driving.drive().await });
    let client = IpAddr::from([192, 0, 2, 1]);
    let Admitted::Now(first) = admission.admit(Some(client)).await else {
        panic!("nobody else is there");
    };
    admission.authenticated(client);
    // Gone before its turn.
    let gone = tokio::time::timeout(millis(100), admission.admit(Some(client))).await;
    assert!(gone.is_err());
    assert!(admission.0.lock().waiting.is_empty());
    let began = Instant::now();
    let Admitted::Now(second) = admission.admit(Some(client)).await else {
        panic!("its turn is within a second");
    };
    assert!(began.elapsed() <= Duration::from_secs(1));
    first.completed();
    drop(second);
    assert!(admission.0.lock().active.is_empty());
    driver.abort();
}
