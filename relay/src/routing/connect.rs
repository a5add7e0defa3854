//! From a request to an open stream towards the agent: routes are tried until one answers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use throwline_ops::Denied;
use throwline_tunnel::carrier::OpenError;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode};
use throwline_tunnel::proto::origin;
use tokio::time::Instant;
use tracing::debug;

use super::peers::{Opened, PeerError, Peers, open_on};
use super::request::OpenRequest;
use super::select::{RETRY_AFTER, RouteSelector, offline};
use crate::metrics::Metrics;
use crate::refusals::with_text;
use crate::registry::Route;

/// How many routes are tried: a carrier or a relay may have died without a FIN or reset.
const ATTEMPTS: usize = 4;
/// After so much silence on one route the next one is tried as well.
const SILENT: Duration = Duration::from_secs(1);
/// The interval of looking for another route, while all that are known are closing or have just died.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Opens the half of a line that leads to the agent.
pub(crate) struct Connector {
    pub(crate) selector: RouteSelector,
    /// `None` where there is one relay.
    pub(crate) peers: Option<Arc<Peers>>,
    pub(crate) metrics: Metrics,
    /// See [`Timing`](crate::Timing).
    pub(crate) agent_wait: Duration,
    pub(crate) agent_answer: Duration,
}

/// Why none of an agent's routes could be used.
enum Unreached {
    Refused(Refusal),
    /// Each of them is closing, or has just died.
    Moving,
}

/// What a failure on one route means for the others.
enum Failed {
    /// The agent has answered: the same on each route.
    Finally(Refusal),
    /// The answer if no other route is better.
    OnThisPath(Refusal),
    /// The route is closing, or has just died.
    Moving,
}

impl Connector {
    /// An agent that is between two carriers is waited for, unless the line was forwarded: then the
    /// user's own relay waits, which sees all routes.
    pub(super) async fn connect(&self, request: &OpenRequest) -> Result<Opened, Refusal> {
        let moved_by = Instant::now() + self.agent_wait;
        let give_up = moved_by + self.agent_answer;
        loop {
            let routes = self.selector.select_routes(request).await?;
            match self.try_routes(routes, request, give_up).await {
                Ok(opened) => return Ok(opened),
                Err(Unreached::Refused(refusal)) => return Err(refusal),
                // A forwarded line is not waited for here: the relay that sent it has other routes
                // and its own deadline.
                Err(Unreached::Moving) if request.is_forwarded || Instant::now() >= moved_by => {
                    return Err(offline(request.cluster(), SystemTime::now()));
                }
                Err(Unreached::Moving) => tokio::time::sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Tries routes in their order; the first answer counts.
    ///
    /// The next route is tried when the one before it has failed, or has been silent for so long that
    /// it may be a connection that loses everything. Routes that appear meanwhile follow: an agent that
    /// has lost its network is back before its old carriers are known to be dead.
    async fn try_routes(
        &self,
        routes: Vec<Route>,
        request: &OpenRequest,
        give_up: Instant,
    ) -> Result<Opened, Unreached> {
        let attempt = |route: Route| async move {
            let within = self.agent_answer;
            // All attempts together have one deadline: the user still waits.
            let end = give_up.min(Instant::now() + within);
            let opened = tokio::time::timeout_at(end, self.open_via(&route, &request.open)).await;
            opened
                .unwrap_or_else(|_| Err(OpenError::Timeout(within).into()))
                .map_err(|error| self.classify(&route, request.cluster(), error))
        };
        let mut last = Unreached::Moving;
        let mut known = routes.clone();
        let mut untried: VecDeque<Route> = routes.into_iter().take(ATTEMPTS).collect();
        let mut under_way: FuturesUnordered<_> =
            untried.pop_front().map(attempt).into_iter().collect();
        let mut is_silent = false;
        loop {
            // Once the known routes are silent, only new ones can help, so they are looked for often.
            let pause = if is_silent && untried.is_empty() {
                LOOK_AGAIN
            } else {
                SILENT
            };
            // Bounds the attempts for one line.
            let may_try = !untried.is_empty() || known.len() < 2 * ATTEMPTS;
            let answer = tokio::select! {
                answer = under_way.next() => answer,
                () = tokio::time::sleep(pause), if may_try => {
                    is_silent = true;
                    if untried.is_empty() {
                        let mut routes = self.selector.routes_now(request).await;
                        routes.retain(|route| !known.iter().any(|other| other.is(route)));
                        known.extend(routes.iter().cloned());
                        untried.extend(routes);
                    }
                    under_way.extend(untried.pop_front().map(attempt));
                    continue;
                }
            };
            match answer {
                None => return Err(last),
                Some(Ok(opened)) => return Ok(opened),
                Some(Err(Failed::Finally(refusal))) => return Err(Unreached::Refused(refusal)),
                // Another path may succeed; the refusal is kept, in case none does.
                Some(Err(Failed::OnThisPath(refusal))) => last = Unreached::Refused(refusal),
                Some(Err(Failed::Moving)) => {}
            }
            under_way.extend(untried.pop_front().map(attempt));
        }
    }

    async fn open_via(&self, route: &Route, open: &Open) -> Result<Opened, PeerError> {
        match (route, &self.peers) {
            (Route::Here(tunnel), _) => open_on(&tunnel.carrier, &tunnel.lines, open).await,
            (Route::There(remote), Some(peers)) => {
                // One hop at most: the other relay serves the line from its tunnels or refuses it.
                let opened = peers.open(&remote.relay, open).await?;
                self.metrics.forwarded.with_label_values(&["out"]).inc();
                Ok(opened)
            }
            (Route::There(remote), None) => Err(PeerError::Unreachable {
                relay: remote.relay.instance.clone(),
                why: "this relay has no listener for peers".to_owned(),
            }),
        }
    }

    fn classify(&self, route: &Route, cluster: &str, error: PeerError) -> Failed {
        match error {
            PeerError::Open(OpenError::Refused(refusal)) => {
                if may_use_other_route(route, refusal.code()) {
                    return Failed::Moving;
                }
                // Another relay has named the origin; what an agent sends has none that counts.
                let message = match route {
                    Route::Here(_) => {
                        origin::mark(origin::AGENT, origin::without(&refusal.message))
                    }
                    Route::There(_) => refusal.message.clone(),
                };
                Failed::Finally(with_text(refusal, message))
            }
            PeerError::Share(denied) => {
                self.metrics.limited("lines-per-user-and-carrier");
                let message = match denied {
                    Denied::Name(most) => format!(
                        "the cluster {cluster} is busy: you have {most} lines open to it, as many as one user \
                         may have on one carrier; end some, then run the command again"
                    ),
                    Denied::All(most) => format!(
                        "the carrier of the cluster {cluster} has {most} lines, and the last ones are \
                         reserved for users with few; try again in a moment"
                    ),
                };
                on_this_path(RefusalCode::Limit, message, Some(RETRY_AFTER))
            }
            PeerError::Open(OpenError::Limit) => on_this_path(
                RefusalCode::Limit,
                format!("the carrier of the cluster {cluster} is full; try again in a moment"),
                Some(RETRY_AFTER),
            ),
            // The agent dials again at once, so its successor is worth a wait.
            PeerError::Open(OpenError::CarrierLost(reason)) => {
                debug!(%reason, "a carrier ended under a new line");
                Failed::Moving
            }
            PeerError::Unreachable { .. } => {
                debug!(%error, "a line takes another route");
                Failed::Moving
            }
            PeerError::Open(OpenError::Timeout(_)) => on_this_path(
                RefusalCode::Timeout,
                format!("the agent of the cluster {cluster} does not answer"),
                None,
            ),
            PeerError::Open(error) => {
                debug!(%error, "an agent did not answer as it should");
                on_this_path(
                    RefusalCode::Internal,
                    format!(
                        "the agent of the cluster {cluster} broke the protocol; update the older of agent \
                         and relay"
                    ),
                    None,
                )
            }
        }
    }
}

fn on_this_path(code: RefusalCode, message: String, retry_after: Option<Duration>) -> Failed {
    let refusal = Refusal::new(code, message);
    Failed::OnThisPath(match retry_after {
        Some(after) => refusal.retry_after(after),
        None => refusal,
    })
}

/// Whether a refusal is about the route, not about the line.
fn may_use_other_route(route: &Route, code: RefusalCode) -> bool {
    match route {
        Route::Here(_) => code == RefusalCode::Draining,
        // Its agent may have left since the registry was updated.
        Route::There(_) => matches!(
            code,
            RefusalCode::Draining | RefusalCode::Offline | RefusalCode::Timeout
        ),
    }
}
