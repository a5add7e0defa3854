//! When this machine's place in the network has changed: an address came or went, or the machine
//! has slept. Connections made before may be dead without a word.

#[cfg(target_os = "linux")]
mod netlink;
#[cfg(not(target_os = "linux"))]
mod watcher;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

#[cfg(target_os = "linux")]
use netlink::Addresses;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{MissedTickBehavior, interval, sleep};
#[cfg(not(target_os = "linux"))]
use watcher::Addresses;

/// The system first tells the addresses that there are; nothing has changed by that.
const FIRST: Duration = Duration::from_secs(1);
/// Addresses come in groups: IPv4, IPv6, its temporary one.
const SETTLE: Duration = Duration::from_millis(300);
/// How often the two clocks are compared.
const LOOK: Duration = Duration::from_secs(2);
/// Changes that a slow reader may leave unread.
const KEPT: usize = 64;
/// By so much more than the time that the process saw has the wall clock moved, if it has slept.
/// A clock that was set looks the same, and costs a connection that was not needed.
const SLEPT: Duration = Duration::from_secs(10);

/// A change of the machine's network.
#[derive(Debug, Clone, Copy)]
enum Change {
    /// This address came or went.
    Address(IpAddr),
    Slept,
}

/// Changes of this machine's network, each reported once. A clone starts with the next change.
#[derive(Debug)]
pub struct Changes(broadcast::Receiver<Change>);

/// Follows this machine's network. Must be called within a tokio runtime; the watching ends when
/// all [`Changes`] have gone.
pub fn changes() -> Changes {
    let (changed, changes) = broadcast::channel(KEPT);
    tokio::spawn(async move {
        let addresses = addresses(&changed);
        let sleeps = sleeps(&changed);
        tokio::select! {
            ((), ()) = async { tokio::join!(addresses, sleeps) } => {}
            () = changed.closed() => {}
        }
    });
    Changes(changes)
}

impl Changes {
    /// Nothing ever changes: for connections that stay within a data centre.
    pub fn never() -> Self {
        Self(broadcast::channel(1).1)
    }

    /// Ends with the next change of any kind: a dial that has failed may succeed now. Cancel safe.
    pub async fn any(&mut self) {
        self.next().await;
    }

    /// Ends with the next change by which a TCP connection between `local` and `remote` may be dead,
    /// or on a way that is no longer the one to there: the machine has slept, this very address came
    /// or went, or a new connection would have another. What a container or another link does is
    /// passed over. Without addresses, each change counts. Cancel safe.
    pub async fn affecting(&mut self, ends: Option<(SocketAddr, SocketAddr)>) {
        loop {
            match (self.next().await, ends) {
                (Some(Change::Address(address)), Some((local, remote))) => {
                    let local = local.ip().to_canonical();
                    if address.to_canonical() == local || source(remote) != Some(local) {
                        return;
                    }
                }
                (Some(Change::Slept) | None, _) | (_, None) => return,
            }
        }
    }

    /// Passes over what has changed until now.
    pub fn skip(&mut self) {
        self.0 = self.0.resubscribe();
    }

    /// None: more has changed than is remembered.
    async fn next(&mut self) -> Option<Change> {
        match self.0.recv().await {
            Ok(change) => Some(change),
            Err(RecvError::Lagged(_)) => None,
            // The watcher has ended.
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }
}

impl Clone for Changes {
    fn clone(&self) -> Self {
        Self(self.0.resubscribe())
    }
}

/// The address from which this machine would reach that one now. No packet is sent.
fn source(remote: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = match remote {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(remote).ok()?;
    Some(socket.local_addr().ok()?.ip().to_canonical())
}

fn report(changed: &broadcast::Sender<Change>, change: Change) {
    // Without receivers there is nothing to do.
    let _ = changed.send(change);
}

async fn addresses(changed: &broadcast::Sender<Change>) {
    let mut watcher = match Addresses::new() {
        Ok(watcher) => watcher,
        Err(error) => {
            // As in some sandboxes. A dead connection is then noticed by its silence.
            tracing::debug!(%error, "the system does not tell when addresses change");
            return;
        }
    };
    let start = Instant::now();
    loop {
        match watcher.next().await {
            Ok(address) if start.elapsed() > FIRST && is_a_way_out(address) => {
                tracing::debug!(%address, "an address of this machine came or went");
                sleep(SETTLE).await;
                report(changed, Change::Address(address));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(%error, "the system tells no more about addresses");
                return;
            }
        }
    }
}

/// Loopback and link-local addresses lead nowhere.
fn is_a_way_out(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

async fn sleeps(changed: &broadcast::Sender<Change>) {
    let mut every = interval(LOOK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = (Instant::now(), SystemTime::now());
    loop {
        every.tick().await;
        let now = (Instant::now(), SystemTime::now());
        if has_slept(before, now) {
            tracing::info!("the machine has slept, or its clock was set");
            report(changed, Change::Slept);
        }
        before = now;
    }
}

/// The monotonic clock of Linux and macOS stands still while the machine sleeps.
fn has_slept(before: (Instant, SystemTime), now: (Instant, SystemTime)) -> bool {
    let seen = now.0.saturating_duration_since(before.0);
    let passed = now.1.duration_since(before.1).unwrap_or_default();
    passed > seen + SLEPT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sleep_is_a_wall_clock_that_ran_ahead() {
        let before = (Instant::now(), SystemTime::now());
        let after = |seen: u64, passed: u64| {
            (
                before.0 + Duration::from_secs(seen),
                before.1 + Duration::from_secs(passed),
            )
        };
        assert!(!has_slept(before, after(2, 2)));
        assert!(!has_slept(before, after(600, 601)));
        assert!(has_slept(before, after(2, 60)));
        let set_back = (before.0 + LOOK, before.1 - Duration::from_secs(3600));
        assert!(!has_slept(before, set_back));
    }

    #[test]
    fn loopback_and_link_local_are_no_way_out() {
        for address in ["127.0.0.1", "169.254.1.1", "::1", "fe80::1"] {
            assert!(!is_a_way_out(address.parse().unwrap()), "{address}");
        }
        for address in ["10.0.0.7", "192.0.2.1", "2001:db8::1"] {
            assert!(is_a_way_out(address.parse().unwrap()), "{address}");
        }
    }

    fn ends(local: &str, remote: &str) -> Option<(SocketAddr, SocketAddr)> {
        Some((local.parse().unwrap(), remote.parse().unwrap()))
    }

    async fn is_affected(address: &str, ends: Option<(SocketAddr, SocketAddr)>) -> bool {
        let (changed, changes) = broadcast::channel(KEPT);
        let mut changes = Changes(changes);
        report(&changed, Change::Address(address.parse().unwrap()));
        let affecting = changes.affecting(ends);
        // An earlier change is reported at once.
        tokio::time::timeout(Duration::ZERO, affecting)
            .await
            .is_ok()
    }

    #[tokio::test]
    async fn only_what_may_cut_a_connection_affects_it() {
        let through_loopback = ends("127.0.0.1:40000", "127.0.0.1:443");
        assert!(!is_affected("172.17.0.1", through_loopback).await);
        assert!(is_affected("127.0.0.1", through_loopback).await);
        assert!(is_affected("::ffff:127.0.0.1", through_loopback).await);
        assert!(is_affected("172.17.0.1", None).await);
        // A new connection would not have this address: another way leads there now.
        let moved = ends("192.0.2.7:40000", "127.0.0.1:443");
        assert!(is_affected("172.17.0.1", moved).await);
    }

    #[tokio::test]
    async fn changes_that_are_skipped_or_lost_are_known() {
        let (changed, changes) = broadcast::channel(KEPT);
        let mut changes = Changes(changes);
        let docker = Change::Address("172.17.0.1".parse().unwrap());
        report(&changed, docker);
        changes.skip();
        let any = tokio::time::timeout(Duration::ZERO, changes.any()).await;
        assert!(any.is_err(), "it was skipped");
        for _ in 0..=KEPT {
            report(&changed, docker);
        }
        let ends = ends("127.0.0.1:40000", "127.0.0.1:443");
        let affecting = changes.affecting(ends);
        assert!(
            tokio::time::timeout(Duration::ZERO, affecting)
                .await
                .is_ok(),
            "what is not known may be anything"
        );
    }
}
