//! When this machine's place in the network has changed: an address came or went, or the machine
//! has slept. Connections made before may be dead without a word.

#[cfg(target_os = "linux")]
mod netlink;
#[cfg(not(target_os = "linux"))]
mod watcher;

use std::net::IpAddr;
use std::time::{Duration, Instant, SystemTime};

#[cfg(target_os = "linux")]
use netlink::Addresses;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};
#[cfg(not(target_os = "linux"))]
use watcher::Addresses;

/// The system first tells the addresses that there are; nothing has changed by that.
const FIRST: Duration = Duration::from_secs(1);
/// Addresses come in groups: IPv4, IPv6, its temporary one.
const SETTLE: Duration = Duration::from_millis(300);
/// How often the two clocks are compared.
const LOOK: Duration = Duration::from_secs(2);
/// By so much more than the time that the process saw has the wall clock moved, if it has slept.
/// A clock that was set looks the same, and costs a connection that was not needed.
const SLEPT: Duration = Duration::from_secs(10);

/// Counts changes; waiting on it is [`watch::Receiver::changed`]. Must be called within a tokio
/// runtime; the watching ends when all receivers have gone.
pub fn changes() -> watch::Receiver<u64> {
    let (changed, changes) = watch::channel(0);
    tokio::spawn(async move {
        let addresses = addresses(&changed);
        let sleeps = sleeps(&changed);
        tokio::select! {
            ((), ()) = async { tokio::join!(addresses, sleeps) } => {}
            () = changed.closed() => {}
        }
    });
    changes
}

fn tell(changed: &watch::Sender<u64>) {
    changed.send_modify(|count| *count += 1);
}

async fn addresses(changed: &watch::Sender<u64>) {
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
                tracing::info!(%address, "the network has changed");
                sleep(SETTLE).await;
                tell(changed);
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

async fn sleeps(changed: &watch::Sender<u64>) {
    let mut every = interval(LOOK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = (Instant::now(), SystemTime::now());
    loop {
        every.tick().await;
        let now = (Instant::now(), SystemTime::now());
        if has_slept(before, now) {
            tracing::info!("the machine has slept, or its clock was set");
            tell(changed);
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
}
