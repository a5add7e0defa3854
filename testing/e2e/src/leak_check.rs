//! Leaks after a load and faults: tasks, streams, descriptors, rows and carriers beyond a baseline
//! that was taken in the same fleet before.
//!
//! Two counts make a whole one. While the local proxies still run, each of them must hold what it
//! held before; when they have stopped, relays and agents must hold nothing of any user. What is
//! explained is not counted twice: a descriptor or a task of a carrier, of a pooled connection to
//! the API server or to the database is that carrier or connection.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::eventually;
use crate::fleet::Fleet;
use crate::metrics::Metrics;
use crate::postgres::OWNER;

/// Counts by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ResourceCounts(BTreeMap<String, f64>);

/// Tasks of a carrier between relays: its driver at each end, one that serves it where it was
/// accepted, and one that keeps it where it was dialled.
const TASKS_OF_A_PEER: f64 = 4.0;

impl ResourceCounts {
    /// Each local proxy, while no request is made.
    pub async fn of_proxies(fleet: &Fleet) -> Result<Self> {
        let mut this = Self::default();
        for (number, proxy) in fleet.proxies.iter().enumerate() {
            let proxy = proxy.lock().await;
            // Before the scrape, which is a connection itself.
            let descriptors = proxy.process.descriptors()? as f64;
            let now = proxy.metrics().await?;
            let mut put =
                |what: &str, count: f64| this.put(&format!("proxy {number}"), what, count);
            for (what, metric) in [
                ("connections", "connections"),
                ("requests", "requests_in_flight"),
                ("copied connections", "upgraded"),
                ("API sessions", "api_sessions"),
                ("upgrade sessions", "upgrade_sessions"),
                ("tasks", "tasks"),
            ] {
                put(
                    what,
                    known(&now, &format!("throwline_local_proxy_{metric}"))?,
                );
            }
            put("tasks of the runtime", known(&now, "throwline_tasks")?);
            put("descriptors", descriptors);
        }
        Ok(this)
    }

    /// Relays, agents and the database, while no local proxy runs.
    pub async fn of_the_rest(fleet: &Fleet) -> Result<Self> {
        let mut this = Self::default();
        this.agents(fleet).await?;
        this.relays(fleet).await?;
        let database = fleet.database.lock().await;
        for table in ["tunnels", "relays"] {
            let count = format!("SELECT count(*) FROM {table}");
            let rows: f64 = database.sql(OWNER, &count).await?.parse()?;
            this.put("database", &format!("rows of {table}"), rows);
        }
        Ok(this)
    }

    async fn agents(&mut self, fleet: &Fleet) -> Result<()> {
        for (number, agent) in fleet.agents.iter().enumerate() {
            let agent = agent.lock().await;
            let descriptors = agent.process.descriptors()? as f64;
            let now = Metrics::of(agent.admin).await?;
            let mut put =
                |what: &str, count: f64| self.put(&format!("agent {number}"), what, count);
            put("carriers", known(&now, "throwline_agent_carriers")?);
            put("sessions", known(&now, "throwline_agent_sessions")?);
            put("upgrades", known(&now, "throwline_agent_upgrades")?);
            let pooled = known(&now, "throwline_agent_upstream_connections")?;
            put("descriptors", descriptors - pooled);
            put("tasks", known(&now, "throwline_tasks")? - pooled);
        }
        Ok(())
    }

    async fn relays(&mut self, fleet: &Fleet) -> Result<()> {
        let (mut descriptors, mut tasks, mut peers) = (0.0, 0.0, 0.0);
        for relay in &fleet.relays {
            let relay = relay.lock().await;
            let open = relay.process.descriptors()? as f64;
            let now = relay.metrics().await?;
            let carriers =
                |role: &str| now.sum("throwline_relay_carriers", &[&format!("role=\"{role}\"")]);
            self.put("relays", "lines", known(&now, "throwline_relay_lines")?);
            let half_open = known(&now, "throwline_relay_half_open")?;
            self.put("relays", "half-open connections", half_open);
            let buffered = known(&now, "throwline_relay_buffered_bytes")?;
            self.put("relays", "buffered bytes", buffered);
            self.put(
                "relays",
                "owed writes",
                known(&now, "throwline_relay_database_owed_writes")?,
            );
            self.put("relays", "carriers of agents", carriers("agent"));
            self.put("relays", "carriers of proxies", carriers("local-proxy"));
            peers += carriers("relay");
            let others = carriers("agent") + carriers("local-proxy") + half_open;
            descriptors += open - others;
            tasks += known(&now, "throwline_tasks")?;
        }
        let count = fleet.relays.len() as f64;
        let pairs = count * (count - 1.0);
        // One each way between each two, kept for some minutes; any more is of a dead relay.
        self.put("relays", "surplus peer carriers", (peers - pairs).max(0.0));
        let sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'throwline' AND pid <> pg_backend_pid()";
        let database = fleet.database.lock().await;
        let sessions: f64 = database.sql(OWNER, sessions).await?.parse()?;
        self.put(
            "relays",
            "descriptors",
            descriptors - 2.0 * peers - sessions,
        );
        self.put("relays", "tasks", tasks - TASKS_OF_A_PEER * peers);
        Ok(())
    }

    fn put(&mut self, whose: &str, what: &str, count: f64) {
        *self.0.entry(format!("{whose}: {what}")).or_default() += count;
    }

    /// What there is more of than in `before`.
    pub fn beyond(&self, before: &Self) -> BTreeMap<String, f64> {
        let more = self.0.iter().map(|(name, count)| {
            let was = before.0.get(name).copied().unwrap_or_default();
            (name.clone(), count - was)
        });
        more.filter(|(_, more)| *more > 0.0).collect()
    }
}

/// The metric, which must be there: nothing counts as nothing because a name has changed.
fn known(metrics: &Metrics, name: &str) -> Result<f64> {
    ensure!(metrics.has(name), "no such metric: {name}");
    Ok(metrics.sum(name, &[]))
}

/// Waits until a count stays what it is for a while.
pub async fn settled(
    limit: Duration,
    count: impl AsyncFn() -> Result<ResourceCounts>,
) -> Result<ResourceCounts> {
    eventually(limit, "it is quiet", || async {
        let first = count().await?;
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let next = count().await?;
            ensure!(first == next, "not quiet: {:?}", next.beyond(&first));
        }
        Ok(first)
    })
    .await
}

/// Waits until there is no more than before, for at most `limit`; returns what is left then.
pub async fn leaks(
    limit: Duration,
    before: &ResourceCounts,
    count: impl AsyncFn() -> Result<ResourceCounts>,
) -> Result<BTreeMap<String, f64>> {
    let end = tokio::time::Instant::now() + limit;
    loop {
        let left = match count().await {
            Ok(now) => now.beyond(before),
            Err(error) if tokio::time::Instant::now() >= end => return Err(error),
            Err(_) => BTreeMap::from([("not counted yet".to_owned(), 1.0)]),
        };
        if left.is_empty() || tokio::time::Instant::now() >= end {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_more_than_before_is_beyond() {
        let counts_of = |counts: &[(&str, f64)]| {
            let counts = counts
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count));
            ResourceCounts(counts.collect())
        };
        let before = counts_of(&[("a", 2.0), ("b", 2.0)]);
        let after = counts_of(&[("a", 1.0), ("b", 4.0), ("c", 1.0)]);
        let beyond = after.beyond(&before);
        let expected = [("b".to_owned(), 2.0), ("c".to_owned(), 1.0)];
        assert_eq!(beyond, BTreeMap::from(expected));
    }
}
