//! Freed memory goes back to the system.
//!
//! glibc's allocator gives back only what is free at a heap's end, where something small nearly always
//! remains: after a load of 960 MB it kept 770. Other allocators give back by themselves, but each of a
//! stalled reader's buffers then costs up to twice its size (mimalloc), and a busy relay half as much
//! again.

use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// How often it is considered.
const EVERY: Duration = Duration::from_secs(2);
/// Work of the runtime's threads within [`EVERY`]. With less, nothing worth giving back was freed.
const USED: Duration = Duration::from_millis(10);
/// With more, the memory will be needed again: it is given back at [`BUSY`] intervals only.
const LOADED: Duration = Duration::from_millis(400);
const BUSY: Duration = Duration::from_secs(20);
/// The search takes at most this share of the time; its length grows with the heap.
const SHARE: u32 = 200;

/// What was seen at the last look.
struct Pace {
    busy: Duration,
    given_back: Instant,
    took: Duration,
    /// Something may have been freed since.
    is_due: bool,
}

impl Pace {
    fn new(busy: Duration, now: Instant) -> Self {
        Self {
            busy,
            given_back: now,
            took: Duration::ZERO,
            is_due: false,
        }
    }

    /// Whether to give back now, when the threads have worked for `busy`.
    fn look(&mut self, busy: Duration, now: Instant) -> bool {
        let used = busy.saturating_sub(self.busy);
        self.busy = busy;
        self.is_due |= used >= USED;
        let mut pause = self.took * SHARE;
        if used >= LOADED {
            pause = pause.max(BUSY);
        }
        self.is_due && now.duration_since(self.given_back) >= pause
    }

    fn gave_back(&mut self, busy: Duration, took: Duration, now: Instant) {
        *self = Self {
            busy,
            given_back: now,
            took,
            is_due: false,
        };
    }
}

/// Gives memory back for as long as the process runs: within 4 s of a load's end, and now and then
/// during one.
pub(crate) async fn give_back_regularly() {
    let mut every = interval(EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut pace = Pace::new(Duration::ZERO, Instant::now());
    loop {
        every.tick().await;
        if !pace.look(busy(), Instant::now()) {
            continue;
        }
        let start = Instant::now();
        // Threads that allocate meanwhile may wait for it, one heap after the other.
        if tokio::task::spawn_blocking(give_back).await.is_err() {
            return;
        }
        pace.gave_back(busy(), start.elapsed(), Instant::now());
    }
}

/// How long the runtime's threads have worked until now.
fn busy() -> Duration {
    let metrics = Handle::current().metrics();
    (0..metrics.num_workers())
        .map(|worker| metrics.worker_total_busy_duration(worker))
        .sum()
}

/// malloc_trim(3).
#[cfg(target_env = "gnu")]
#[expect(unsafe_code, reason = "no crate has a safe form of it")]
fn give_back() {
    // SAFETY: it takes no pointer, may be called at any time from any thread, and changes no memory
    // that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(not(target_env = "gnu"))]
fn give_back() {}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn an_idle_process_looks_for_nothing_and_a_busy_one_seldom() {
        let start = Instant::now();
        let mut pace = Pace::new(Duration::ZERO, start);
        assert!(!pace.look(MS, start + EVERY), "nothing was done");
        assert!(!pace.look(1000 * MS, start + 2 * EVERY), "under load");
        assert!(pace.look(1001 * MS, start + 3 * EVERY), "after it");
        pace.gave_back(1001 * MS, MS, start + 3 * EVERY);
        assert!(!pace.look(1002 * MS, start + 4 * EVERY), "nothing since");
        assert!(
            pace.look(2000 * MS, start + 3 * EVERY + BUSY),
            "a long load"
        );
        // Of a large heap the search takes long, so it is seldom.
        pace.gave_back(2000 * MS, 100 * MS, start + 2 * BUSY);
        assert!(!pace.look(2100 * MS, start + 2 * BUSY + EVERY));
        assert!(pace.look(2200 * MS, start + 3 * BUSY));
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn freed_memory_between_what_is_used_goes_back() {
        let resident_mib = || -> u64 {
            let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
            let line = status.lines().find(|line| line.starts_with("VmRSS:"));
            let kib = line.and_then(|line| line.split_whitespace().nth(1));
            let kib: u64 = kib
                .and_then(|kib| kib.parse().ok())
                .expect("proc(5) has it");
            kib / 1024
        };
        let before = resident_mib();
        // Chunks of bulk, with something small that stays behind each, as a load leaves them.
        let (load, kept): (Vec<_>, Vec<_>) = (0..4096)
            .map(|_| (vec![7_u8; 32 * 1024 + 9], Box::new([0_u8; 64])))
            .unzip();
        let during = resident_mib();
        assert!(during >= before + 100, "{before} MiB became {during}");
        drop(load);
        give_back();
        let after = resident_mib();
        assert!(after <= before + 50, "{after} MiB stay");
        drop(kept);
    }
}
