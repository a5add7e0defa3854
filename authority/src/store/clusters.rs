//! Clusters: which one has a name, and what is known of it.

use std::time::SystemTime;

use throwline_certs::directory::ClusterRecord;

use super::{Store, Tx, bounded, done, millis, time_of};
use crate::error::Error;
use crate::model::Released;

type ClusterRow = (
    String,
    i64,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<String>,
    Option<String>,
    Option<i64>,
);

impl Store {
    /// Binds a name that is free to this cluster; which cluster it is bound to then.
    pub(crate) async fn bind_cluster(
        &self,
        tx: &mut Tx,
        name: &str,
        uid: &str,
    ) -> Result<Option<String>, Error> {
        within!(self, tx, connection =>
            sqlx::query_scalar(
                "UPDATE clusters SET cluster_uid = coalesce(cluster_uid, $1)
                 WHERE name = $2 RETURNING cluster_uid",
            )
            .bind(uid)
            .bind(name)
            .fetch_optional(connection))
    }

    pub(crate) async fn release_cluster(
        &self,
        name: &str,
        now: SystemTime,
    ) -> Result<Option<Released>, Error> {
        let mut tx = self.begin().await?;
        let found: Option<Option<String>> = within!(self, &mut tx, connection =>
            sqlx::query_scalar("SELECT cluster_uid FROM clusters WHERE name = $1")
                .bind(name)
                .fetch_optional(connection))?;
        let Some(uid) = found else { return Ok(None) };
        within!(self, &mut tx, connection => done(
            sqlx::query(
                "UPDATE clusters SET cluster_uid = NULL, released_at = $1, renewed_twice_at = NULL
                 WHERE name = $2",
            )
            .bind(millis(now))
            .bind(name)
            .execute(connection)))?;
        // A release revokes nothing: certificates that are still valid are reported to the
        // operator.
        let until: Option<i64> = within!(self, &mut tx, connection =>
            sqlx::query_scalar(
                "SELECT max(not_after) FROM certificates
                 WHERE kind = 'cluster' AND name = $1 AND not_after > $2
                 AND NOT EXISTS (
                     SELECT 1 FROM revocations AS revoked
                     WHERE revoked.kind = 'cluster' AND revoked.name = $1
                     AND certificates.not_before < (revoked.last_not_before + 1) * 1000
                 )
                 AND serial NOT IN (SELECT name FROM revocations WHERE kind = 'certificate')",
            )
            .bind(name)
            .bind(millis(now))
            .fetch_one(connection))?;
        self.commit(tx).await?;
        Ok(Some(Released {
            uid,
            certificates_until: until.map(time_of),
        }))
    }

    /// Two successors of one of the cluster's certificates have been seen.
    pub(crate) async fn renewed_twice(
        &self,
        tx: &mut Tx,
        cluster: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        within!(self, tx, connection => done(
            sqlx::query("UPDATE clusters SET renewed_twice_at = $1 WHERE name = $2")
                .bind(millis(now))
                .bind(cluster)
                .execute(connection)))
    }

    pub(crate) async fn clusters(&self, only: Option<&str>) -> Result<Vec<ClusterRecord>, Error> {
        let rows: Vec<ClusterRow> = on!(self, pool =>
            sqlx::query_as(
                "SELECT name, created_at, enrolled_at, last_connected_at, last_seen_at,
                        kubernetes_version, agent_version, renewed_twice_at
                 FROM clusters WHERE $1 IS NULL OR name = $1 ORDER BY name",
            )
            .bind(only)
            .fetch_all(pool))?;
        Ok(rows.into_iter().map(cluster_of).collect())
    }

    pub(crate) async fn connected(
        &self,
        name: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "UPDATE clusters SET last_connected_at = $1, last_seen_at = $1,
                     agent_version = coalesce(nullif($2, ''), agent_version)
                 WHERE name = $3",
            )
            .bind(millis(now))
            .bind(agent)
            .bind(name)
            .execute(pool)))
    }

    pub(crate) async fn status(
        &self,
        name: &str,
        kubernetes: &str,
        agent: &str,
        now: SystemTime,
    ) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query(
                "UPDATE clusters SET last_seen_at = $1,
                     kubernetes_version = coalesce(nullif($2, ''), kubernetes_version),
                     agent_version = coalesce(nullif($3, ''), agent_version)
                 WHERE name = $4",
            )
            .bind(millis(now))
            .bind(kubernetes)
            .bind(agent)
            .bind(name)
            .execute(pool)))
    }

    pub(crate) async fn seen(&self, name: &str, now: SystemTime) -> Result<(), Error> {
        on!(self, pool => done(
            sqlx::query("UPDATE clusters SET last_seen_at = $1 WHERE name = $2")
                .bind(millis(now))
                .bind(name)
                .execute(pool)))
    }
}

fn cluster_of(row: ClusterRow) -> ClusterRecord {
    let (name, created, enrolled, connected, seen, kubernetes_version, agent_version, twice) = row;
    ClusterRecord {
        name,
        created_at: time_of(created),
        enrolled_at: enrolled.map(time_of),
        last_connected_at: connected.map(time_of),
        last_seen_at: seen.map(time_of),
        kubernetes_version,
        agent_version,
        renewed_twice_at: twice.map(time_of),
    }
}
