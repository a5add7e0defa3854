//! `Open`: from a user's wish for a line to two spliced streams.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_certs::Kind;
use throwline_ops::DrainGuard;
use throwline_tunnel::carrier::{IncomingStream, OpenError};
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, StreamReply};
use throwline_tunnel::splice::splice;
use tokio::time::Instant;
use tracing::{debug, error};

use crate::list::unix_ms;
use crate::metrics::Held;
use crate::policy::Decision;
use crate::registry::{Presence, Route};
use crate::relay::Shared;
use crate::session::Peer;
use crate::tally::Share;

/// The only version of `Open` so far.
const VERSION: u32 = 1;
/// How many of an agent's carriers are tried: one may have died without a word.
const ATTEMPTS: usize = 2;
/// When to try again after a limit: lines come and go.
const LIMIT_WAIT: Duration = Duration::from_secs(5);
/// When to try again on a relay that drains: the proxy should have moved by then.
const DRAIN_WAIT: Duration = Duration::from_secs(1);

/// A line's far half, with all that is counted for it.
struct Far {
    stream: mux::Stream,
    reply: StreamReply,
    _of_the_user: Share,
    _of_the_cluster: Share,
    _held: Held,
    _kept_while_draining: DrainGuard,
}

pub(crate) async fn handle(
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    near: IncomingStream,
    wanted: Open,
) {
    let started = Instant::now();
    let far = match route(&shared, &peer, &wanted).await {
        Ok(far) => far,
        Err(refused) => {
            shared.refuse(near, refused).await;
            return;
        }
    };
    shared.metrics.opened(started.elapsed());
    let reply = StreamReply {
        refusal: None,
        agent_instance: far.reply.agent_instance.clone(),
    };
    let near = match near.accept(reply).await {
        Ok(near) => near,
        Err(error) => {
            debug!(%error, "a user left before the line was open");
            return;
        }
    };
    debug!(cluster = %wanted.cluster, "a line is open");
    let outcome = splice(near, far.stream, &shared.splice, &shared.meter).await;
    debug!(cluster = %wanted.cluster, ?outcome, "a line has ended");
}

async fn route(shared: &Arc<Shared>, peer: &Peer, wanted: &Open) -> Result<Far, Refusal> {
    if peer.identity.id.kind() != Kind::User {
        return Err(Refusal::new(
            RefusalCode::NotAllowed,
            "only users open lines",
        ));
    }
    if shared.draining.is_cancelled() {
        return Err(
            Refusal::new(RefusalCode::Draining, "the relay is stopping").retry_after(DRAIN_WAIT)
        );
    }
    check(wanted)?;
    let cluster = wanted.cluster.as_str();
    match shared.policy.decide(&peer.identity, cluster).await {
        Decision::Allowed => {}
        Decision::Refused => {
            return Err(Refusal::new(
                RefusalCode::NotAllowed,
                format!("you may not reach the cluster {cluster}"),
            ));
        }
    }
    let of_the_user = shared
        .lines_per_user
        .take(peer.identity.id.name())
        .ok_or_else(|| {
            Refusal::new(RefusalCode::Limit, "you have as many lines open as you may")
                .retry_after(LIMIT_WAIT)
        })?;
    let of_the_cluster = shared.lines_per_cluster.take(cluster).ok_or_else(|| {
        Refusal::new(
            RefusalCode::Limit,
            format!("the cluster {cluster} has as many lines open as it may"),
        )
        .retry_after(LIMIT_WAIT)
    })?;
    let kept_while_draining = shared.lines.guard();
    let give_up =
        Instant::now() + shared.config.timing.agent_wait + shared.config.timing.agent_answer;
    let tunnels = find(shared, cluster, &wanted.agent_instance).await?;
    let told = Open {
        version: VERSION,
        cluster: cluster.to_owned(),
        line_id: wanted.line_id.clone(),
        kind: wanted.kind,
        // Never what the dialer wrote: the agent believes these.
        user: peer.identity.id.to_string(),
        client_addr: peer.client.to_string(),
        agent_instance: wanted.agent_instance.clone(),
    };
    let (stream, reply) = reach(shared, &tunnels, &told, give_up).await?;
    Ok(Far {
        stream,
        reply,
        _of_the_user: of_the_user,
        _of_the_cluster: of_the_cluster,
        _held: shared.metrics.line(),
        _kept_while_draining: kept_while_draining,
    })
}

fn check(wanted: &Open) -> Result<(), Refusal> {
    if wanted.version != VERSION {
        return Err(Refusal::new(
            RefusalCode::Version,
            format!("this relay opens lines of version {VERSION} only"),
        ));
    }
    if wanted.line_id.len() != 16 {
        return Err(Refusal::new(
            RefusalCode::BadRequest,
            "a line's id has 16 bytes",
        ));
    }
    if throwline_certs::spiffe::check_cluster_name(&wanted.cluster).is_err() {
        // Not repeated: it could hold anything.
        return Err(Refusal::new(
            RefusalCode::UnknownCluster,
            "there is no cluster of that name, for it is not a cluster's name",
        ));
    }
    Ok(())
}

/// The tunnels that a line may take, the best first; after a bounded wait if the agent was here
/// a moment ago.
async fn find(shared: &Arc<Shared>, cluster: &str, instance: &str) -> Result<Vec<Route>, Refusal> {
    let timing = &shared.config.timing;
    let gone = match look(shared, cluster, instance).await {
        Ok(tunnels) => return Ok(tunnels),
        Err(gone) => gone,
    };
    let record = shared.authority.cluster(cluster).await.map_err(|error| {
        error!(%error, "cannot read a cluster's record");
        Refusal::new(RefusalCode::Internal, "the authority cannot answer now")
    })?;
    let Some(record) = record else {
        return Err(Refusal::new(
            RefusalCode::UnknownCluster,
            format!("there is no cluster named {cluster} here"),
        ));
    };
    let Some(last_seen) = record.last_seen_at.or(record.last_connected_at) else {
        return Err(Refusal::new(
            RefusalCode::NeverConnected,
            format!("the agent of the cluster {cluster} has never connected"),
        ));
    };
    // A relay that has just started has seen nobody; its agents are on their way.
    let ago = gone.unwrap_or_else(|| shared.started.elapsed());
    if ago < timing.agent_memory {
        let coming = async {
            loop {
                shared.registry.connected(cluster).await;
                if let Ok(tunnels) = look(shared, cluster, instance).await {
                    return tunnels;
                }
                // Another instance came; the one that was asked for may still.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if let Ok(tunnels) = tokio::time::timeout(timing.agent_wait, coming).await {
            return Ok(tunnels);
        }
    }
    let since = gone
        .and_then(|ago| SystemTime::now().checked_sub(ago))
        .unwrap_or(last_seen);
    Err(offline(cluster, since))
}

/// `Err` with how long ago the last tunnel ended, if this registry has seen one.
async fn look(
    shared: &Shared,
    cluster: &str,
    instance: &str,
) -> Result<Vec<Route>, Option<Duration>> {
    match shared.registry.find(cluster).await {
        Presence::Connected(mut tunnels) => {
            if !instance.is_empty() {
                tunnels.retain(|route| route.agent_instance() == instance);
            }
            if tunnels.is_empty() {
                return Err(Some(Duration::ZERO));
            }
            Ok(tunnels)
        }
        Presence::Gone(ago) => Err(Some(ago)),
        Presence::Unseen | Presence::Unknown(_) => Err(None),
    }
}

fn offline(cluster: &str, since: SystemTime) -> Refusal {
    Refusal::new(
        RefusalCode::Offline,
        format!("the agent of the cluster {cluster} is offline"),
    )
    .since(unix_ms(since))
    .retry_after(LIMIT_WAIT)
}

async fn reach(
    shared: &Shared,
    routes: &[Route],
    told: &Open,
    give_up: Instant,
) -> Result<(mux::Stream, StreamReply), Refusal> {
    let mut last = offline(&told.cluster, SystemTime::now());
    let tunnels = routes.iter().filter_map(Route::here);
    for tunnel in tunnels.take(ATTEMPTS) {
        let end = give_up.min(Instant::now() + shared.config.timing.agent_answer);
        let opened = tokio::time::timeout_at(end, tunnel.carrier.open(told.clone().into()));
        match opened.await {
            Ok(Ok(opened)) => return Ok(opened),
            // The agent's own word is final, but it is cut to size before a user gets it.
            Ok(Err(OpenError::Refused(refused))) => {
                return Err(Refusal {
                    code: refused.code,
                    retry_after_ms: refused.retry_after_ms,
                    since_unix_ms: refused.since_unix_ms,
                    ..Refusal::new(RefusalCode::Unspecified, refused.message)
                });
            }
            Ok(Err(OpenError::Limit)) => {
                last = Refusal::new(RefusalCode::Limit, "the agent's carrier is full")
                    .retry_after(LIMIT_WAIT);
            }
            Ok(Err(OpenError::CarrierLost(reason))) => {
                debug!(%reason, "an agent's carrier ended under a new line");
            }
            Ok(Err(OpenError::Timeout(_))) | Err(_) => {
                last = Refusal::new(
                    RefusalCode::Timeout,
                    format!("the agent of the cluster {} does not answer", told.cluster),
                );
            }
            Ok(Err(error)) => {
                debug!(%error, "an agent did not answer as it should");
                last = Refusal::new(
                    RefusalCode::Internal,
                    format!(
                        "the agent of the cluster {} broke the protocol",
                        told.cluster
                    ),
                );
            }
        }
    }
    Err(last)
}
