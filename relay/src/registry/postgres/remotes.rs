//! The tunnels of the other relays, as last read. No I/O; the time is passed in.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use throwline_tunnel::proto::traffic::TrafficClass;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::notice::{Epoch, Row};
use crate::registry::route::{PeerRelay, Remote};

/// More remote tunnels than any set of relays has; a writer to the database cannot make this
/// relay keep more. Worst case: about 300 bytes each.
const MOST_TUNNELS: usize = 1_000_000;

pub(super) struct Remotes {
    own: String,
    /// How old a heartbeat may be.
    life: Duration,
    relays: HashMap<String, Relay>,
    clusters: HashMap<String, Slot>,
    count: usize,
    /// Since when every round succeeded; `None` while the database is away, when no relay is
    /// judged by an old heartbeat.
    judging_since: Option<Instant>,
}

struct Relay {
    epoch: Epoch,
    address: String,
    draining: bool,
    stale_at: Instant,
    tunnels: HashMap<i64, String>,
}

#[derive(Default)]
struct Slot {
    routes: Vec<(String, Row)>,
    gone_at: Option<Instant>,
    arrived: Arc<Notify>,
}

/// A relay's row, with the age of its heartbeat by the database's clock.
#[derive(Debug, Clone)]
pub(super) struct Beat {
    pub(super) instance: String,
    pub(super) epoch: Epoch,
    pub(super) address: String,
    pub(super) draining: bool,
    pub(super) age: Duration,
}

/// The actions that follow from a round of heartbeats.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    /// Relays whose tunnels must be read.
    pub(super) load: Vec<(String, Epoch)>,
    /// Relays that are dead and whose rows should go.
    pub(super) reap: Vec<(String, Epoch)>,
}

impl Remotes {
    pub(super) fn new(own: &str, life: Duration) -> Self {
        Self {
            own: own.to_owned(),
            life,
            relays: HashMap::new(),
            clusters: HashMap::new(),
            count: 0,
            judging_since: None,
        }
    }

    /// The database is away: the last data stays in use.
    pub(super) fn away(&mut self) {
        self.judging_since = None;
    }

    /// Takes in a round of heartbeats. A relay that was kept through an outage has one
    /// heartbeat's life to show itself.
    pub(super) fn beats(&mut self, beats: Vec<Beat>, now: Instant) -> Round {
        // Restarts after each outage: while the database was away, no relay could write a
        // heartbeat.
        let since = *self.judging_since.get_or_insert(now);
        let named: BTreeSet<&str> = beats.iter().map(|beat| beat.instance.as_str()).collect();
        let vanished: Vec<String> = self
            .relays
            .keys()
            .filter(|name| !named.contains(name.as_str()))
            .cloned()
            .collect();
        for name in vanished {
            self.remove(&name, now);
        }
        let mut round = Round::default();
        for beat in beats {
            if beat.instance == self.own {
                continue;
            }
            let known = self
                .relays
                .get(&beat.instance)
                .is_some_and(|relay| relay.epoch == beat.epoch);
            let mut stale_at = now + self.life.saturating_sub(beat.age);
            if known {
                // A relay that was alive before the outage has one life to reconnect.
                stale_at = stale_at.max(since + self.life);
            }
            if stale_at <= now {
                self.remove(&beat.instance, now);
                if now >= since + self.life {
                    // Reaped only after a whole life of observation, since it too may be about to
                    // reconnect.
                    round.reap.push((beat.instance, beat.epoch));
                }
                continue;
            }
            if !known {
                // Its epoch is new: the carriers of the former process of this name are gone.
                self.remove(&beat.instance, now);
                round.load.push((beat.instance.clone(), beat.epoch));
            }
            let relay = self.relays.entry(beat.instance).or_insert_with(|| Relay {
                epoch: beat.epoch,
                address: String::new(),
                draining: false,
                stale_at,
                tunnels: HashMap::new(),
            });
            relay.address = beat.address;
            relay.draining = beat.draining;
            relay.stale_at = stale_at;
        }
        round
    }

    /// All tunnels of one relay, instead of those known.
    pub(super) fn replace(&mut self, relay: &str, epoch: Epoch, rows: Vec<Row>, now: Instant) {
        let Some(held) = self.process(relay, epoch) else {
            return;
        };
        let kept: BTreeSet<i64> = rows.iter().map(|row| row.carrier).collect();
        let gone: Vec<i64> = held
            .tunnels
            .keys()
            .filter(|carrier| !kept.contains(carrier))
            .copied()
            .collect();
        for carrier in gone {
            self.down(relay, epoch, carrier, now);
        }
        for row in rows {
            self.up(relay, epoch, row);
        }
    }

    /// The ways to a cluster: not draining first, then the newest.
    pub(super) fn find(&mut self, cluster: &str, now: Instant) -> Vec<Remote> {
        self.sweep(now);
        let Some(slot) = self.clusters.get(cluster) else {
            return Vec::new();
        };
        let mut found: Vec<(bool, Remote)> = slot
            .routes
            .iter()
            .filter_map(|(name, row)| {
                let relay = self.relays.get(name)?;
                let remote = Remote {
                    relay: PeerRelay {
                        instance: name.clone(),
                        address: relay.address.clone(),
                    },
                    agent_instance: row.agent_instance.clone(),
                    since: UNIX_EPOCH + Duration::from_millis(row.since.unsigned_abs()),
                    certificate: row.certificate.clone(),
                    class: TrafficClass::of(row.bulk),
                };
                Some((relay.draining, remote))
            })
            .collect();
        found.sort_by_key(|(draining, remote)| (*draining, std::cmp::Reverse(remote.since)));
        found.into_iter().map(|(_, remote)| remote).collect()
    }

    /// When the cluster's last remote tunnel went.
    pub(super) fn gone_at(&self, cluster: &str) -> Option<Instant> {
        self.clusters.get(cluster)?.gone_at
    }

    /// Notified whenever a remote tunnel of the cluster arrives.
    pub(super) fn arrivals(&mut self, cluster: &str) -> Arc<Notify> {
        Arc::clone(&self.clusters.entry(cluster.to_owned()).or_default().arrived)
    }

    pub(super) fn peers(&mut self, now: Instant) -> Vec<PeerRelay> {
        self.sweep(now);
        let peer = |(instance, relay): (&String, &Relay)| PeerRelay {
            instance: instance.clone(),
            address: relay.address.clone(),
        };
        self.relays.iter().map(peer).collect()
    }

    /// How many relays are known that do not drain.
    pub(super) fn taking_lines(&self) -> usize {
        self.relays.values().filter(|relay| !relay.draining).count()
    }

    /// Relays and tunnels known.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.relays.len(), self.count)
    }

    /// Relays that have been silent for too long are dead, between rounds too.
    fn sweep(&mut self, now: Instant) {
        if self.judging_since.is_none() {
            return;
        }
        let stale = |(_, relay): &(&String, &Relay)| relay.stale_at <= now;
        let dead: Vec<String> = self
            .relays
            .iter()
            .filter(stale)
            .map(|(name, _)| name.clone())
            .collect();
        for name in dead {
            self.remove(&name, now);
        }
    }

    fn remove(&mut self, relay: &str, now: Instant) {
        let Some(held) = self.relays.remove(relay) else {
            return;
        };
        self.count -= held.tunnels.len();
        for (carrier, cluster) in held.tunnels {
            self.drop_route(&cluster, relay, carrier, now);
        }
    }

    /// A tunnel that the table has. Of a process that is not known here nothing is taken: the next
    /// round shows whether there is one.
    pub(super) fn up(&mut self, relay: &str, epoch: Epoch, row: Row) {
        let is_full = self.count >= MOST_TUNNELS;
        let Some(held) = self.process(relay, epoch) else {
            return;
        };
        if is_full || held.tunnels.contains_key(&row.carrier) {
            return;
        }
        held.tunnels.insert(row.carrier, row.cluster.clone());
        self.count += 1;
        let slot = self.clusters.entry(row.cluster.clone()).or_default();
        slot.gone_at = None;
        slot.routes.push((relay.to_owned(), row));
        slot.arrived.notify_waiters();
    }

    /// A tunnel that the table has no more.
    pub(super) fn down(&mut self, relay: &str, epoch: Epoch, carrier: i64, now: Instant) {
        let held = self.process(relay, epoch);
        let Some(cluster) = held.and_then(|held| held.tunnels.remove(&carrier)) else {
            return;
        };
        self.count -= 1;
        self.drop_route(&cluster, relay, carrier, now);
    }

    fn process(&mut self, relay: &str, epoch: Epoch) -> Option<&mut Relay> {
        let held = self.relays.get_mut(relay)?;
        (held.epoch == epoch).then_some(held)
    }

    fn drop_route(&mut self, cluster: &str, relay: &str, carrier: i64, now: Instant) {
        let Some(slot) = self.clusters.get_mut(cluster) else {
            return;
        };
        slot.routes
            .retain(|(name, row)| name != relay || row.carrier != carrier);
        if slot.routes.is_empty() {
            slot.gone_at = Some(now);
        }
    }
}

/// Milliseconds since 1970.
pub(super) fn millis(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| {
        i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
    })
}

#[cfg(test)]
mod tests;
