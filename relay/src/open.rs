//! `Open`: from a user's wish for a line to two spliced streams.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_certs::{Kind, SpiffeId};
use throwline_ops::DrainGuard;
use throwline_tunnel::carrier::{IncomingStream, OpenError};
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, StreamReply};
use throwline_tunnel::splice::splice;
use tokio::time::Instant;
use tracing::{debug, error, warn};

use crate::list::unix_ms;
use crate::metrics::Held;
use crate::peers::PeerError;
use crate::policy::Decision;
use crate::registry::{Presence, Route};
use crate::relay::Shared;
use crate::session::Peer;
use crate::tally::{Share, Spender};

/// The only version of `Open` so far.
const VERSION: u32 = 1;
/// How many ways are tried: a carrier or a relay may have died without a word.
const ATTEMPTS: usize = 4;
/// When to try again after a limit: lines come and go.
const LIMIT_WAIT: Duration = Duration::from_secs(5);
/// When to try again on a relay that drains: the proxy should have moved by then.
const DRAIN_WAIT: Duration = Duration::from_secs(1);
/// Between looks for another way, while all that are known are closing or have just died.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// A line's far half, with all that is counted for it.
struct Far {
    stream: mux::Stream,
    reply: StreamReply,
    buffers: [Spender; 2],
    _of_the_user: Option<Share>,
    _of_the_cluster: Share,
    _of_all: Share,
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
    let mut config = shared.splice.clone();
    let own = far.buffers.iter().map(|spender| spender.budget.clone());
    config.budgets.extend(own);
    let outcome = splice(near, far.stream, &config, &shared.meter).await;
    debug!(cluster = %wanted.cluster, ?outcome, "a line has ended");
}

/// Whose line it is, and where it may be led.
struct Asked {
    /// What the agent is told of the user; it believes this, so it is never what a user wrote.
    user: String,
    client_addr: String,
    of_the_user: Option<Share>,
    /// From another relay, which found the agent here: never led further.
    is_forwarded: bool,
}

async fn route(shared: &Arc<Shared>, peer: &Peer, wanted: &Open) -> Result<Far, Refusal> {
    check(wanted)?;
    let cluster = wanted.cluster.as_str();
    let asked = match peer.identity.id.kind() {
        Kind::User => by_a_user(shared, peer, cluster).await?,
        Kind::Relay => by_a_relay(shared, peer, wanted)?,
        Kind::Cluster => {
            return Err(Refusal::new(
                RefusalCode::NotAllowed,
                "only users open lines",
            ));
        }
    };
    let of_all = shared.lines_in_all.take("").ok_or_else(|| {
        shared.metrics.limited("lines");
        Refusal::new(
            RefusalCode::Limit,
            "this relay has as many lines open as it may",
        )
        .retry_after(LIMIT_WAIT)
    })?;
    let of_the_cluster = shared.lines_per_cluster.take(cluster).ok_or_else(|| {
        shared.metrics.limited("lines-per-cluster");
        Refusal::new(
            RefusalCode::Limit,
            format!("the cluster {cluster} has as many lines open as it may"),
        )
        .retry_after(LIMIT_WAIT)
    })?;
    let kept_while_draining = shared.lines.guard();
    let buffers = [
        shared.buffers_per_user.of(&asked.user),
        shared.buffers_per_cluster.of(cluster),
    ];
    let told = Open {
        version: VERSION,
        cluster: cluster.to_owned(),
        line_id: wanted.line_id.clone(),
        kind: wanted.kind,
        user: asked.user,
        client_addr: asked.client_addr,
        agent_instance: wanted.agent_instance.clone(),
    };
    let (stream, reply) = lead(shared, &told, asked.is_forwarded).await?;
    Ok(Far {
        stream,
        reply,
        buffers,
        _of_all: of_all,
        _of_the_user: asked.of_the_user,
        _of_the_cluster: of_the_cluster,
        _held: shared.metrics.line(),
        _kept_while_draining: kept_while_draining,
    })
}

/// Opens the far half. An agent that is between two ways is waited for, unless the line was
/// forwarded: then the user's own relay waits, and sees all its ways.
async fn lead(
    shared: &Arc<Shared>,
    told: &Open,
    is_forwarded: bool,
) -> Result<(mux::Stream, StreamReply), Refusal> {
    let timing = &shared.config.timing;
    let moved_by = Instant::now() + timing.agent_wait;
    let give_up = moved_by + timing.agent_answer;
    let (cluster, instance) = (told.cluster.as_str(), told.agent_instance.as_str());
    loop {
        let routes = match is_forwarded {
            true => own(shared, cluster, instance).await?,
            false => find(shared, cluster, instance).await?,
        };
        match reach(shared, &routes, told, give_up).await {
            Ok(opened) => return Ok(opened),
            Err(Unreached::Refused(refused)) => return Err(refused),
            Err(Unreached::Moving) if is_forwarded || Instant::now() >= moved_by => {
                return Err(offline(cluster, SystemTime::now()));
            }
            Err(Unreached::Moving) => tokio::time::sleep(LOOK_AGAIN).await,
        }
    }
}

/// Why none of an agent's ways could be taken.
enum Unreached {
    Refused(Refusal),
    /// Each of them is closing, or has just died.
    Moving,
}

async fn by_a_user(shared: &Shared, peer: &Peer, cluster: &str) -> Result<Asked, Refusal> {
    if shared.draining.is_cancelled() {
        return Err(
            Refusal::new(RefusalCode::Draining, "the relay is stopping").retry_after(DRAIN_WAIT)
        );
    }
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
            shared.metrics.limited("lines-per-user");
            Refusal::new(RefusalCode::Limit, "you have as many lines open as you may")
                .retry_after(LIMIT_WAIT)
        })?;
    Ok(Asked {
        user: peer.identity.id.to_string(),
        client_addr: peer.client.to_string(),
        of_the_user: Some(of_the_user),
        is_forwarded: false,
    })
}

/// The relay of the user has asked the policy and counted the line. It is trusted for routing
/// metadata, as far as that can be read; who the user is, the sealed session proves to the agent.
fn by_a_relay(shared: &Shared, peer: &Peer, wanted: &Open) -> Result<Asked, Refusal> {
    let bad = |what| {
        warn!(relay = %peer.identity.id, what, "a relay forwarded a malformed line");
        Refusal::new(RefusalCode::BadRequest, what)
    };
    let user: SpiffeId = wanted
        .user
        .parse()
        .map_err(|_| bad("the user of a forwarded line is malformed"))?;
    if user.kind() != Kind::User || user.domain() != shared.authority.trust_domain() {
        return Err(bad("the user of a forwarded line is of another domain"));
    }
    let client: SocketAddr = wanted
        .client_addr
        .parse()
        .map_err(|_| bad("the client address of a forwarded line is malformed"))?;
    shared.metrics.forwarded.with_label_values(&["in"]).inc();
    Ok(Asked {
        user: user.to_string(),
        client_addr: client.to_string(),
        of_the_user: None,
        is_forwarded: true,
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

/// Why there is no route now.
enum Missing {
    /// Its last tunnel ended this long ago.
    Gone(Duration),
    /// This registry has seen none.
    Unseen,
    /// The relays' database has been away this long.
    Unknown(Duration),
}

/// The routes that a line may take, the best first; after a bounded wait if the agent was here a
/// moment ago.
async fn find(shared: &Arc<Shared>, cluster: &str, instance: &str) -> Result<Vec<Route>, Refusal> {
    let timing = &shared.config.timing;
    let gone = match look(shared, cluster, instance).await {
        Ok(routes) => return Ok(routes),
        Err(Missing::Gone(ago)) => Some(ago),
        Err(Missing::Unseen) => None,
        Err(Missing::Unknown(away)) => {
            let message = format!(
                "the relays' database has not answered for {} s, so it is not known where the \
                 cluster's agent is connected",
                away.as_secs()
            );
            return Err(Refusal::new(RefusalCode::Internal, message).retry_after(LIMIT_WAIT));
        }
    };
    let record = shared.authority.cluster(cluster).await.map_err(|error| {
        error!(%error, "cannot read a cluster's record");
        let message = format!(
            "the relays' database does not answer, so it is not known where the agent of the cluster \
             {cluster} is connected"
        );
        Refusal::new(RefusalCode::Internal, message).retry_after(LIMIT_WAIT)
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
                if let Ok(routes) = look(shared, cluster, instance).await {
                    return routes;
                }
                // Another instance came; the one that was asked for may still.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        if let Ok(routes) = tokio::time::timeout(timing.agent_wait, coming).await {
            return Ok(routes);
        }
    }
    let since = gone
        .and_then(|ago| SystemTime::now().checked_sub(ago))
        .unwrap_or(last_seen);
    Err(offline(cluster, since))
}

async fn look(shared: &Shared, cluster: &str, instance: &str) -> Result<Vec<Route>, Missing> {
    match shared.registry.find(cluster).await {
        Presence::Connected(mut routes) => {
            if !instance.is_empty() {
                routes.retain(|route| route.agent_instance() == instance);
            }
            if routes.is_empty() {
                return Err(Missing::Gone(Duration::ZERO));
            }
            Ok(routes)
        }
        Presence::Gone(ago) => Err(Missing::Gone(ago)),
        Presence::Unseen => Err(Missing::Unseen),
        Presence::Unknown(away) => Err(Missing::Unknown(away)),
    }
}

/// The routes that end here, for a line that has made its one hop.
async fn own(shared: &Shared, cluster: &str, instance: &str) -> Result<Vec<Route>, Refusal> {
    let mut routes = look(shared, cluster, instance).await.unwrap_or_default();
    routes.retain(|route| route.here().is_some());
    if routes.is_empty() {
        return Err(offline(cluster, SystemTime::now()));
    }
    Ok(routes)
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
) -> Result<(mux::Stream, StreamReply), Unreached> {
    let mut last = Unreached::Moving;
    for route in routes.iter().take(ATTEMPTS) {
        let end = give_up.min(Instant::now() + shared.config.timing.agent_answer);
        let opened = tokio::time::timeout_at(end, along(shared, route, told)).await;
        let error = match opened {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => error,
            Err(_) => OpenError::Timeout(shared.config.timing.agent_answer).into(),
        };
        last = match error {
            // Its own word is final, unless it is that this way is closing; and it is cut to size
            // before a user gets it.
            PeerError::Open(OpenError::Refused(refused)) => {
                if may_go_elsewhere(route, refused.code()) {
                    continue;
                }
                return Err(Unreached::Refused(Refusal {
                    code: refused.code,
                    retry_after_ms: refused.retry_after_ms,
                    since_unix_ms: refused.since_unix_ms,
                    ..Refusal::new(RefusalCode::Unspecified, refused.message)
                }));
            }
            PeerError::Open(OpenError::Limit) => Unreached::Refused(
                Refusal::new(RefusalCode::Limit, "the agent's carrier is full")
                    .retry_after(LIMIT_WAIT),
            ),
            PeerError::Open(OpenError::CarrierLost(reason)) => {
                debug!(%reason, "a carrier ended under a new line");
                continue;
            }
            PeerError::Unreachable { .. } => {
                debug!(%error, "a line goes another way");
                continue;
            }
            PeerError::Open(OpenError::Timeout(_)) => Unreached::Refused(Refusal::new(
                RefusalCode::Timeout,
                format!("the agent of the cluster {} does not answer", told.cluster),
            )),
            PeerError::Open(error) => {
                debug!(%error, "an agent did not answer as it should");
                Unreached::Refused(Refusal::new(
                    RefusalCode::Internal,
                    format!(
                        "the agent of the cluster {} broke the protocol",
                        told.cluster
                    ),
                ))
            }
        };
    }
    Err(last)
}

async fn along(
    shared: &Shared,
    route: &Route,
    told: &Open,
) -> Result<(mux::Stream, StreamReply), PeerError> {
    match (route, &shared.peers) {
        (Route::Here(tunnel), _) => Ok(tunnel.carrier.open(told.clone().into()).await?),
        (Route::There(remote), Some(peers)) => {
            let opened = peers.open(&remote.relay, told).await?;
            shared.metrics.forwarded.with_label_values(&["out"]).inc();
            Ok(opened)
        }
        (Route::There(remote), None) => Err(PeerError::Unreachable {
            relay: remote.relay.instance.clone(),
            why: "this relay has no listener for peers".to_owned(),
        }),
    }
}

/// Whether a refusal is about the way, not about the line.
fn may_go_elsewhere(route: &Route, code: RefusalCode) -> bool {
    match route {
        Route::Here(_) => code == RefusalCode::Draining,
        // Its agent may have left since the registry told of it.
        Route::There(_) => matches!(
            code,
            RefusalCode::Draining | RefusalCode::Offline | RefusalCode::Timeout
        ),
    }
}
