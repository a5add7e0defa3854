//! Which failures of a load a fault explains, and which none does.
//!
//! | fault | expected failures | until |
//! |---|---|---|
//! | kill -9 of a relay | requests that went over it, alone or as one of two relays | 3 s after the kill |
//! | kill -9 of an agent | requests to its cluster | 3 s after it is at two relays again |
//! | kill -9 of a local proxy | its user's requests | 3 s after it serves again |
//! | a link that is cut | requests that go over it | 10 s after it is mended, for a proxy; 3 s after it is at two relays again, for an agent |
//! | a drain, a restart, a rolling restart | none | |
//! | PostgreSQL away | none | |
//! | slow readers | none, but their own requests are not counted | |
//!
//! A request counts as failed at the moment at which its failure is known: one that hangs through
//! the expected time and fails after it is not expected. An agent that is at one relay only does not
//! survive the next fault of that relay, so its own fault lasts until it is at two. Which requests go
//! over a relay is read from the relays' own logs at the moment of the kill; failures over healthy
//! relays are never expected.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::load::{Failed, Way};

/// Whose failures are expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    Ways(BTreeSet<Way>),
    User(usize),
    Cluster(usize),
}

impl Scope {
    fn holds(&self, way: Way) -> bool {
        match self {
            Self::Ways(ways) => ways.contains(&way),
            Self::User(user) => way.user == *user,
            Self::Cluster(cluster) => way.cluster == *cluster,
        }
    }
}

/// The failures that one fault explains.
#[derive(Debug)]
struct ExpectedFailure {
    fault: String,
    scope: Scope,
    from: Instant,
    /// `None` while the fault lasts.
    until: Option<Instant>,
}

/// The expected failures of a run, by fault.
#[derive(Debug, Default)]
pub struct ExpectedFailures(Mutex<Vec<ExpectedFailure>>);

/// Failures by the fault that explains them, and those that no fault does.
#[derive(Debug, Default)]
pub struct Classified {
    pub expected: BTreeMap<String, usize>,
    pub unexpected: Vec<Failed>,
}

impl ExpectedFailures {
    /// From now on, until [`Self::end`] is given what this returns.
    pub fn begin(&self, fault: &str, scope: Scope) -> usize {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(ExpectedFailure {
            fault: fault.to_owned(),
            scope,
            from: Instant::now(),
            until: None,
        });
        all.len() - 1
    }

    /// The fault is over; what it did may show this much longer.
    pub fn end(&self, number: usize, after: Duration) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = all.get_mut(number) {
            entry.until = Some(Instant::now() + after);
        }
    }

    pub fn classify(&self, failures: Vec<Failed>) -> Classified {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut classified = Classified::default();
        for failure in failures {
            let entry = all.iter().find(|entry| entry.covers(&failure));
            match entry {
                Some(entry) => *classified.expected.entry(entry.fault.clone()).or_default() += 1,
                None => classified.unexpected.push(failure),
            }
        }
        classified
    }
}

impl ExpectedFailure {
    fn covers(&self, failure: &Failed) -> bool {
        self.scope.holds(failure.way)
            && failure.at >= self.from
            && self.until.is_none_or(|until| failure.at <= until)
    }
}

/// The lines and carriers of one relay, as its log tells them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// By carrier: who is at its other end, as `user/NAME`, `relay/NAME` or `cluster/NAME`.
    carriers: BTreeMap<String, String>,
    /// By carrier and cluster, how many lines are open.
    lines: BTreeMap<(String, String), usize>,
}

impl Carried {
    /// Reads a relay's log, in which its present process began with `the relay is up`.
    pub fn read(log: &str) -> Self {
        let mut this = Self::default();
        for line in log.lines() {
            if line.contains(": the relay is up ") {
                this = Self::default();
            }
            let (Some(id), Some(peer)) = (field(line, "id"), field(line, "peer")) else {
                continue;
            };
            let cluster = || field(line, "cluster").unwrap_or_default().to_owned();
            if line.contains(": a carrier is up ") {
                let peer = peer.rsplitn(3, '/').take(2).collect::<Vec<_>>();
                let peer = peer.into_iter().rev().collect::<Vec<_>>().join("/");
                this.carriers.insert(id.to_owned(), peer);
            } else if line.contains(": a carrier is down ") {
                this.carriers.remove(id);
                this.lines.retain(|(carrier, _), _| carrier != id);
            } else if line.contains(": a line is open ") {
                *this.lines.entry((id.to_owned(), cluster())).or_default() += 1;
            } else if line.contains(": a line has ended ")
                && let Some(count) = this.lines.get_mut(&(id.to_owned(), cluster()))
            {
                *count = count.saturating_sub(1);
            }
        }
        this
    }

    /// The users with a carrier here.
    pub fn users(&self) -> BTreeSet<&str> {
        let names = self.carriers.values();
        names
            .filter_map(|peer| peer.strip_prefix("user/"))
            .collect()
    }

    /// The clusters whose lines that relay leads here.
    pub fn clusters_for(&self, relay: &str) -> BTreeSet<&str> {
        let open = self.lines.iter().filter(|(_, count)| **count > 0);
        open.filter(|((carrier, _), _)| {
            let peer = self.carriers.get(carrier);
            peer.and_then(|peer| peer.strip_prefix("relay/")) == Some(relay)
        })
        .map(|((_, cluster), _)| cluster.as_str())
        .collect()
    }
}

/// The last field of that name: a span's stand behind an event's own.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = line.rsplit_once(&format!(" {name}="))?;
    rest.split(' ').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAY: Way = Way {
        user: 1,
        cluster: 2,
    };

    fn failed(way: Way, at: Instant) -> Failed {
        Failed {
            way,
            began: at,
            at,
            why: "lost".into(),
        }
    }

    #[test]
    fn an_expected_failure_has_a_scope_and_an_end() {
        let expected = ExpectedFailures::default();
        let early = Instant::now();
        let other = Way { user: 3, ..WAY };
        let number = expected.begin("kill", Scope::Ways(BTreeSet::from([WAY])));
        let now = Instant::now();
        let counts = |failure: Failed| expected.classify(vec![failure]).unexpected.len();
        assert_eq!(counts(failed(WAY, now)), 0);
        assert_eq!(counts(failed(other, now)), 1);
        if early < now {
            assert_eq!(counts(failed(WAY, early - Duration::from_secs(1))), 1);
        }
        expected.end(number, Duration::from_secs(3));
        assert_eq!(counts(failed(WAY, now + Duration::from_secs(2))), 0);
        assert_eq!(counts(failed(WAY, now + Duration::from_secs(4))), 1);
    }

    #[test]
    fn a_relays_log_tells_what_it_carries() {
        let user = "id=1 peer=spiffe://d.example/user/user-3 client=127.0.0.1:5";
        let peer = "id=2 peer=spiffe://d.example/relay/relay-0 client=127.0.0.1:6";
        let log = [
            format!("T DEBUG relay: a line is open cluster=old {user}"),
            "T  INFO relay: the relay is up url=https://localhost instance=relay-1".to_owned(),
            format!("T  INFO relay: a carrier is up software=x instance=y {user}"),
            format!("T  INFO relay: a carrier is up software=x instance=y {peer}"),
            format!("T DEBUG relay: a line is open cluster=a {user}"),
            format!("T DEBUG relay: a line is open cluster=b {peer}"),
            format!("T DEBUG relay: a line is open cluster=c {peer}"),
            format!("T DEBUG relay: a line has ended cluster=c outcome=Ok(1) {peer}"),
        ]
        .join("\n");
        let carried = Carried::read(&log);
        assert_eq!(carried.users(), BTreeSet::from(["user-3"]));
        assert_eq!(carried.clusters_for("relay-0"), BTreeSet::from(["b"]));
        assert!(carried.clusters_for("relay-2").is_empty());
        let ended = format!("{log}\nT  INFO relay: a carrier is down reason=x {peer}");
        assert!(Carried::read(&ended).clusters_for("relay-0").is_empty());
    }
}
