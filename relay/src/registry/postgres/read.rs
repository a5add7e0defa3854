//! What a relay reads of the others: their heartbeats and their tunnels, all of them or those that
//! a notice names.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use sqlx::Acquire;
use sqlx::postgres::PgConnection;
use tokio::time::Instant;
use tracing::warn;

use super::notice::{Epoch, Heard, Notice, Row, is_address, is_instance};
use super::query::{Lost, bounded, millis, notify};
use super::remotes::Beat;
use super::state::SyncState;

/// Reads what notices were about.
pub(super) async fn look_up(
    shared: &SyncState,
    connection: &mut PgConnection,
    heard: Heard,
) -> Result<(), Lost> {
    // Relays before their tunnels: a tunnel of an unknown relay would be dropped.
    if heard.round {
        round(shared, &mut *connection).await?;
    }
    for about in &heard.registered {
        bounded(load(shared, &mut *connection, about)).await?;
    }
    if heard.tunnels.is_empty() {
        return Ok(());
    }
    let mut there = bounded(tunnels(connection, &heard.tunnels)).await?;
    let mut state = shared.lock();
    for tunnel in heard.tunnels {
        let row = there.remove(&tunnel);
        let (relay, epoch, carrier) = tunnel;
        match row {
            Some(row) => state.remotes.up(&relay, epoch, row),
            // The table decides, not the notice: Up and Down of one carrier may be read in either
            // order.
            None => state.remotes.down(&relay, epoch, carrier, Instant::now()),
        }
    }
    Ok(())
}

/// Those of these tunnels that the table has.
async fn tunnels(
    connection: &mut PgConnection,
    wanted: &BTreeSet<(String, Epoch, i64)>,
) -> Result<HashMap<(String, Epoch, i64), Row>, sqlx::Error> {
    let relays: Vec<&str> = wanted.iter().map(|(relay, ..)| relay.as_str()).collect();
    let epochs: Vec<Epoch> = wanted.iter().map(|(_, epoch, _)| *epoch).collect();
    let carriers: Vec<i64> = wanted.iter().map(|(.., carrier)| *carrier).collect();
    type Line = (String, Epoch, i64, String, String, i64, String, bool);
    let rows: Vec<Line> = sqlx::query_as(
        "SELECT relay, wanted.started_at, carrier, cluster, agent_instance, since, certificate, bulk
         FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS wanted (relay, started_at, carrier)
         JOIN tunnels USING (relay, carrier)
         JOIN relays ON instance = relay AND relays.started_at = wanted.started_at",
    )
    .bind(relays)
    .bind(epochs)
    .bind(carriers)
    .fetch_all(connection)
    .await?;
    let of = |(relay, epoch, carrier, cluster, agent_instance, since, certificate, bulk): Line| {
        let row = Row {
            carrier,
            cluster,
            agent_instance,
            since,
            certificate,
            bulk,
        };
        row.is_sound().then_some(((relay, epoch, carrier), row))
    };
    Ok(rows.into_iter().filter_map(of).collect())
}

/// Reads all heartbeats, then the tunnels of who is new, and removes the dead.
pub(super) async fn round(shared: &SyncState, connection: &mut PgConnection) -> Result<(), Lost> {
    let beats = bounded(beats(&mut *connection)).await?;
    let round = shared.good_round(beats);
    for about in &round.load {
        bounded(load(shared, &mut *connection, about)).await?;
    }
    for about in &round.reap {
        bounded(reap(shared, &mut *connection, about)).await?;
    }
    Ok(())
}

async fn reap(
    shared: &SyncState,
    connection: &mut PgConnection,
    (instance, epoch): &(String, Epoch),
) -> Result<(), sqlx::Error> {
    let mut tx = connection.begin().await?;
    let reaped = sqlx::query(
        "DELETE FROM relays WHERE instance = $1 AND started_at = $2
             AND heartbeat_at < now() - $3 * interval '1 millisecond'",
    )
    .bind(instance)
    .bind(epoch)
    .bind(millis(shared.config.life))
    .execute(&mut *tx)
    .await?;
    if reaped.rows_affected() > 0 {
        let notice = Notice::Gone {
            relay: instance.clone(),
            epoch: *epoch,
        };
        notify(&mut tx, &[notice.encode()]).await?;
        warn!(relay = %instance, "removed a relay that has fallen silent");
    }
    tx.commit().await
}

async fn beats(connection: &mut PgConnection) -> Result<Vec<Beat>, sqlx::Error> {
    type Line = (String, Epoch, String, bool, f64);
    let rows: Vec<Line> = sqlx::query_as(
        "SELECT instance, started_at, address, draining,
                greatest(extract(epoch FROM now() - heartbeat_at), 0)::float8
         FROM relays",
    )
    .fetch_all(connection)
    .await?;
    let beat = |(instance, epoch, address, draining, age): Line| {
        (is_instance(&instance) && is_address(&address)).then(|| Beat {
            instance,
            epoch,
            address,
            draining,
            age: Duration::try_from_secs_f64(age).unwrap_or(Duration::MAX),
        })
    };
    Ok(rows.into_iter().filter_map(beat).collect())
}

/// Every relay's tunnels.
pub(super) async fn load_all(
    shared: &SyncState,
    connection: &mut PgConnection,
) -> Result<(), Lost> {
    round(shared, &mut *connection).await?;
    for beat in bounded(beats(&mut *connection)).await? {
        bounded(load(shared, &mut *connection, &(beat.instance, beat.epoch))).await?;
    }
    Ok(())
}

pub(super) async fn load(
    shared: &SyncState,
    connection: &mut PgConnection,
    (instance, epoch): &(String, Epoch),
) -> Result<(), sqlx::Error> {
    let rows: Vec<(i64, String, String, i64, String, bool)> = sqlx::query_as(
        "SELECT carrier, cluster, agent_instance, since, certificate, bulk
         FROM tunnels JOIN relays ON instance = relay WHERE instance = $1 AND started_at = $2",
    )
    .bind(instance)
    .bind(epoch)
    .fetch_all(connection)
    .await?;
    let row = |(carrier, cluster, agent_instance, since, certificate, bulk)| Row {
        carrier,
        cluster,
        agent_instance,
        since,
        certificate,
        bulk,
    };
    let rows = rows.into_iter().map(row).filter(Row::is_sound).collect();
    let mut state = shared.lock();
    state
        .remotes
        .replace(instance, *epoch, rows, Instant::now());
    Ok(())
}
