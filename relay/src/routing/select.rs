//! Which carriers lead to an agent, and what to answer when none does.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use throwline_certs::Directory;
use throwline_tunnel::proto::messages::{Refusal, RefusalCode};
use tokio::time::Instant;
use tracing::error;

use super::request::OpenRequest;
use crate::registry::{Presence, Registry, Route};

/// When to try again after a limit or an outage: lines and agents come and go.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(5);

/// Finds routes in the registry, and explains in terms of the authority's records why there are none.
pub(crate) struct RouteSelector {
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) relay_started: Instant,
    /// See [`Timing`](crate::Timing).
    pub(crate) agent_memory: Duration,
    pub(crate) agent_wait: Duration,
}

/// Why there is no route now.
enum RouteError {
    /// The last carrier of the agent ended this long ago.
    Gone(Duration),
    /// This registry has seen none.
    Unseen,
    /// The shared database has been away this long.
    Unknown(Duration),
}

impl RouteSelector {
    /// The routes that a line may take, the best first; after a bounded wait if the agent was
    /// connected a moment ago.
    pub(super) async fn select_routes(&self, request: &OpenRequest) -> Result<Vec<Route>, Refusal> {
        // A second hop could form a loop between relays whose data differ.
        if request.is_forwarded {
            return self.local_routes(request).await;
        }
        let (cluster, instance) = (request.cluster(), request.agent_instance());
        let gone = match self.current_routes(request).await {
            Ok(routes) => return Ok(routes),
            Err(RouteError::Gone(ago)) => Some(ago),
            Err(RouteError::Unseen) => None,
            Err(RouteError::Unknown(away)) => return Err(no_current_data(cluster, away)),
        };
        // Only now the database of the authority: a connected cluster never waits for it.
        let last_seen = self.last_seen(cluster).await?;
        // A relay that has just started has seen no agent; all of them may be on their way.
        let ago = gone.unwrap_or_else(|| self.relay_started.elapsed());
        if ago < self.agent_memory {
            let arrival = self.routes_of_arrival(request);
            if let Ok(routes) = tokio::time::timeout(self.agent_wait, arrival).await {
                return Ok(routes);
            }
        }
        // A resumption needs the same process; the proxy then ends the line instead of trying
        // again.
        if !instance.is_empty() && self.routes_to(cluster, "").await.is_ok() {
            return Err(Refusal::new(
                RefusalCode::InstanceGone,
                format!(
                    "the agent of the cluster {cluster} that held the line is gone; another is there"
                ),
            ));
        }
        let since = gone
            .and_then(|ago| SystemTime::now().checked_sub(ago))
            .unwrap_or(last_seen);
        Err(offline(cluster, since))
    }

    /// The routes of this moment, without a wait; empty if there are none.
    pub(super) async fn routes_now(&self, request: &OpenRequest) -> Vec<Route> {
        let routes = if request.is_forwarded {
            self.local_routes(request).await.ok()
        } else {
            self.current_routes(request).await.ok()
        };
        routes.unwrap_or_default()
    }

    /// The routes that end at this relay, for a line that was forwarded once already.
    async fn local_routes(&self, request: &OpenRequest) -> Result<Vec<Route>, Refusal> {
        let mut routes = self.current_routes(request).await.unwrap_or_default();
        routes.retain(|route| route.here().is_some());
        if routes.is_empty() {
            return Err(offline(request.cluster(), SystemTime::now()));
        }
        Ok(routes)
    }

    /// The carriers for what the line moves come first; any other is better than none.
    async fn current_routes(&self, request: &OpenRequest) -> Result<Vec<Route>, RouteError> {
        let found = self.routes_to(request.cluster(), request.agent_instance());
        let mut routes = found.await?;
        // Stable, so that among equals the best stays first.
        routes.sort_by_key(|route| route.class() != request.class());
        Ok(routes)
    }

    async fn routes_to(&self, cluster: &str, instance: &str) -> Result<Vec<Route>, RouteError> {
        match self.registry.find(cluster).await {
            Presence::Connected(mut routes) => {
                if !instance.is_empty() {
                    routes.retain(|route| route.agent_instance() == instance);
                }
                if routes.is_empty() {
                    return Err(RouteError::Gone(Duration::ZERO));
                }
                Ok(routes)
            }
            Presence::Gone(ago) => Err(RouteError::Gone(ago)),
            Presence::Unseen => Err(RouteError::Unseen),
            Presence::Unknown(away) => Err(RouteError::Unknown(away)),
        }
    }

    /// Waits for the agent, or for the asked process of it.
    async fn routes_of_arrival(&self, request: &OpenRequest) -> Vec<Route> {
        loop {
            self.registry.connected(request.cluster()).await;
            if let Ok(routes) = self.current_routes(request).await {
                return routes;
            }
            // Another process is connected, so the registry does not wait; the asked one may follow.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// When the cluster's agent was last connected to any relay.
    async fn last_seen(&self, cluster: &str) -> Result<SystemTime, Refusal> {
        let record = self.directory.cluster(cluster).await.map_err(|error| {
            error!(%error, "cannot read a cluster's record");
            let message = format!(
                "the relays' database does not answer, so it is not known where the agent of the cluster \
                 {cluster} is connected; try again in a moment"
            );
            Refusal::new(RefusalCode::Internal, message).retry_after(RETRY_AFTER)
        })?;
        let Some(record) = record else {
            return Err(Refusal::new(
                RefusalCode::UnknownCluster,
                format!("there is no cluster named {cluster} here"),
            ));
        };
        if record.is_revoked(&self.directory.validator().revocations()) {
            return Err(Refusal::new(
                RefusalCode::Revoked,
                format!("the identity of the cluster {cluster} was revoked"),
            ));
        }
        record
            .last_seen_at
            .or(record.last_connected_at)
            .ok_or_else(|| {
                Refusal::new(
                    RefusalCode::NeverConnected,
                    format!("the agent of the cluster {cluster} has never connected"),
                )
            })
    }
}

fn no_current_data(cluster: &str, away: Duration) -> Refusal {
    let message = format!(
        "the relays' database has not answered for {} s, so it is not known where the agent of the cluster \
         {cluster} is connected; try again in a moment",
        away.as_secs()
    );
    Refusal::new(RefusalCode::Internal, message).retry_after(RETRY_AFTER)
}

pub(super) fn offline(cluster: &str, since: SystemTime) -> Refusal {
    Refusal::new(
        RefusalCode::Offline,
        format!("the agent of the cluster {cluster} is offline"),
    )
    .since(unix_ms(since))
    .retry_after(RETRY_AFTER)
}

pub(crate) fn unix_ms(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
