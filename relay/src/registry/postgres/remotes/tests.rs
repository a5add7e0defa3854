use super::*;

const LIFE: Duration = Duration::from_secs(15);
const SECOND: Duration = Duration::from_secs(1);

fn beat(instance: &str, epoch: Epoch, age: u64) -> Beat {
    Beat {
        instance: instance.into(),
        epoch,
        address: format!("{instance}:8444"),
        draining: false,
        age: SECOND * u32::try_from(age).unwrap(),
    }
}

fn row(carrier: i64, cluster: &str) -> Row {
    Row {
        carrier,
        cluster: cluster.into(),
        agent_instance: format!("agent-{carrier}"),
        since: carrier,
        certificate: String::new(),
        bulk: false,
    }
}

fn names(remotes: &mut Remotes, cluster: &str, now: Instant) -> Vec<String> {
    let found = remotes.find(cluster, now);
    found
        .into_iter()
        .map(|remote| remote.agent_instance)
        .collect()
}

/// Relay `b` with one tunnel to `prod`.
fn with_b(now: Instant) -> Remotes {
    let mut remotes = Remotes::new("a", LIFE);
    let round = remotes.beats(vec![beat("a", 1, 0), beat("b", 1, 0)], now);
    assert_eq!(round.load, [("b".to_owned(), 1)]);
    remotes.replace("b", 1, vec![row(1, "prod")], now);
    remotes
}

#[test]
fn a_relay_that_falls_silent_vanishes_with_its_tunnels() {
    let start = Instant::now();
    let mut remotes = with_b(start);
    let round = remotes.beats(vec![beat("b", 1, 10)], start + SECOND * 10);
    assert_eq!(round, Round::default());
    assert_eq!(
        names(&mut remotes, "prod", start + SECOND * 14),
        ["agent-1"]
    );
    // No round is needed to see that its time is over.
    let end = start + LIFE;
    assert!(names(&mut remotes, "prod", end).is_empty());
    assert_eq!(remotes.gone_at("prod"), Some(end));
    assert!(remotes.peers(end).is_empty());
    let round = remotes.beats(vec![beat("b", 1, 16)], end + SECOND);
    assert_eq!(round.reap, [("b".to_owned(), 1)]);
}

#[test]
fn an_outage_ages_nobody() {
    let start = Instant::now();
    let mut remotes = with_b(start);
    remotes.away();
    let later = start + SECOND * 300;
    assert_eq!(names(&mut remotes, "prod", later), ["agent-1"]);
    // Back: every heartbeat is old, and each relay has a life's time to show itself.
    let round = remotes.beats(vec![beat("b", 1, 300)], later);
    assert_eq!(round, Round::default());
    assert_eq!(
        names(&mut remotes, "prod", later + SECOND * 14),
        ["agent-1"]
    );
    assert!(names(&mut remotes, "prod", later + LIFE).is_empty());
}

#[test]
fn a_dead_relays_old_row_is_no_way_for_a_new_one() {
    let start = Instant::now();
    let mut remotes = Remotes::new("a", LIFE);
    let round = remotes.beats(vec![beat("b", 1, 16)], start);
    // But it is not removed before it had the time to come back.
    assert_eq!(round, Round::default());
    assert!(remotes.peers(start).is_empty());
}

#[test]
fn tunnels_come_and_go_once() {
    let now = Instant::now();
    let mut remotes = with_b(now);
    remotes.down("b", 1, 2, now);
    assert_eq!(names(&mut remotes, "prod", now), ["agent-1"]);
    remotes.up("b", 1, row(3, "prod"));
    remotes.up("b", 1, row(3, "prod"));
    assert_eq!(names(&mut remotes, "prod", now), ["agent-3", "agent-1"]);
    remotes.down("b", 1, 1, now);
    remotes.down("b", 1, 3, now);
    assert!(names(&mut remotes, "prod", now).is_empty());
    assert_eq!(remotes.gone_at("prod"), Some(now));
    assert_eq!(remotes.counts(), (1, 0));
}

#[test]
fn a_process_cannot_evict_its_successors_tunnels() {
    let now = Instant::now();
    let mut remotes = with_b(now);
    let round = remotes.beats(vec![beat("b", 2, 0)], now);
    assert_eq!(round.load, [("b".to_owned(), 2)]);
    assert!(names(&mut remotes, "prod", now).is_empty());
    remotes.replace("b", 2, vec![row(1, "prod")], now);
    remotes.down("b", 1, 1, now);
    remotes.up("b", 1, row(7, "prod"));
    remotes.replace("b", 1, Vec::new(), now);
    assert_eq!(names(&mut remotes, "prod", now), ["agent-1"]);
}

#[test]
fn loading_anew_replaces() {
    let now = Instant::now();
    let mut remotes = with_b(now);
    remotes.replace("b", 1, vec![row(2, "prod"), row(3, "test")], now);
    assert_eq!(names(&mut remotes, "prod", now), ["agent-2"]);
    assert_eq!(names(&mut remotes, "test", now), ["agent-3"]);
    assert_eq!(remotes.counts(), (1, 2));
}

#[test]
fn who_drains_comes_last_and_we_are_not_our_own_peer() {
    let now = Instant::now();
    let mut remotes = with_b(now);
    let all = || vec![beat("a", 1, 0), beat("b", 1, 0), beat("c", 1, 0)];
    remotes.beats(all(), now);
    remotes.up("c", 1, row(0, "prod"));
    assert_eq!(names(&mut remotes, "prod", now), ["agent-1", "agent-0"]);
    let mut draining = all();
    draining[1].draining = true;
    remotes.beats(draining, now);
    assert_eq!(names(&mut remotes, "prod", now), ["agent-0", "agent-1"]);
    remotes.up("a", 1, row(9, "prod"));
    assert_eq!(names(&mut remotes, "prod", now).len(), 2);
}

#[tokio::test]
async fn an_arrival_is_told() {
    let now = Instant::now();
    let mut remotes = with_b(now);
    let arrivals = remotes.arrivals("test");
    let arrival = arrivals.notified();
    tokio::pin!(arrival);
    arrival.as_mut().enable();
    remotes.up("b", 1, row(2, "test"));
    arrival.await;
}
