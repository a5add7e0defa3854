//! The delay of a far link: a relay of datagrams in user space, each held back for half a round trip.
//!
//! The datagrams are VXLAN's, each with one packet in it, so a packet is late and nothing else: the TCP
//! connections are from end to end, with their own windows, acknowledgements and losses. (A relay of
//! byte streams, as in [`crate::delay`], would accept megabytes in front of a narrow link, which no
//! path does.) Order is kept. Bounds: a datagram that finds the receive buffer of [`BUFFER`] bytes full
//! is lost; as many are held as arrive in half a round trip.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::Context;

/// More than a link's datagram, which is not fragmented.
const LARGEST: usize = 2_048;
/// Bytes: what a sender hands over at once, and the kernel's own share of each datagram.
const BUFFER: usize = 8 << 20;

/// Relays between the two listeners until the process is stopped: what one receives leaves by the other,
/// to the address beside the first. Prints a line when it is ready.
pub(super) fn serve(
    ends: [(SocketAddr, SocketAddr); 2],
    round_trip: Duration,
) -> anyhow::Result<()> {
    let mut sockets = Vec::new();
    for (listen, _) in ends {
        let socket = UdpSocket::bind(listen).with_context(|| format!("cannot bind {listen}"))?;
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, BUFFER)
            .context("the path's receive buffer")?;
        sockets.push(Arc::new(socket));
    }
    let [one, other] = &sockets[..] else {
        anyhow::bail!("a path has two ends");
    };
    let [(_, beyond_one), (_, beyond_other)] = ends;
    println!("ready");
    let back = {
        let (from, by) = (other.clone(), one.clone());
        std::thread::spawn(move || direction(&from, by, beyond_other, round_trip / 2))
    };
    direction(one, other.clone(), beyond_one, round_trip / 2)?;
    // It panics only where this does.
    back.join().unwrap_or(Ok(()))
}

struct Held {
    due: Instant,
    datagram: Vec<u8>,
}

fn direction(
    from: &UdpSocket,
    by: Arc<UdpSocket>,
    to: SocketAddr,
    delay: Duration,
) -> anyhow::Result<()> {
    let (received, held) = mpsc::channel();
    std::thread::spawn(move || deliver(&by, to, &held));
    let mut buffer = [0; LARGEST];
    loop {
        let size = match from.recv(&mut buffer) {
            Ok(size) => size,
            // The other end's tunnel is not up yet, or no more.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error).context("the path"),
        };
        let held = Held {
            due: Instant::now() + delay,
            datagram: buffer.get(..size).unwrap_or_default().to_vec(),
        };
        received.send(held).context("the path delivers no more")?;
    }
}

/// A thread sleeps to within 0.1 ms; a timer of the runtime to within one or two.
fn deliver(by: &UdpSocket, to: SocketAddr, held: &Receiver<Held>) {
    for Held { due, datagram } in held {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        // As on any path, what cannot be sent is lost.
        let _ = by.send_to(&datagram, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only what a busy machine cannot break: nothing arrives early, and the order is kept.
    #[test]
    fn datagrams_arrive_late_and_in_order() {
        let bound = || Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
        let (near, far, from, by) = (bound(), bound(), bound(), bound());
        let (entry, to) = (from.local_addr().unwrap(), far.local_addr().unwrap());
        let delay = Duration::from_millis(20);
        std::thread::spawn(move || direction(&from, by, to, delay));
        let sent = Instant::now();
        for number in 0..50_u8 {
            near.send_to(&[number], entry).unwrap();
        }
        let mut buffer = [0; 8];
        for number in 0..50_u8 {
            assert_eq!(far.recv(&mut buffer).unwrap(), 1);
            assert_eq!(buffer[0], number);
            assert!(sent.elapsed() >= delay);
        }
    }
}
