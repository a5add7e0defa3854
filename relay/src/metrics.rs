//! What the relay counts. Labels are roles, codes and outcomes: closed sets, never names.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use throwline_ops::GaugeGuard;
use throwline_tunnel::proto::messages::RefusalCode;
use throwline_tunnel::splice::{Budget, Meter};

use crate::config::Limits;
use crate::live::EndReason;

#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) half_open: IntGauge,
    pub(crate) half_open_shed: IntCounter,
    pub(crate) accept_errors: IntCounter,
    pub(crate) handshakes: IntCounterVec,
    pub(crate) enrolments: IntCounterVec,
    renewals: IntCounterVec,
    pub(crate) double_agents: IntCounter,
    pub(crate) carriers: IntGaugeVec,
    pub(crate) lines: IntGauge,
    ended: IntCounterVec,
    meter: Arc<Meter>,
    pub(crate) refusals: IntCounterVec,
    pub(crate) forwarded: IntCounterVec,
    pub(crate) peer_failures: IntCounter,
    open: Histogram,
    limited: IntCounterVec,
    buffers: Budget,
}

impl Metrics {
    pub(crate) fn register(
        registry: &Registry,
        limits: &Limits,
    ) -> Result<Self, prometheus::Error> {
        let metrics = Self {
            half_open: IntGauge::new(
                "throwline_relay_half_open",
                "Connections that are neither a carrier nor answered yet",
            )?,
            half_open_shed: IntCounter::new(
                "throwline_relay_half_open_shed_total",
                "Half-open connections closed to make room for newer ones",
            )?,
            accept_errors: IntCounter::new(
                "throwline_relay_accept_errors_total",
                "Failures to accept a TCP connection",
            )?,
            handshakes: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_handshakes_total",
                    "Connections by how their handshake ended",
                ),
                &["outcome"],
            )?,
            enrolments: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_enrolments_total",
                    "Attempts to redeem a token by how they ended",
                ),
                &["outcome"],
            )?,
            renewals: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_renewals_total",
                    "Renewals of certificates by how they ended; second-key: one certificate was \
                     renewed with two keys",
                ),
                &["outcome"],
            )?,
            double_agents: IntCounter::new(
                "throwline_relay_double_agents_total",
                "Agents' carriers with a certificate that another process has too",
            )?,
            carriers: IntGaugeVec::new(
                Opts::new("throwline_relay_carriers", "Carriers that are up"),
                &["role"],
            )?,
            lines: IntGauge::new("throwline_relay_lines", "Lines being spliced")?,
            ended: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_ended_total",
                    "Carriers and lines that the relay has ended, by the reason",
                ),
                &["what", "reason"],
            )?,
            meter: Arc::default(),
            refusals: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_refusals_total",
                    "Streams refused, by the code that the peer got",
                ),
                &["code"],
            )?,
            forwarded: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_forwarded_lines_total",
                    "Lines that went over a peer carrier, out to or in from another relay",
                ),
                &["direction"],
            )?,
            peer_failures: IntCounter::new(
                "throwline_relay_peer_failures_total",
                "Carriers to another relay that did not come up",
            )?,
            open: Histogram::with_opts(
                HistogramOpts::new(
                    "throwline_relay_open_seconds",
                    "From a user's open to the agent's answer",
                )
                .buckets(vec![
                    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ]),
            )?,
            limited: IntCounterVec::new(
                Opts::new(
                    "throwline_relay_limited_total",
                    "How often a limit held somebody up, by the limit",
                ),
                &["limit"],
            )?,
            buffers: Budget::new(limits.buffered_bytes),
        };
        let most = IntGaugeVec::new(
            Opts::new("throwline_relay_limits", "The limits, as they are set"),
            &["limit"],
        )?;
        for (limit, value) in named(limits) {
            most.with_label_values(&[limit]).set(value);
            // Those that are half-open have a counter of their own.
            if !limit.starts_with("half-open") {
                metrics.limit_counter(limit);
            }
        }
        registry.register(Box::new(most))?;
        registry.register(Box::new(metrics.limited.clone()))?;
        registry.register(Box::new(Buffers::new(
            metrics.buffers.clone(),
            metrics.limit_counter("buffers"),
        )?))?;
        registry.register(Box::new(metrics.half_open.clone()))?;
        registry.register(Box::new(metrics.half_open_shed.clone()))?;
        registry.register(Box::new(metrics.accept_errors.clone()))?;
        registry.register(Box::new(metrics.handshakes.clone()))?;
        registry.register(Box::new(metrics.enrolments.clone()))?;
        registry.register(Box::new(metrics.renewals.clone()))?;
        registry.register(Box::new(metrics.double_agents.clone()))?;
        registry.register(Box::new(metrics.carriers.clone()))?;
        registry.register(Box::new(metrics.lines.clone()))?;
        registry.register(Box::new(metrics.ended.clone()))?;
        registry.register(Box::new(LineBytes::new(Arc::clone(&metrics.meter))?))?;
        registry.register(Box::new(metrics.refusals.clone()))?;
        registry.register(Box::new(metrics.forwarded.clone()))?;
        registry.register(Box::new(metrics.peer_failures.clone()))?;
        registry.register(Box::new(metrics.open.clone()))?;
        Ok(metrics)
    }

    /// Counts that a limit of `throwline_relay_limits` was reached.
    pub(crate) fn limited(&self, limit: &'static str) {
        self.limit_counter(limit).inc();
    }

    pub(crate) fn limit_counter(&self, limit: &'static str) -> IntCounter {
        self.limited.with_label_values(&[limit])
    }

    /// What all lines' splice buffers are taken from.
    pub(crate) fn buffers(&self) -> Budget {
        self.buffers.clone()
    }

    pub(crate) fn handshake(&self, outcome: &'static str) {
        self.handshakes.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn enrolment(&self, outcome: &'static str) {
        self.enrolments.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn renewal(&self, outcome: &'static str) {
        self.renewals.with_label_values(&[outcome]).inc();
    }

    pub(crate) fn refusal(&self, code: &'static str) {
        self.refusals.with_label_values(&[code]).inc();
    }

    pub(crate) fn carrier_ended(&self, reason: EndReason) {
        let labels = ["carrier", reason.label()];
        self.ended.with_label_values(&labels).inc();
    }

    pub(crate) fn line_ended(&self, reason: EndReason) {
        let labels = ["line", reason.label()];
        self.ended.with_label_values(&labels).inc();
    }

    pub(crate) fn opened(&self, after: Duration) {
        self.open.observe(after.as_secs_f64());
    }

    /// What all lines count their bytes on; near is the user's side.
    pub(crate) fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// Counts one carrier for as long as the guard lives.
    pub(crate) fn carrier(&self, role: &'static str) -> GaugeGuard {
        GaugeGuard::new(&self.carriers.with_label_values(&[role]))
    }

    /// Counts one line for as long as the guard lives.
    pub(crate) fn line(&self) -> GaugeGuard {
        GaugeGuard::new(&self.lines)
    }
}

/// Shows the meter of the splices, which must not wait for a metrics library at each copy.
struct LineBytes {
    meter: Arc<Meter>,
    to_cluster: IntCounter,
    to_user: IntCounter,
    both: IntCounterVec,
}

impl LineBytes {
    fn new(meter: Arc<Meter>) -> Result<Self, prometheus::Error> {
        let both = IntCounterVec::new(
            Opts::new(
                "throwline_relay_line_bytes_total",
                "Bytes copied between users and agents, sealed as they are",
            ),
            &["direction"],
        )?;
        Ok(Self {
            meter,
            to_cluster: both.with_label_values(&["to-cluster"]),
            to_user: both.with_label_values(&["to-user"]),
            both,
        })
    }
}

impl Collector for LineBytes {
    fn desc(&self) -> Vec<&Desc> {
        self.both.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        catch_up(&self.to_cluster, &self.meter.a_to_b);
        catch_up(&self.to_user, &self.meter.b_to_a);
        self.both.collect()
    }
}

/// The limits by their names in [`Metrics::limited`].
fn named(limits: &Limits) -> [(&'static str, i64); 12] {
    let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
    let bytes = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    [
        ("carriers", count(limits.carriers)),
        ("carriers-per-identity", count(limits.carriers_per_identity)),
        ("half-open", count(limits.half_open)),
        ("half-open-per-address", count(limits.half_open_per_address)),
        ("handshakes", i64::from(limits.handshakes_per_second)),
        ("lines", count(limits.lines)),
        ("lines-per-user", count(limits.lines_per_user)),
        (
            "lines-per-user-and-carrier",
            count(limits.lines_per_user_and_carrier),
        ),
        ("lines-per-cluster", count(limits.lines_per_cluster)),
        ("buffers", bytes(limits.buffered_bytes)),
        ("buffers-per-user", bytes(limits.buffered_bytes_per_user)),
        (
            "buffers-per-cluster",
            bytes(limits.buffered_bytes_per_cluster),
        ),
    ]
}

/// Shows the budget of the splices' buffers.
struct Buffers {
    budget: Budget,
    used: IntGauge,
    denied: IntCounter,
}

impl Buffers {
    fn new(budget: Budget, denied: IntCounter) -> Result<Self, prometheus::Error> {
        let used = IntGauge::new(
            "throwline_relay_buffered_bytes",
            "Bytes of buffers that lines hold now",
        )?;
        Ok(Self {
            budget,
            used,
            denied,
        })
    }
}

impl Collector for Buffers {
    fn desc(&self) -> Vec<&Desc> {
        self.used.desc()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.used
            .set(i64::try_from(self.budget.used()).unwrap_or(i64::MAX));
        let denied = self.budget.denied();
        self.denied.inc_by(denied.saturating_sub(self.denied.get()));
        self.used.collect()
    }
}

fn catch_up(counter: &IntCounter, counted: &AtomicU64) {
    let counted = counted.load(Ordering::Relaxed);
    counter.inc_by(counted.saturating_sub(counter.get()));
}

pub(crate) fn code_label(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Unspecified => "unspecified",
        RefusalCode::UnknownCluster => "unknown-cluster",
        RefusalCode::NeverConnected => "never-connected",
        RefusalCode::Offline => "offline",
        RefusalCode::NotAllowed => "not-allowed",
        RefusalCode::Limit => "limit",
        RefusalCode::Draining => "draining",
        RefusalCode::Version => "version",
        RefusalCode::BadRequest => "bad-request",
        RefusalCode::Internal => "internal",
        RefusalCode::Timeout => "timeout",
        RefusalCode::Unauthenticated => "unauthenticated",
        RefusalCode::Unsupported => "unsupported",
        RefusalCode::InstanceGone => "instance-gone",
        RefusalCode::Revoked => "revoked",
    }
}
