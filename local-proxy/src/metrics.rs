//! Counters of the local proxy. Gauges are moved by guards, so that each end is counted once.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Handles are cheap to clone and count into the same place.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Loopback connections that are open.
    pub connections: IntGauge,
    /// Requests whose answer has not ended.
    pub requests_in_flight: IntGauge,
    /// Requests, by how they ended: `forwarded`, `upgraded`, `refused`, `failed`.
    pub requests: IntCounterVec,
    /// API sessions that are open.
    pub api_sessions: IntGauge,
    /// Upgrade sessions that are open, warm spares among them.
    pub upgrade_sessions: IntGauge,
    /// Upgraded connections that are being copied.
    pub upgraded: IntGauge,
    /// Lines ever opened.
    pub lines: IntCounter,
    /// Carriers ever opened.
    pub carriers: IntCounter,
    /// Bytes of upgraded connections, both ways.
    pub upgraded_bytes: IntCounter,
    /// Tasks of the proxy that are running.
    pub tasks: IntGauge,
    /// Lines that go on when their carrier is lost.
    pub kept_lines: IntGauge,
    /// Lines that went on over another stream.
    pub resumptions: IntCounter,
    /// From the loss of a line's stream to the next one.
    pub line_pause_seconds: Histogram,
    /// Bytes that were sent again, because a stream was lost with them.
    pub replayed_bytes: IntCounter,
    /// Lines that were cut and not resumed, by why: `expired`, `gone`.
    pub lines_given_up: IntCounterVec,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    #[must_use]
    pub fn new() -> Self {
        let gauge = |name: &str, help: &str| {
            IntGauge::new(format!("throwline_local_proxy_{name}"), help)
                .expect("the names below are valid")
        };
        let counter = |name: &str, help: &str| {
            IntCounter::new(format!("throwline_local_proxy_{name}"), help)
                .expect("the names below are valid")
        };
        Self {
            connections: gauge("connections", "loopback connections that are open"),
            requests_in_flight: gauge("requests_in_flight", "requests not yet answered in full"),
            requests: IntCounterVec::new(
                Opts::new(
                    "throwline_local_proxy_requests_total",
                    "requests by outcome",
                ),
                &["outcome"],
            )
            .expect("the name above is valid"),
            api_sessions: gauge("api_sessions", "API sessions that are open"),
            upgrade_sessions: gauge("upgrade_sessions", "upgrade sessions that are open"),
            upgraded: gauge("upgraded", "upgraded connections being copied"),
            lines: counter("lines_total", "lines opened"),
            carriers: counter("carriers_total", "carriers opened"),
            upgraded_bytes: counter("upgraded_bytes_total", "bytes of upgraded connections"),
            tasks: gauge("tasks", "tasks that are running"),
            kept_lines: gauge("kept_lines", "lines that outlive their carriers"),
            resumptions: counter(
                "line_resumptions_total",
                "lines that went on over another stream",
            ),
            line_pause_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "throwline_local_proxy_line_pause_seconds",
                    "from the loss of a line's stream to the next one",
                )
                .buckets(vec![
                    0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0,
                ]),
            )
            .expect("the name above is valid"),
            replayed_bytes: counter("line_replayed_bytes_total", "bytes of lines sent again"),
            lines_given_up: IntCounterVec::new(
                Opts::new(
                    "throwline_local_proxy_lines_given_up_total",
                    "lines that were cut and not resumed, by why",
                ),
                &["reason"],
            )
            .expect("the name above is valid"),
        }
    }

    /// Makes them part of what `/metrics` serves.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.connections.clone()))?;
        registry.register(Box::new(self.requests_in_flight.clone()))?;
        registry.register(Box::new(self.requests.clone()))?;
        registry.register(Box::new(self.api_sessions.clone()))?;
        registry.register(Box::new(self.upgrade_sessions.clone()))?;
        registry.register(Box::new(self.upgraded.clone()))?;
        registry.register(Box::new(self.lines.clone()))?;
        registry.register(Box::new(self.carriers.clone()))?;
        registry.register(Box::new(self.upgraded_bytes.clone()))?;
        registry.register(Box::new(self.tasks.clone()))?;
        registry.register(Box::new(self.kept_lines.clone()))?;
        registry.register(Box::new(self.resumptions.clone()))?;
        registry.register(Box::new(self.line_pause_seconds.clone()))?;
        registry.register(Box::new(self.replayed_bytes.clone()))?;
        registry.register(Box::new(self.lines_given_up.clone()))
    }

    pub(crate) fn count(&self, outcome: &'static str) {
        self.requests.with_label_values(&[outcome]).inc();
    }
}

#[cfg(test)]
mod tests {
    use throwline_ops::GaugeGuard;

    use super::*;

    #[test]
    fn a_guard_gives_back_what_it_took() {
        let metrics = Metrics::new();
        let held = GaugeGuard::new(&metrics.tasks);
        assert_eq!(metrics.tasks.get(), 1);
        drop(held);
        assert_eq!(metrics.tasks.get(), 0);
    }

    #[test]
    fn all_can_be_registered_together_and_only_once() {
        let registry = Registry::new();
        let metrics = Metrics::new();
        metrics.register(&registry).unwrap();
        assert!(metrics.register(&registry).is_err());
    }
}
