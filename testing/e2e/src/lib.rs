//! The harness of the end-to-end stories, which lie in `tests/`.
//!
//! A [`Environment`] is a whole Throwline made of the real binary (relay, agents, local proxy) in front
//! of a cluster: the demo cluster in this process, or the one that `THROWLINE_E2E_KUBECONFIG`
//! names. A story drives it with real kubectl. A [`Suite`] runs the stories of one file in one
//! environment, and shows every process's log when one fails.
//!
//! Nothing here waits by the clock: a story waits for what it expects, with [`eventually`], and a
//! deadline only bounds how long a failure takes.

#![warn(clippy::mod_module_files)]

pub mod accounts;
pub mod backend;
pub mod balancer;
pub mod client;
pub mod environment;
pub mod expected_failures;
pub mod fault_plan;
pub mod faults;
pub mod fleet;
pub mod forwarder;
pub mod kubectl;
pub mod latency;
pub mod leak_check;
pub mod link;
pub mod load;
pub mod malicious_relay;
pub mod metrics;
pub mod namespace;
pub mod nginx;
pub mod operations;
pub mod pki;
pub mod pod;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod pty;
pub mod recorder;
pub mod simulated;
pub mod squid;
pub mod suite;
pub mod terminator;
pub mod tinyproxy;
pub mod tools;
pub mod upstream;

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub use environment::{Agent, Builder, Environment, Proxy, Relay, User};
pub use kubectl::{Kubectl, Output, Version};
pub use ports::free_address;
pub use process::Process;
pub use suite::{Fixture, Suite};

/// Tries until it succeeds. After `limit` the last error is the answer.
pub async fn eventually<T, F, Fut>(limit: Duration, what: &str, mut attempt: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let end = tokio::time::Instant::now() + limit;
    loop {
        let error = match attempt().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if tokio::time::Instant::now() >= end {
            return Err(error).with_context(|| format!("not so within {limit:?}: {what}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Unique letters and digits: for names, and for secrets to look for.
pub fn unique(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    let serial = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}{:x}{serial:x}", now & 0xffff_ffff_ffff)
}

/// `ensure!` for text, showing the text.
pub fn contains(text: &str, part: &str) -> Result<()> {
    ensure!(text.contains(part), "{part:?} is not in:\n{text}");
    Ok(())
}

/// `ensure!` for text that must not hold something.
pub fn lacks(text: &str, part: &str) -> Result<()> {
    ensure!(!text.contains(part), "{part:?} is in:\n{text}");
    Ok(())
}
