//! A bound on interim answers (1xx, RFC 9110, section 15.2), which a client otherwise skips without end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http::Request;
use tokio_util::sync::CancellationToken;

/// Interim answers to one request, at most. Servers send one or two; Go's client stops after five.
pub const MOST: usize = 16;

/// Counts the interim answers to one request on an HTTP/1.1 connection.
#[derive(Debug)]
pub struct Interim(CancellationToken);

impl Interim {
    /// Begins to count. To be called before the request is sent.
    pub fn of<B>(request: &mut Request<B>) -> Self {
        let exceeded = CancellationToken::new();
        let (count, signal) = (Arc::new(AtomicUsize::new(0)), exceeded.clone());
        hyper::ext::on_informational(request, move |_| {
            if count.fetch_add(1, Ordering::Relaxed) >= MOST {
                signal.cancel();
            }
        });
        Self(exceeded)
    }

    /// Ends when there were more than [`MOST`]; the caller that waits for the answer then gives the connection up.
    pub async fn exceeded(&self) {
        self.0.cancelled().await;
    }
}
