//! One request to stop, which every holder of a [`Shutdown`] sees.

use std::io;
use tokio_util::sync::CancellationToken;

/// The side that waits for the request to stop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown(CancellationToken);

/// The side that tells. Dropping it tells too, so that a lost owner cannot leave work running.
#[derive(Debug)]
pub struct ShutdownTrigger(CancellationToken);

impl Shutdown {
    /// A pair: the holder of the trigger decides.
    pub fn new() -> (ShutdownTrigger, Self) {
        let token = CancellationToken::new();
        (ShutdownTrigger(token.clone()), Self(token))
    }

    /// Requested by the first SIGINT or SIGTERM. Must be called within a tokio runtime.
    ///
    /// The returned [`SecondSignal`] ends at the next such signal: the caller's `main` then exits
    /// at once, because a second signal asks to skip the drain.
    ///
    /// # Errors
    /// The signal handlers cannot be installed.
    pub fn from_signals() -> io::Result<(Self, SecondSignal)> {
        let mut signals = Signals::listen()?;
        let token = CancellationToken::new();
        let second = CancellationToken::new();
        let (first_seen, second_seen) = (token.clone(), second.clone());
        tokio::spawn(async move {
            let name = signals.next().await;
            tracing::info!(signal = name, "stopping");
            first_seen.cancel();
            let name = signals.next().await;
            tracing::warn!(signal = name, "stopping at once");
            second_seen.cancel();
        });
        Ok((Self(token), SecondSignal(second)))
    }

    /// Ends when the stop is requested; at once if it was before.
    pub async fn requested(&self) {
        self.0.cancelled().await;
    }

    /// Whether a shutdown was requested.
    pub fn is_requested(&self) -> bool {
        self.0.is_cancelled()
    }

    /// A part that can be stopped alone, and stops with the whole.
    pub fn child(&self) -> (ShutdownTrigger, Self) {
        let token = self.0.child_token();
        (ShutdownTrigger(token.clone()), Self(token))
    }
}

impl ShutdownTrigger {
    /// Requests the shutdown.
    pub fn trigger(&self) {
        self.0.cancel();
    }
}

impl Drop for ShutdownTrigger {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// The second request to stop; see [`Shutdown::from_signals`].
#[derive(Clone, Debug)]
pub struct SecondSignal(CancellationToken);

impl SecondSignal {
    /// Ends at the second signal.
    pub async fn received(&self) {
        self.0.cancelled().await;
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn listen() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
        "interrupt"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_clones_see_one_request() {
        let (trigger, shutdown) = Shutdown::new();
        let other = shutdown.clone();
        let waiter = tokio::spawn(async move { other.requested().await });
        assert!(!shutdown.is_requested());
        trigger.trigger();
        waiter.await.unwrap();
        shutdown.requested().await;
        assert!(shutdown.is_requested());
    }

    #[tokio::test]
    async fn a_child_stops_alone_and_with_its_parent() {
        let (trigger, shutdown) = Shutdown::new();
        let (one, first) = shutdown.child();
        let (_two, second) = shutdown.child();
        one.trigger();
        first.requested().await;
        assert!(!second.is_requested() && !shutdown.is_requested());
        trigger.trigger();
        second.requested().await;
    }

    #[tokio::test]
    async fn a_dropped_trigger_stops_the_work() {
        let (trigger, shutdown) = Shutdown::new();
        drop(trigger);
        shutdown.requested().await;
    }
}
