//! Named conditions, all of which must hold before a balancer should send traffic.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The conditions of one process. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Conditions>>);

#[derive(Debug, Default)]
struct Conditions {
    next: u64,
    /// Each condition that was declared and not dropped, with the reason why it does not hold.
    declared: BTreeMap<u64, (&'static str, Option<String>)>,
}

/// One condition; dropping it withdraws the condition.
#[derive(Debug)]
pub struct ReadinessGuard {
    readiness: Readiness,
    key: u64,
}

impl Readiness {
    /// No part is registered, so the process is ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Declares a condition that does not hold yet.
    pub fn condition(&self, name: &'static str) -> ReadinessGuard {
        let mut conditions = self.lock();
        let key = conditions.next;
        conditions.next += 1;
        conditions
            .declared
            .insert(key, (name, Some("not yet".to_owned())));
        drop(conditions);
        ReadinessGuard {
            readiness: self.clone(),
            key,
        }
    }

    /// Whether all registered parts are ready.
    pub fn is_ready(&self) -> bool {
        self.lock().declared.values().all(|(_, why)| why.is_none())
    }

    /// Why the process is not ready: `name: reason`, one for each condition that does not hold.
    pub fn reasons(&self) -> Vec<String> {
        self.lock()
            .declared
            .values()
            .filter_map(|(name, why)| Some(format!("{name}: {}", why.as_deref()?)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Conditions> {
        // Every critical section leaves the map whole, so a panic elsewhere does not spoil it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadinessGuard {
    /// This part is ready.
    pub fn ready(&self) {
        self.set(None);
    }

    /// This part is not ready; `why` is shown by `/readyz`.
    pub fn not_ready(&self, why: impl Into<String>) {
        self.set(Some(why.into()));
    }

    fn set(&self, why: Option<String>) {
        if let Some(condition) = self.readiness.lock().declared.get_mut(&self.key) {
            condition.1 = why;
        }
    }
}

impl Drop for ReadinessGuard {
    fn drop(&mut self) {
        self.readiness.lock().declared.remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_ready_when_every_condition_holds() {
        let readiness = Readiness::new();
        assert!(readiness.is_ready());
        let listening = readiness.condition("listening");
        let database = readiness.condition("database");
        listening.ready();
        assert_eq!(readiness.reasons(), ["database: not yet"]);
        database.ready();
        assert!(readiness.is_ready());
        listening.not_ready("draining");
        assert_eq!(readiness.reasons(), ["listening: draining"]);
        drop(listening);
        assert!(readiness.is_ready());
    }
}
