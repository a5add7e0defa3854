//! A wide-area path in user space: a TCP relay that holds bytes back as a long path would.
//!
//! It models, for each connection apart:
//!
//! - **latency**: a byte leaves half a round trip after it arrived, either way;
//! - **connecting**: the dialer's first byte leaves after one round trip (SYN, SYN-ACK), and the
//!   far end sees the connection after one and a half;
//! - **a window**: at most so many bytes are on their way, or delivered and not yet known to be.
//!   A byte is acknowledged half a round trip after the far end's kernel took it, so a far end
//!   that does not read stops the sender. The window begins at ten segments, grows by what is
//!   acknowledged while it is used (slow start: it doubles each round trip) up to [`MOST`], and
//!   halves towards ten segments for each retransmission timeout of idleness (RFC 2861).
//!
//! It models no loss, no jitter, no reordering, no limit of bandwidth but the window's, and no
//! queue that others fill. So it favours a sender of much data over one connection, which is the
//! direct way, and does not measure congestion.
//!
//! Each direction has two blocking threads, since a thread sleeps to within 0.1 ms and a timer of
//! the runtime to within one or two. A later delivery is due to a busy machine.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;

/// Payload of an Ethernet-sized segment.
const SEGMENT: u64 = 1460;
/// RFC 6928, and Linux.
const FIRST: u64 = 10 * SEGMENT;
/// Linux lets a sender have 4 MiB unacknowledged (`net.ipv4.tcp_wmem`), whatever the receiver
/// would take.
const MOST: u64 = 4 << 20;
/// Linux' least retransmission timeout, above the round trip.
const PATIENCE: Duration = Duration::from_millis(200);
/// Read at once, at most.
const PIECE: usize = 64 * 1024;

/// Serves until the process is stopped; prints the address that it listens on first.
pub(crate) fn serve(to: SocketAddr, round_trip: Duration) -> anyhow::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot bind the path")?;
    println!("{}", listener.local_addr()?);
    lead(&listener, to, round_trip)
}

fn lead(listener: &TcpListener, to: SocketAddr, round_trip: Duration) -> anyhow::Result<()> {
    loop {
        let (near, _) = listener.accept()?;
        // A connection that fails is its own ends' affair; they see it close.
        std::thread::spawn(move || connection(near, to, round_trip));
    }
}

fn connection(near: TcpStream, to: SocketAddr, round_trip: Duration) -> io::Result<()> {
    let began = Instant::now();
    near.set_nodelay(true)?;
    sleep_until(began + round_trip * 3 / 2);
    let far = TcpStream::connect(to)?;
    far.set_nodelay(true)?;
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    // What the dialer has sent by now left after one round trip, and is there.
    let left = began + round_trip;
    let out = std::thread::spawn(move || direction(near, far, round_trip, Some(left)));
    direction(far_too, near_too, round_trip, None)?;
    // It panics only where this does.
    out.join().unwrap_or(Ok(()))
}

/// Moves bytes one way until either end is done. `first_left`: when what is there by now left.
fn direction(
    mut from: TcpStream,
    to: TcpStream,
    round_trip: Duration,
    first_left: Option<Instant>,
) -> io::Result<()> {
    let flight = Arc::new(Flight::new(round_trip));
    let (sent, underway) = mpsc::channel();
    let delivering = {
        let flight = flight.clone();
        std::thread::spawn(move || deliver(to, &underway, &flight, round_trip))
    };
    let outcome = send(&mut from, &sent, &flight, round_trip, first_left);
    drop(sent);
    let delivered = delivering.join().unwrap_or(Ok(()));
    // Either failure ends both ways of this connection.
    if outcome.is_err() || delivered.is_err() {
        let _ = from.shutdown(Shutdown::Both);
    }
    outcome.and(delivered)
}

/// Bytes, and when they arrive.
struct Piece {
    due: Instant,
    bytes: Vec<u8>,
    /// In flight when they were sent, themselves among them.
    flight: u64,
}

fn send(
    from: &mut TcpStream,
    sent: &Sender<Piece>,
    flight: &Flight,
    round_trip: Duration,
    first_left: Option<Instant>,
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    let mut said_before = first_left;
    loop {
        // How much may leave is decided when there is something, not before a rest.
        match from.peek(&mut [0]) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        let Some(room) = flight.room() else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let most = usize::try_from(room).unwrap_or(PIECE).min(PIECE);
        let count = match from.read(&mut buffer[..most]) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        if count == 0 {
            return Ok(());
        }
        let now = Instant::now();
        // Sent while the connection was being made, or after.
        let left = match said_before.take() {
            Some(left) => left.max(now - round_trip / 2),
            None => now,
        };
        let piece = Piece {
            due: left + round_trip / 2,
            bytes: buffer[..count].to_vec(),
            flight: flight.sent(count as u64),
        };
        if sent.send(piece).is_err() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

fn deliver(
    mut to: TcpStream,
    underway: &Receiver<Piece>,
    flight: &Flight,
    round_trip: Duration,
) -> io::Result<()> {
    let outcome = loop {
        let Ok(piece) = underway.recv() else {
            // The end takes as long as a byte.
            std::thread::sleep(round_trip / 2);
            break to.shutdown(Shutdown::Write);
        };
        sleep_until(piece.due);
        if let Err(error) = to.write_all(&piece.bytes) {
            break Err(error);
        }
        flight.delivered(Acknowledgement {
            due: Instant::now() + round_trip / 2,
            bytes: piece.bytes.len() as u64,
            flight: piece.flight,
        });
    };
    if outcome.is_err() {
        flight.give_up();
    }
    outcome
}

fn sleep_until(when: Instant) {
    std::thread::sleep(when.saturating_duration_since(Instant::now()));
}

/// What is on its way in one direction, shared by who sends and who delivers.
struct Flight {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    window: Window,
    acknowledgements: VecDeque<Acknowledgement>,
    given_up: bool,
}

#[derive(Clone, Copy)]
struct Acknowledgement {
    due: Instant,
    bytes: u64,
    flight: u64,
}

impl Flight {
    fn new(round_trip: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                window: Window::new(round_trip + PATIENCE, Instant::now()),
                acknowledgements: VecDeque::new(),
                given_up: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until something may be sent, and returns how much; `None` without a receiver.
    fn room(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.given_up {
                return None;
            }
            let now = Instant::now();
            state.take_due(now);
            let room = state.window.room(now);
            if room > 0 {
                return Some(room);
            }
            let next = state.acknowledgements.front().map(|next| next.due);
            state = match next {
                Some(due) => {
                    drop(state);
                    sleep_until(due);
                    self.lock()
                }
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Bytes in flight then.
    fn sent(&self, bytes: u64) -> u64 {
        let mut state = self.lock();
        let now = Instant::now();
        // Reading may have taken long.
        state.take_due(now);
        state.window.sent(bytes, now)
    }

    fn delivered(&self, acknowledgement: Acknowledgement) {
        self.lock().acknowledgements.push_back(acknowledgement);
        self.changed.notify_one();
    }

    fn give_up(&self) {
        self.lock().given_up = true;
        self.changed.notify_one();
    }
}

impl State {
    fn take_due(&mut self, now: Instant) {
        while let Some(next) = self.acknowledgements.front().copied()
            && next.due <= now
        {
            self.acknowledgements.pop_front();
            self.window.acknowledged(next.bytes, next.flight);
        }
    }
}

/// A congestion window that meets no congestion.
#[derive(Debug)]
struct Window {
    size: u64,
    in_flight: u64,
    idle_limit: Duration,
    last_sent: Instant,
}

impl Window {
    fn new(idle_limit: Duration, now: Instant) -> Self {
        Self {
            size: FIRST,
            in_flight: 0,
            idle_limit,
            last_sent: now,
        }
    }

    fn room(&mut self, now: Instant) -> u64 {
        self.decay(now);
        self.size.saturating_sub(self.in_flight)
    }

    fn sent(&mut self, bytes: u64, now: Instant) -> u64 {
        self.decay(now);
        self.last_sent = now;
        self.in_flight += bytes;
        self.in_flight
    }

    /// `flight`: how much was in flight when these were sent. A window that is not filled, then or
    /// since, does not grow.
    fn acknowledged(&mut self, bytes: u64, flight: u64) {
        let used = flight.max(self.in_flight);
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if self.size < used * 2 {
            self.size = (self.size + bytes).min(MOST);
        }
    }

    /// What was learned long ago is believed less.
    fn decay(&mut self, now: Instant) {
        if self.in_flight > 0 {
            return;
        }
        while self.size > FIRST && now.saturating_duration_since(self.last_sent) > self.idle_limit {
            self.size = (self.size / 2).max(FIRST);
            self.last_sent += self.idle_limit;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUND_TRIP: Duration = Duration::from_millis(100);

    /// Sends all that it may, and has all of it acknowledged.
    fn round(window: &mut Window, now: Instant) -> u64 {
        let room = window.room(now);
        let flight = window.sent(room, now);
        window.acknowledged(room, flight);
        room
    }

    #[test]
    fn a_window_doubles_each_round_trip_to_its_most() {
        let began = Instant::now();
        let mut window = Window::new(ROUND_TRIP, began);
        for doublings in 0..8 {
            let now = began + ROUND_TRIP * doublings;
            assert_eq!(round(&mut window, now), FIRST << doublings);
        }
        for doublings in 8..20 {
            round(&mut window, began + ROUND_TRIP * doublings);
        }
        assert_eq!(window.size, MOST);
    }

    #[test]
    fn a_window_that_is_not_filled_does_not_grow() {
        let now = Instant::now();
        let mut window = Window::new(ROUND_TRIP, now);
        for _ in 0..100 {
            let flight = window.sent(100, now);
            window.acknowledged(100, flight);
        }
        assert_eq!(window.size, FIRST);
    }

    #[test]
    fn what_is_in_flight_takes_room() {
        let now = Instant::now();
        let mut window = Window::new(ROUND_TRIP, now);
        window.sent(FIRST, now);
        assert_eq!(window.room(now), 0);
        window.acknowledged(1000, FIRST);
        assert_eq!(window.room(now), 2000);
    }

    #[test]
    fn idleness_brings_the_window_back() {
        let began = Instant::now();
        let mut window = Window::new(ROUND_TRIP, began);
        for _ in 0..4 {
            round(&mut window, began);
        }
        assert_eq!(window.size, FIRST << 4);
        assert_eq!(
            window.room(began + ROUND_TRIP * 2 + ROUND_TRIP / 2),
            FIRST << 2
        );
        assert_eq!(window.room(began + ROUND_TRIP * 100), FIRST);
    }

    /// Only what a busy machine cannot break: nothing arrives early.
    #[test]
    fn nothing_comes_early_and_all_of_it_comes() {
        let far = TcpListener::bind("127.0.0.1:0").unwrap();
        let path = TcpListener::bind("127.0.0.1:0").unwrap();
        let (to, at) = (far.local_addr().unwrap(), path.local_addr().unwrap());
        let round_trip = Duration::from_millis(20);
        std::thread::spawn(move || lead(&path, to, round_trip));
        std::thread::spawn(move || {
            let (mut stream, _) = far.accept().unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            stream.write_all(&got).unwrap();
        });
        let began = Instant::now();
        let mut near = TcpStream::connect(at).unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|at| (at ^ (at >> 8)) as u8).collect();
        near.write_all(&bytes).unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        near.read_to_end(&mut got).unwrap();
        assert!(got == bytes);
        // Connecting, slow start of some 21 windows' worth each way: 5 round trips, 4 of waiting.
        assert!(began.elapsed() >= round_trip * 10, "{:?}", began.elapsed());
    }
}
