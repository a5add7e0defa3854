//! Numbers of the carriers of one component.

use prometheus::{IntCounterVec, IntGauge, Opts, Registry};

/// Cheap to clone: every field is a handle.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Carriers open now, with those that were replaced and still have streams.
    pub carriers: IntGauge,
    /// Distinct relays with a carrier.
    pub relays: IntGauge,
    /// Failed dials, by kind.
    pub connect_failures: IntCounterVec,
}

impl Metrics {
    /// Metrics whose names begin with `throwline_` and the component's name.
    ///
    /// # Errors
    /// The component's name cannot be part of a metric's name.
    pub fn new(component: &str) -> Result<Self, prometheus::Error> {
        let name = |metric: &str| format!("throwline_{component}_{metric}");
        Ok(Self {
            carriers: IntGauge::new(name("carriers"), "Carriers to relays open now.")?,
            relays: IntGauge::new(
                name("relays"),
                format!("Relays that this {component} is connected to now."),
            )?,
            connect_failures: IntCounterVec::new(
                Opts::new(
                    name("connect_failures_total"),
                    "Failed attempts to reach the relay, by kind.",
                ),
                &["kind"],
            )?,
        })
    }

    /// Registers all of them.
    ///
    /// # Errors
    /// The registry has metrics of these names already.
    pub fn register(&self, registry: &Registry) -> Result<(), prometheus::Error> {
        registry.register(Box::new(self.carriers.clone()))?;
        registry.register(Box::new(self.relays.clone()))?;
        registry.register(Box::new(self.connect_failures.clone()))
    }
}
