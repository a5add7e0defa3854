//! The one connection to the database on which this relay listens, writes and counts heartbeats.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Acquire;
use sqlx::postgres::{PgConnection, PgListener};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::notice::{CHANNEL, Heard, Notice, Row};
use super::outbox::Batch;
use super::query::{Lost, bounded, millis, notify};
use super::read::{load_all, look_up, round};
use super::state::SyncState;

/// Full jitter is not needed: relays are few, and each tries once in this time.
const SHORTEST_WAIT: Duration = Duration::from_millis(250);
/// Below a heartbeat's life, so that no relay takes this one for dead after an outage.
const LONGEST_WAIT: Duration = Duration::from_secs(5);
/// How often everything is read again, in case that a notice was lost.
const RELOAD: Duration = Duration::from_secs(600);

/// Notices that are looked up by one query.
const AT_ONCE: usize = 1_000;

/// Keeps the registry in step with the database until `stop`, then takes this relay out of it.
pub(super) async fn run(shared: Arc<SyncState>, stop: CancellationToken) {
    let mut wait = SHORTEST_WAIT;
    loop {
        let served = serve(&shared, &stop).await;
        let was_up = shared.away();
        match served {
            Ok(()) => return,
            Err(error) if was_up => {
                wait = SHORTEST_WAIT;
                warn!(database = %shared.database, %error, "the database is away; its last known tunnels are used for a while");
            }
            Err(error) => debug!(database = %shared.database, %error, "the database is still away"),
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => wait = (wait * 2).min(LONGEST_WAIT),
            () = stop.cancelled() => return,
        }
    }
}

enum Event {
    Heard(Option<String>),
    Tick,
    Owed,
    Stop,
}

async fn serve(shared: &SyncState, stop: &CancellationToken) -> Result<(), Lost> {
    // A pool of one, because a listener takes its connection from one. It connects again each
    // time, and so resolves the name again.
    let pool = shared.database.pool(1);
    let mut listener = tokio::select! {
        listener = PgListener::connect_with(&pool) => listener?,
        () = stop.cancelled() => return Ok(()),
    };
    listener.ignore_pool_close_event(true);
    // What was not heard cannot be made up by listening again, only by reading: see `run`.
    listener.eager_reconnect(false);
    // Listen first, then read: a notice in between is received.
    bounded(listener.listen(CHANNEL)).await?;
    let mut tick = tokio::time::interval(shared.config.heartbeat);
    // After an outage one heartbeat is enough; a burst would only load the database that has just
    // returned.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reload_at = Instant::now();
    loop {
        let event = tokio::select! {
            heard = listener.try_recv() => {
                Event::Heard(heard?.map(|notice| notice.payload().to_owned()))
            }
            _ = tick.tick() => Event::Tick,
            () = shared.work.notified() => Event::Owed,
            () = stop.cancelled() => Event::Stop,
        };
        match event {
            Event::Heard(None) => return Err(Lost::Cut),
            Event::Heard(Some(first)) => {
                let mut heard = Heard::default();
                heard.add(&first, &shared.config.instance);
                // What came together is looked up together.
                for _ in 1..AT_ONCE {
                    let Some(next) = listener.next_buffered() else {
                        break;
                    };
                    heard.add(next.payload(), &shared.config.instance);
                }
                look_up(shared, listener.acquire().await?, heard).await?;
            }
            Event::Tick => {
                // The heartbeat first: reading everything may take longer than a heartbeat's life.
                let connection = listener.acquire().await?;
                if Instant::now() >= reload_at {
                    reload_at = Instant::now() + RELOAD;
                    bounded(beat(shared, &mut *connection)).await?;
                    load_all(shared, connection).await?;
                } else {
                    bounded(beat(shared, &mut *connection)).await?;
                    round(shared, connection).await?;
                }
                // Also what a connection before this one did not get through.
                flush(shared, listener.acquire().await?).await?;
            }
            Event::Owed => flush(shared, listener.acquire().await?).await?,
            Event::Stop => {
                // Otherwise other relays would send lines here until the heartbeat is stale.
                bounded(leave(shared, listener.acquire().await?)).await?;
                return Ok(());
            }
        }
    }
}

/// One heartbeat. Without a row, because this is the first or others took us for dead, this
/// relay registers, and owes all its live tunnels. `false` when another process has the name.
async fn beat(shared: &SyncState, connection: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let beaten = sqlx::query(
        "UPDATE relays SET heartbeat_at = now() WHERE instance = $1 AND started_at = $2",
    )
    .bind(&shared.config.instance)
    .bind(shared.epoch)
    .execute(&mut *connection)
    .await?;
    if beaten.rows_affected() > 0 {
        shared.lock().displaced = false;
        return Ok(true);
    }
    // Without this check, two processes of one name would delete each other's row at every
    // heartbeat.
    if is_displaced(shared, &mut *connection).await? {
        shared.lock().displaced = true;
        error!(
            instance = shared.config.instance,
            "another process that began later is registered under this relay's name; lines of \
             other relays do not come here until it is gone; give each relay an --instance of its own"
        );
        return Ok(false);
    }
    let draining = {
        let mut state = shared.lock();
        state.outbox.forgotten();
        state.outbox.is_draining()
    };
    // One transaction, so that no other relay reads a moment without this relay.
    let mut tx = connection.begin().await?;
    // A predecessor of this name is over, or will find itself displaced.
    sqlx::query("DELETE FROM relays WHERE instance = $1")
        .bind(&shared.config.instance)
        .execute(&mut *tx)
        .await?;
    sqlx::query(
        "INSERT INTO relays (instance, address, version, started_at, heartbeat_at, draining)
         VALUES ($1, $2, $3, $4, now(), $5)",
    )
    .bind(&shared.config.instance)
    .bind(&shared.config.address)
    .bind(env!("CARGO_PKG_VERSION"))
    .bind(shared.epoch)
    .bind(draining)
    .execute(&mut *tx)
    .await?;
    let notice = Notice::Relay {
        relay: shared.config.instance.clone(),
        epoch: shared.epoch,
    };
    notify(&mut tx, &[notice.encode()]).await?;
    tx.commit().await?;
    info!(
        instance = shared.config.instance,
        address = shared.config.address,
        "registered this relay"
    );
    // What lives is owed, and follows at once.
    shared.lock().displaced = false;
    shared.work.notify_one();
    Ok(true)
}

/// Whether a process of this name that began after this one is alive. Two that took the name from
/// each other without end would both be half registered; so the later one has it.
async fn is_displaced(
    shared: &SyncState,
    connection: &mut PgConnection,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "SELECT EXISTS (SELECT FROM relays WHERE instance = $1 AND started_at > $2
             AND heartbeat_at > now() - $3 * interval '1 millisecond')",
    )
    .bind(&shared.config.instance)
    .bind(shared.epoch)
    .bind(millis(shared.config.life))
    .fetch_one(connection)
    .await
}

/// Writes all that is owed.
async fn flush(shared: &SyncState, connection: &mut PgConnection) -> Result<(), Lost> {
    loop {
        let batch = shared.lock().outbox.next();
        if batch.is_empty() {
            return Ok(());
        }
        if bounded(write(shared, &mut *connection, &batch)).await? {
            // Only behind the commit: what a lost connection leaves unconfirmed is written again.
            shared.lock().outbox.done(&batch);
        } else if !bounded(beat(shared, &mut *connection)).await? {
            return Ok(());
        }
    }
}

/// `false` when the database has no row for this relay.
async fn write(
    shared: &SyncState,
    connection: &mut PgConnection,
    batch: &Batch,
) -> Result<bool, sqlx::Error> {
    let (relay, epoch) = (&shared.config.instance, shared.epoch);
    let mut tx = connection.begin().await?;
    // Waits for what an earlier connection of ours may still be committing: the order of our
    // writes is the order of the events.
    let ours: Option<i64> = sqlx::query_scalar(
        "SELECT started_at FROM relays WHERE instance = $1 AND started_at = $2 FOR NO KEY UPDATE",
    )
    .bind(relay)
    .bind(epoch)
    .fetch_optional(&mut *tx)
    .await?;
    // Removed as dead by another relay, or displaced: `beat` decides which.
    if ours.is_none() {
        return Ok(false);
    }
    let column = |of: fn(&Row) -> &str| -> Vec<String> {
        batch.inserts.iter().map(|row| of(row).to_owned()).collect()
    };
    let number = |of: fn(&Row) -> i64| -> Vec<i64> { batch.inserts.iter().map(of).collect() };
    sqlx::query(
        "INSERT INTO tunnels (relay, carrier, cluster, agent_instance, since, certificate, bulk)
         SELECT $1, *
         FROM unnest($2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::boolean[])
         ON CONFLICT DO NOTHING",
    )
    .bind(relay)
    .bind(number(|row| row.carrier))
    .bind(column(|row| &row.cluster))
    .bind(column(|row| &row.agent_instance))
    .bind(number(|row| row.since))
    .bind(column(|row| &row.certificate))
    .bind(batch.inserts.iter().map(|row| row.bulk).collect::<Vec<_>>())
    .execute(&mut *tx)
    .await?;
    sqlx::query("DELETE FROM tunnels WHERE relay = $1 AND carrier = ANY($2)")
        .bind(relay)
        .bind(&batch.deletes)
        .execute(&mut *tx)
        .await?;
    let relay = || relay.clone();
    let mut notices: Vec<String> = Vec::new();
    for row in batch.inserts.iter().cloned() {
        notices.push(
            Notice::Up {
                relay: relay(),
                epoch,
                row,
            }
            .encode(),
        );
    }
    for carrier in batch.deletes.iter().copied() {
        notices.push(
            Notice::Down {
                relay: relay(),
                epoch,
                carrier,
            }
            .encode(),
        );
    }
    if batch.draining {
        sqlx::query("UPDATE relays SET draining = true WHERE instance = $1")
            .bind(relay())
            .execute(&mut *tx)
            .await?;
        notices.push(
            Notice::Draining {
                relay: relay(),
                epoch,
            }
            .encode(),
        );
    }
    // PostgreSQL delivers notifications at commit, so a relay that reads the table upon one finds
    // the row.
    notify(&mut tx, &notices).await?;
    tx.commit().await?;
    Ok(true)
}

/// A clean end: no other relay waits until this one is taken for dead.
async fn leave(shared: &SyncState, connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    let (relay, epoch) = (shared.config.instance.clone(), shared.epoch);
    let mut tx = connection.begin().await?;
    sqlx::query("DELETE FROM relays WHERE instance = $1 AND started_at = $2")
        .bind(&relay)
        .bind(epoch)
        .execute(&mut *tx)
        .await?;
    notify(&mut tx, &[Notice::Gone { relay, epoch }.encode()]).await?;
    tx.commit().await
}
