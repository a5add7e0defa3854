//! All metrics of the agent, so that a name is never used twice.

use std::time::Duration;

use http::StatusCode;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

/// Cheap to clone: every field is a handle.
#[derive(Clone)]
pub struct Metrics {
    requests: IntCounterVec,
    answer_seconds: Histogram,
    pub(crate) refused: IntCounter,
    pub(crate) lines: IntCounterVec,
    pub(crate) sessions: IntGauge,
    pub(crate) upgrades: IntGauge,
    pub(crate) uplink: throwline_uplink::Metrics,
    pub(crate) bulk_uplink: throwline_uplink::Metrics,
    pub(crate) upstream_connections: IntGauge,
    pub(crate) cut_answers: IntCounter,
    audit_dropped: IntCounter,
    pub(crate) audit_waits: IntCounter,
    pub(crate) resumptions: IntCounter,
    pub(crate) line_pause_seconds: Histogram,
    pub(crate) replayed_bytes: IntCounter,
    pub(crate) lines_given_up: IntCounterVec,
    pub(crate) read_ahead_bytes: IntGauge,
    limited: IntCounterVec,
    pub(crate) kept_bytes: IntGauge,
    pub(crate) requests_now: IntGauge,
}

impl Metrics {
    /// Makes all metrics and registers them.
    ///
    /// # Errors
    /// The registry has metrics of these names already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let made = Self::make()?;
        registry.register(Box::new(made.requests.clone()))?;
        registry.register(Box::new(made.answer_seconds.clone()))?;
        registry.register(Box::new(made.refused.clone()))?;
        registry.register(Box::new(made.lines.clone()))?;
        registry.register(Box::new(made.sessions.clone()))?;
        registry.register(Box::new(made.upgrades.clone()))?;
        made.uplink.register(registry)?;
        made.bulk_uplink.register(registry)?;
        registry.register(Box::new(made.upstream_connections.clone()))?;
        registry.register(Box::new(made.cut_answers.clone()))?;
        registry.register(Box::new(made.audit_dropped.clone()))?;
        registry.register(Box::new(made.audit_waits.clone()))?;
        registry.register(Box::new(made.resumptions.clone()))?;
        registry.register(Box::new(made.line_pause_seconds.clone()))?;
        registry.register(Box::new(made.replayed_bytes.clone()))?;
        registry.register(Box::new(made.lines_given_up.clone()))?;
        registry.register(Box::new(made.read_ahead_bytes.clone()))?;
        registry.register(Box::new(made.limited.clone()))?;
        registry.register(Box::new(made.kept_bytes.clone()))?;
        registry.register(Box::new(made.requests_now.clone()))?;
        Ok(made)
    }

    fn make() -> Result<Self, prometheus::Error> {
        let counters = |name: &str, help: &str, label: &str| {
            IntCounterVec::new(Opts::new(name, help), &[label])
        };
        Ok(Self {
            requests: counters(
                "throwline_agent_requests_total",
                "Requests answered, by the class of the status code.",
                "code",
            )?,
            answer_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "throwline_agent_answer_seconds",
                    "From a request's head to its answer's head, for requests that the API server answered.",
                )
                .buckets(vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0]),
            )?,
            refused: IntCounter::new(
                "throwline_agent_refused_total",
                "Requests that the agent refused by its own rules.",
            )?,
            lines: counters("throwline_agent_lines_total", "Lines offered by relays, by what became of them.", "end")?,
            sessions: IntGauge::new("throwline_agent_sessions", "Sealed sessions open now.")?,
            upgrades: IntGauge::new("throwline_agent_upgrades", "Upgraded connections open now.")?,
            uplink: throwline_uplink::Metrics::new("agent")?,
            bulk_uplink: throwline_uplink::Metrics::new("agent_bulk")?,
            upstream_connections: IntGauge::new(
                "throwline_agent_upstream_connections",
                "Connections to the API server open now.",
            )?,
            cut_answers: IntCounter::new(
                "throwline_agent_cut_answers_total",
                "Answers that ended before their own end, and were passed on as cut.",
            )?,
            audit_dropped: IntCounter::new("throwline_agent_audit_dropped_total", "Audit events that were lost.")?,
            audit_waits: IntCounter::new(
                "throwline_agent_audit_waits_total",
                "Requests that waited because the audit's output did not keep up.",
            )?,
            resumptions: IntCounter::new(
                "throwline_agent_line_resumptions_total",
                "Lines that went on over another stream.",
            )?,
            line_pause_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "throwline_agent_line_pause_seconds",
                    "From the loss of a line's stream to the next one, for lines that were resumed.",
                )
                .buckets(vec![0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0]),
            )?,
            replayed_bytes: IntCounter::new(
                "throwline_agent_line_replayed_bytes_total",
                "Bytes of lines that were sent again, because a stream was lost with them.",
            )?,
            lines_given_up: counters(
                "throwline_agent_lines_given_up_total",
                "Lines that were cut and not resumed, by why.",
                "reason",
            )?,
            read_ahead_bytes: IntGauge::new(
                "throwline_agent_read_ahead_bytes",
                "Bytes of buffer for what was read from the API server while users took nothing.",
            )?,
            limited: counters(
                "throwline_agent_limited_total",
                "How often a limit refused or slowed a user, by the limit.",
                "limit",
            )?,
            kept_bytes: IntGauge::new(
                "throwline_agent_kept_bytes",
                "Bytes taken from the memory budget for users who do not read or do not acknowledge.",
            )?,
            requests_now: IntGauge::new(
                "throwline_agent_requests_in_flight",
                "Requests and watches under way now, without upgrades.",
            )?,
        })
    }

    pub(crate) fn answered(&self, status: StatusCode) {
        let class = match status.as_u16() {
            100..=199 => "1xx",
            200..=299 => "2xx",
            300..=399 => "3xx",
            400..=499 => "4xx",
            _ => "5xx",
        };
        self.requests.with_label_values(&[class]).inc();
    }

    /// A limit has refused or slowed a user.
    pub(crate) fn limited(&self, limit: &str) {
        self.limited.with_label_values(&[limit]).inc();
    }

    pub(crate) fn took(&self, elapsed: Duration) {
        self.answer_seconds.observe(elapsed.as_secs_f64());
    }

    /// Logged at the 1st, 2nd, 4th, 8th … loss.
    pub(crate) fn audit_dropped(&self) {
        self.audit_dropped.inc();
        let lost = self.audit_dropped.get();
        if lost.is_power_of_two() {
            tracing::warn!(lost, "audit events are lost");
        }
    }

    pub(crate) fn audit_lost(&self) -> u64 {
        self.audit_dropped.get()
    }
}

#[cfg(test)]
impl Default for Metrics {
    fn default() -> Self {
        Self::make().expect("the names and buckets are constants")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_the_prefix_and_registers_once() {
        let registry = Registry::new();
        let metrics = Metrics::register(&registry).unwrap();
        metrics.answered(StatusCode::OK);
        let families = registry.gather();
        assert!(
            families
                .iter()
                .all(|family| family.name().starts_with("throwline_agent_"))
        );
        assert!(Metrics::register(&registry).is_err());
    }
}
