//! Gauges of what is there now.

use prometheus::IntGauge;

/// Counts one on a gauge while it lives.
#[derive(Debug)]
#[must_use]
pub struct GaugeGuard(IntGauge);

impl GaugeGuard {
    /// Adds one, until the guard is dropped.
    pub fn new(gauge: &IntGauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}
