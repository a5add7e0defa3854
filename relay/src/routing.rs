//! Where a line goes: its request, the routes to the agent, and the two streams that are spliced.
//!
//! ```text
//! Router ─ request (whose line, to which cluster)
//!    └──── connect ─┬ select ─ registry, directory
//!                   └ peers (lines to agents at other relays)
//! ```

mod connect;
pub(crate) mod peers;
mod request;
mod select;

use std::sync::Arc;
use std::time::Duration;

use throwline_certs::{Directory, Kind};
use throwline_ops::{DrainGuard, GaugeGuard, Share};
use throwline_policy::{Denial, DenyCode};
use throwline_tunnel::carrier::IncomingStream;
use throwline_tunnel::mux;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, StreamReply};
use throwline_tunnel::splice::{self, splice};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::lifecycle::Lifecycle;
use crate::limits::lines::{LineLimitReached, LineLimits, LinePermit};
use crate::live::{EndReason, LiveRegistry};
use crate::metrics::Metrics;
use crate::peer::Peer;
use crate::policy::{LinePermission, Policy};
use crate::refusals::refuse;
use peers::Opened;
use request::OpenRequest;

pub(crate) use connect::Connector;
pub(crate) use select::{RouteSelector, unix_ms};

/// When to try again on a relay that drains: the proxy should have moved by then.
const DRAIN_WAIT: Duration = Duration::from_secs(1);

/// Opens lines and carries them.
pub(crate) struct Router {
    pub(crate) connector: Connector,
    pub(crate) directory: Arc<dyn Directory>,
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) limits: LineLimits,
    pub(crate) live: Arc<LiveRegistry>,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) metrics: Metrics,
    /// With the budget of all lines; each line adds those of its user and its cluster.
    pub(crate) splice: splice::Config,
}

/// The half of a line that leads to the agent, with everything that is counted for the line.
struct Upstream {
    /// `None` for a line from another relay, which has the permission.
    permission: Option<LinePermission>,
    stream: mux::Stream,
    reply: StreamReply,
    permit: LinePermit,
    _of_carrier: Share,
    _held: GaugeGuard,
    _kept_while_draining: DrainGuard,
    /// A line that does not outlive its stream.
    _ends_with_relay: Option<DrainGuard>,
}

impl Router {
    /// Serves one line, from its request to its end.
    pub(crate) async fn serve(&self, peer: &Peer, stream: IncomingStream, wanted: &Open) {
        let started = Instant::now();
        // The user's stream is accepted only when the agent has answered: a refusal has its place
        // in the reply.
        let upstream = match self.open(peer, wanted).await {
            Ok(upstream) => upstream,
            Err(refusal) => return refuse(&self.metrics, stream, refusal).await,
        };
        self.metrics.opened(started.elapsed());
        let reply = StreamReply {
            refusal: None,
            agent_instance: upstream.reply.agent_instance.clone(),
            detached_ms: upstream.reply.detached_ms,
        };
        let downstream = match stream.accept(reply).await {
            Ok(stream) => stream,
            Err(error) => {
                debug!(%error, "a user left before the line was open");
                return;
            }
        };
        let cluster = wanted.cluster.as_str();
        let entry = match self.live.enter_line(&peer.identity, cluster) {
            Ok(entry) => entry,
            // Revoked before the agent has answered: both streams end here.
            Err(reason) => return self.metrics.line_ended(reason),
        };
        let ending = entry.ending();
        debug!(%cluster, "a line is open");
        let mut config = self.splice.clone();
        config.budgets.extend(upstream.permit.budgets());
        let meter = self.metrics.meter();
        let reason = tokio::select! {
            outcome = splice(downstream, upstream.stream, &config, &meter) => {
                return debug!(%cluster, ?outcome, "a line has ended");
            }
            reason = ending.ended() => reason,
            denial = self.permission_ended(upstream.permission) => {
                info!(user = %peer.identity.id, %cluster, reason = %denial, "a line's permission has ended");
                entry.end(EndReason::PermissionEnded);
                // A revocation may have come first.
                ending.reason().unwrap_or(EndReason::PermissionEnded)
            }
        };
        // Both streams are reset. The local proxy then tries to resume the line, and receives the reason
        // as a refusal: text cannot be inserted into a stream of sealed bytes.
        debug!(%cluster, ?reason, "a line was ended");
        self.metrics.line_ended(reason);
    }

    async fn permission_ended(&self, permission: Option<LinePermission>) -> Denial {
        match permission {
            Some(permission) => permission.ended(|| self.directory.now()).await,
            None => std::future::pending().await,
        }
    }

    async fn open(&self, peer: &Peer, wanted: &Open) -> Result<Upstream, Refusal> {
        request::check(wanted)?;
        let (request, permission) = match peer.identity.id.kind() {
            Kind::User => {
                let permission = self.permission_of_user(peer, &wanted.cluster).await?;
                (OpenRequest::from_user(peer, wanted), Some(permission))
            }
            Kind::Relay => (self.request_of_relay(peer, wanted)?, None),
            Kind::Cluster => {
                return Err(Refusal::new(
                    RefusalCode::NotAllowed,
                    "only users open lines",
                ));
            }
        };
        // Before the agent is asked, so that a user over the limit costs no cluster anything.
        let permit = self.limits.take(&request.open.user, request.cluster());
        let permit = permit.map_err(|reached| self.limit_reached(reached, request.cluster()))?;
        // Before the wait for the agent: a drain that begins meanwhile has to count this line.
        let kept_while_draining = self.lifecycle.lines.guard();
        let Opened {
            stream,
            reply,
            share,
        } = self.connector.connect(&request).await?;
        // Both ends must agree to a resumption, and this is only what they announce. An end that
        // announces something else is waited for without need, or not waited for.
        let is_resumable = request.open.detached_ms > 0 && reply.detached_ms > 0;
        let ends_with_relay = (!is_resumable).then(|| self.lifecycle.lines_to_wait_for.guard());
        Ok(Upstream {
            permission,
            stream,
            reply,
            permit,
            _of_carrier: share,
            _held: self.metrics.line(),
            _kept_while_draining: kept_while_draining,
            _ends_with_relay: ends_with_relay,
        })
    }

    async fn permission_of_user(
        &self,
        peer: &Peer,
        cluster: &str,
    ) -> Result<LinePermission, Refusal> {
        if self.lifecycle.draining.is_cancelled() {
            return Err(Refusal::new(RefusalCode::Draining, "the relay is stopping")
                .retry_after(DRAIN_WAIT));
        }
        let policy = Arc::clone(&self.policy);
        let now = self.directory.now();
        LinePermission::request(policy, &peer.identity, cluster, now)
            .await
            .map_err(|denial| Refusal::new(RefusalCode::NotAllowed, denial_text(&denial, cluster)))
    }

    fn request_of_relay(&self, peer: &Peer, wanted: &Open) -> Result<OpenRequest, Refusal> {
        let domain = self.directory.validator().domain();
        let request = OpenRequest::from_relay(wanted, domain).map_err(|error| {
            warn!(relay = %peer.identity.id, %error, "a relay forwarded a malformed line");
            Refusal::new(RefusalCode::BadRequest, error.to_string())
        })?;
        self.metrics.forwarded.with_label_values(&["in"]).inc();
        Ok(request)
    }

    fn limit_reached(&self, reached: LineLimitReached, cluster: &str) -> Refusal {
        self.metrics.limited(reached.limit());
        let message = match reached {
            LineLimitReached::User { limit } => {
                format!(
                    "you have {limit} lines open at this relay, as many as one user may; end some, then run the \
                     command again"
                )
            }
            LineLimitReached::Relay { limit } => {
                format!(
                    "this relay has {limit} lines, and all that you may have are in use; try again in a moment"
                )
            }
            LineLimitReached::Cluster => {
                format!(
                    "the cluster {cluster} has as many lines open as it may; try again in a moment"
                )
            }
        };
        Refusal::new(RefusalCode::Limit, message).retry_after(select::RETRY_AFTER)
    }
}

/// What was denied, and the remedy.
fn denial_text(denial: &Denial, cluster: &str) -> String {
    match denial.code {
        DenyCode::Expired => format!(
            "your permission to reach the cluster {cluster} has ended ({denial}); ask an administrator for a \
             new one, then run the command again"
        ),
        DenyCode::NotAllowed => format!("{denial}; ask an administrator for access"),
        _ => format!("you may not reach the cluster {cluster}: {denial}; ask an administrator"),
    }
}
