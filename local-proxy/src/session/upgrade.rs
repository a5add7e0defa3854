//! The upgrade session: HTTP/1.1 on a sealed session of its own, for exactly one request.

use super::{Epoch, Ground, Shared};
use crate::{body::Body, error::Failure, metrics::Held};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use throwline_tunnel::proto::messages::LineKind;

/// Bound on the answer's head, and on what is read ahead of a body.
const BUFFER: usize = 64 * 1024;

/// A session that has carried nothing yet.
pub(crate) struct UpgradeSession {
    pub(crate) sender: http1::SendRequest<Body>,
    ground: Ground,
    /// Counted as open until whoever holds this is done with the answer.
    pub(crate) held: Held,
}

impl UpgradeSession {
    pub(crate) async fn open(shared: &Arc<Shared>, cluster: &str) -> Result<Self, Failure> {
        let dialed = shared.dial.dial(cluster, LineKind::Upgrade).await?;
        let ground = Ground::of(&dialed);
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake::<_, Body>(TokioIo::new(dialed.io))
            .await
            .map_err(|error| Failure::Lost {
                cluster: cluster.to_owned(),
                why: error.to_string(),
            })?;
        let name = cluster.to_owned();
        shared.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(cluster = name, %error, "upgrade session failed");
            }
        });
        Ok(Self {
            sender,
            ground,
            held: Held::one(&shared.metrics.upgrade_sessions),
        })
    }

    pub(crate) fn is_usable(&self, now: Epoch) -> bool {
        self.ground.is_current(now) && !self.is_closed()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.ground.is_connected()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}
