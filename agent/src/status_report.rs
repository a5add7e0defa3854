//! What the agent tells the relay of its cluster, for `throwline clusters`.

use std::sync::Arc;
use std::time::Duration;

use throwline_tunnel::proto::messages::AgentStatus;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::agent::Agent;
use crate::said::Said;
use crate::upstream::rights;

/// Longest text that is sent along; the control message is capped at 4 KiB.
const MESSAGE_MAX: usize = 512;

/// Asks the API server for its version now and then; the channel changes only when the answer does.
pub(crate) async fn watch(agent: Arc<Agent>, every: Duration, report: watch::Sender<AgentStatus>) {
    let mut said = Said::default();
    let mut missing: Option<Vec<String>> = None;
    loop {
        let upstream = agent.gateway.upstream();
        let now = match rights::version(upstream).await {
            Ok(version) => {
                if missing.is_none() {
                    missing = rights::missing(upstream).await.ok();
                    if let Some(missing) = missing.as_ref().filter(|missing| !missing.is_empty()) {
                        rights::warn(missing);
                    }
                }
                if said.recovered() {
                    tracing::info!(version, "the API server answers again");
                }
                let lacks = missing.as_ref().filter(|missing| !missing.is_empty());
                let message = lacks
                    .map(|missing| format!("the agent may not impersonate {}", missing.join(", ")));
                status(version, true, message.unwrap_or_default())
            }
            Err(error) => {
                if let Some(silent) = said.say("api-server", Instant::now()) {
                    tracing::warn!(%error, silent, "the API server does not answer the agent");
                }
                status(
                    report.borrow().kubernetes_version.clone(),
                    false,
                    error.to_string(),
                )
            }
        };
        let reachable = now.api_server_reachable;
        report.send_if_modified(|last| {
            let changed = *last != now;
            *last = now;
            changed
        });
        tokio::time::sleep(if reachable { every } else { every / 6 }).await;
    }
}

fn status(
    kubernetes_version: String,
    api_server_reachable: bool,
    mut message: String,
) -> AgentStatus {
    if message.len() > MESSAGE_MAX {
        let cut = (0..=MESSAGE_MAX)
            .rev()
            .find(|at| message.is_char_boundary(*at));
        message.truncate(cut.unwrap_or(0));
    }
    AgentStatus {
        kubernetes_version,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        api_server_reachable,
        message,
    }
}
