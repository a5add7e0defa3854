//! The state of the cluster, which the agent reports to its relays for `throwline clusters`.

use std::sync::Arc;
use std::time::Duration;

use throwline_ops::{LogThrottle, ReadinessGuard};
use throwline_tunnel::proto::messages::{AgentStatus, Impersonation};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::request::{ApiServer, ProbeReason};
use crate::upstream::impersonation::Rights;
use crate::upstream::{Error, api, self_access_review};

/// Longest text that is sent; the control message is capped at 4 KiB.
const MESSAGE_MAX: usize = 512;
/// Rights that are in order are read again after so many rounds.
const RIGHTS_EVERY: u32 = 5;

/// Requests the API server's version at an interval, and whether the agent may act for users; the channel
/// changes only when the answer does. `readiness` holds while the API server answers.
pub(crate) async fn watch(
    api_server: Arc<ApiServer>,
    needs_extra: bool,
    every: Duration,
    report: watch::Sender<AgentStatus>,
    readiness: ReadinessGuard,
) {
    let mut throttle = LogThrottle::default();
    let mut known: Option<Rights> = None;
    let mut version_before = String::new();
    for round in 0_u32.. {
        let now = match api::version(api_server.upstream()).await {
            Ok(version) => {
                if version != version_before {
                    // The rights that it supports may have changed, too.
                    known = None;
                }
                let is_well = known.as_ref().is_some_and(|known| {
                    known.missing.is_empty() && known.how != Impersonation::Both
                });
                if !is_well || round.is_multiple_of(RIGHTS_EVERY) {
                    known = read_rights(&api_server, needs_extra, known).await;
                }
                if throttle.recovered() {
                    tracing::info!(version, "the API server answers again");
                }
                readiness.ready();
                version_before.clone_from(&version);
                status(version, known.as_ref())
            }
            Err(error) => {
                if let Some(silent) = throttle.admit("api-server", Instant::now()) {
                    tracing::warn!(%error, silent, "the API server does not answer the agent");
                }
                readiness.not_ready(error.to_string());
                unreachable(version_before.clone(), known.as_ref(), &error)
            }
        };
        let reachable = now.api_server_reachable;
        report.send_if_modified(|last| {
            let changed = *last != now;
            *last = now;
            changed
        });
        tokio::select! {
            () = tokio::time::sleep(if reachable { every } else { every / 6 }) => {}
            reason = api_server.probe_triggered() => if reason == ProbeReason::Rights {
                known = None;
            },
        }
    }
}

/// The rights of now, or the last known ones; a change is logged.
async fn read_rights(
    api_server: &ApiServer,
    needs_extra: bool,
    before: Option<Rights>,
) -> Option<Rights> {
    let upstream = api_server.upstream();
    match self_access_review::rights(upstream, needs_extra, before.as_ref()).await {
        Ok(now) => {
            if before.as_ref() != Some(&now) {
                now.log();
            }
            Some(now)
        }
        Err(error) => {
            tracing::debug!(%error, "the agent's rights cannot be read");
            before
        }
    }
}

fn status(kubernetes_version: String, rights: Option<&Rights>) -> AgentStatus {
    AgentStatus {
        kubernetes_version,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        api_server_reachable: true,
        message: cut(rights.map(Rights::message).unwrap_or_default()),
        impersonation: rights
            .map_or(Impersonation::Unspecified, |rights| rights.how)
            .into(),
    }
}

fn unreachable(version: String, rights: Option<&Rights>, error: &Error) -> AgentStatus {
    AgentStatus {
        api_server_reachable: false,
        message: cut(error.to_string()),
        ..status(version, rights)
    }
}

fn cut(mut message: String) -> String {
    if message.len() > MESSAGE_MAX {
        let cut = (0..=MESSAGE_MAX)
            .rev()
            .find(|at| message.is_char_boundary(*at));
        message.truncate(cut.unwrap_or(0));
    }
    message
}
