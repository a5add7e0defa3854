//! The allocator, and how memory that was freed goes back to the system.

use std::hint::black_box;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

/// It gives memory back to the system wherever in a heap it was freed. glibc's does so only from a
/// heap's end, where something small nearly always remains.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// How often freed memory is given back. Costs one system call each time.
const EVERY: Duration = Duration::from_secs(2);

/// Bytes of a block that has pages of the allocator to itself: more than 512 KiB.
const OWN_PAGES: usize = 1024 * 1024;

/// Gives memory back for as long as the process runs: 1 to 3 s after it was freed.
pub(crate) async fn give_back_regularly() {
    let mut every = interval(EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        give_back();
    }
}

/// Gives back what has been free for a second.
///
/// mimalloc does so only as it frees a page. A process that is idle after a load frees small blocks of
/// pages that stay in use, and would keep the peak of the load. This frees a page that was never
/// touched.
fn give_back() {
    drop(black_box(Vec::<u8>::with_capacity(OWN_PAGES)));
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::Instant;

    use super::*;

    fn resident_mib() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        let kib: u64 = kib
            .and_then(|kib| kib.parse().ok())
            .expect("proc(5) has it");
        kib / 1024
    }

    #[test]
    fn a_process_that_is_idle_after_a_load_gives_its_memory_back() {
        let before = resident_mib();
        // Chunks of bulk, as a load leaves them.
        let load: Vec<Vec<u8>> = (0..4096).map(|_| vec![7; 32 * 1024 + 9]).collect();
        let during = resident_mib();
        assert!(during >= before + 100, "{before} MiB became {during}");
        drop(load);
        let limit = Instant::now() + Duration::from_secs(60);
        while resident_mib() > before + 50 {
            assert!(Instant::now() < limit, "{} MiB stay", resident_mib());
            std::thread::sleep(Duration::from_millis(100));
            give_back();
        }
    }
}
