//! Threads for the cryptography of handshakes, with a lower priority than those that serve lines.
//!
//! A handshake takes some milliseconds of a processor, in which its thread serves nothing else.
//! After an outage there are hundreds of them in a second, and a request on an open line would wait
//! behind a few on each thread. On threads of their own, the operating system's scheduler runs the
//! lines first, and handshakes get what is left, at least a share by their weight.

use std::future::Future;

use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use crate::error::Error;

/// The least favourable priority at which a handshake still completes within its deadline on a
/// machine that is full of other work: a fifth of the weight of a thread at 0 (`sched(7)`).
const NICE: i32 = 7;

/// Runs handshakes. On Linux a thread's priority can be lowered; elsewhere all have the same.
pub(crate) struct Handshakes(Option<Runtime>);

impl Handshakes {
    /// As many threads as there are processors: none is idle while handshakes wait.
    pub(crate) fn new() -> Result<Self, Error> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(std::thread::available_parallelism().map_or(1, usize::from))
            .thread_name("handshake")
            .on_thread_start(|| {
                #[cfg(target_os = "linux")]
                if let Err(error) = rustix::process::nice(NICE) {
                    debug!(%error, "handshakes have the priority of everything else");
                }
            })
            .enable_time()
            .build()
            .map_err(Error::Threads)?;
        Ok(Self(Some(runtime)))
    }

    /// Runs `work` there; it is dropped with the future that this returns. `None`: it panicked, or the
    /// relay ends.
    ///
    /// It must not start tasks or open sockets, which would stay on these threads.
    pub(crate) async fn run<F>(&self, work: F) -> Option<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let runtime = self.0.as_ref()?;
        AbortOnDropHandle::new(runtime.spawn(work)).await.ok()
    }
}

impl Drop for Handshakes {
    /// A runtime may not wait for its threads within another.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_runs_on_other_threads_and_ends_with_its_owner() {
        let handshakes = Handshakes::new().unwrap();
        let here = std::thread::current().id();
        let there = handshakes.run(async { std::thread::current().id() }).await;
        assert!(there.is_some_and(|there| there != here));

        let (held, dropped) = tokio::sync::oneshot::channel::<()>();
        let endless = handshakes.run(async move {
            let _held = held;
            std::future::pending::<()>().await;
        });
        let ended = tokio::time::timeout(std::time::Duration::from_millis(20), endless).await;
        assert!(ended.is_err());
        assert!(dropped.await.is_err(), "the work outlived its owner");

        let panicked = handshakes.run(async { panic!("a fault of ours") });
        assert!(panicked.await.is_none());
    }
}
