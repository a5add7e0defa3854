//! What all requests share.

use std::collections::HashSet;
use std::sync::Arc;

use http::{HeaderValue, Response, header};
use throwline_kube_wire::http1::gate::{Allowance, Permit};
use throwline_ops::{Drain, DrainGuard, GaugeGuard};
use tokio::sync::Semaphore;

use crate::metrics::Metrics;
use crate::session::Sessions;

/// What all connections share.
pub(crate) struct Proxy {
    pub(crate) sessions: Arc<Sessions>,
    /// The clusters to serve; `None` for all.
    pub(crate) only: Option<HashSet<String>>,
    pub(crate) large_heads: Arc<LargeHeads>,
    /// Open requests; shutdown waits for them.
    pub(crate) drain: Drain,
}

/// Counts a request as open until its answer has ended.
pub(crate) struct InFlight {
    _gauge: GaugeGuard,
    _drain: DrainGuard,
}

/// Permits for heads over [`throwline_kube_wire::http1::head::SMALL`] bytes.
pub(crate) struct LargeHeads(Arc<Semaphore>);

impl LargeHeads {
    pub(crate) fn new(limit: usize) -> Self {
        Self(Arc::new(Semaphore::new(limit)))
    }
}

impl Allowance for LargeHeads {
    fn admit(&self) -> Option<Permit> {
        let permit = self.0.clone().try_acquire_owned().ok()?;
        Some(Arc::new(permit))
    }
}

impl Proxy {
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.sessions.context().metrics
    }

    pub(crate) fn in_flight(&self) -> InFlight {
        InFlight {
            _gauge: GaugeGuard::new(&self.metrics().requests_in_flight),
            _drain: self.drain.guard(),
        }
    }
}

/// Tells HTTP/1.1 not to read another request from this connection.
pub(crate) fn close<B>(response: &mut Response<B>) {
    response
        .headers_mut()
        .insert(header::CONNECTION, HeaderValue::from_static("close"));
}
