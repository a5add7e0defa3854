//! Ports for real processes, which are given their addresses.
//!
//! A port that the kernel names is free only for a moment: the next process that binds to port 0, or
//! dials out, may get it before our process binds, or while ours is stopped to be started again. So
//! ours lie outside of the range that the kernel gives from, and are promised to one test process
//! at a time, for its whole life.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

/// Below are the ports of well-known services.
const FIRST: u16 = 10_000;

/// The promises to this process. Each is a socket with the port's number in its name, which lies
/// in the same network namespace as the port and goes with the process, however that ends.
static PROMISED: Mutex<Vec<UnixDatagram>> = Mutex::new(Vec::new());

/// A loopback address without a listener, which no other caller gets while this process runs.
pub fn free_address() -> Result<SocketAddr> {
    let range = "/proc/sys/net/ipv4/ip_local_port_range";
    let text = std::fs::read_to_string(range).context(range)?;
    let end: u16 = text
        .split_whitespace()
        .next()
        .and_then(|low| low.parse().ok())
        .filter(|low| *low > FIRST)
        .with_context(|| format!("no ports for tests between {FIRST} and {range}: {text}"))?;
    let count = end - FIRST;
    // Test processes that begin everywhere seldom ask for the same one.
    let random = RandomState::new().build_hasher().finish() % u64::from(count);
    let begin = u16::try_from(random)?;
    (begin..count)
        .chain(0..begin)
        .map(|at| FIRST + at)
        .find_map(promise)
        .with_context(|| format!("no free port from {FIRST} to {end}"))
}

fn promise(port: u16) -> Option<SocketAddr> {
    let name = UnixAddress::from_abstract_name(format!("throwline-e2e-port-{port}")).ok()?;
    let promised = UnixDatagram::bind_addr(&name).ok()?;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    TcpListener::bind(address).ok()?;
    let mut all = PROMISED.lock().unwrap_or_else(PoisonError::into_inner);
    all.push(promised);
    Some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once() {
        let given: Vec<SocketAddr> = (0..50).map(|_| free_address().unwrap()).collect();
        for address in &given {
            assert!(promise(address.port()).is_none());
            TcpListener::bind(address).unwrap();
        }
    }

    #[test]
    fn a_port_in_use_is_not_given() {
        let used = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(promise(used.local_addr().unwrap().port()).is_none());
    }
}
