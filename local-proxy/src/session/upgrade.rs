//! The upgrade session: HTTP/1.1 on a separate sealed session, for exactly one request.

use std::sync::Arc;

use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use throwline_kube_wire::http1::request_line::{LongTarget, RequestLine};
use throwline_ops::GaugeGuard;
use throwline_tunnel::proto::messages::LineKind;

use crate::failure::{Cause, Failure};
use crate::session::body::UpgradeBody;
use crate::session::context::SessionContext;
use crate::session::dial::{Epoch, SessionBasis};

/// Bound on the answer's head, and on what is read ahead of a body.
const BUFFER: usize = 64 * 1024;

/// A session before its request.
pub(crate) struct UpgradeSession {
    pub(crate) sender: http1::SendRequest<UpgradeBody>,
    /// For a target that the request itself cannot hold.
    pub(crate) long: LongTarget,
    basis: SessionBasis,
    /// Counts the session as open until the answer has ended.
    pub(crate) held: GaugeGuard,
}

impl UpgradeSession {
    pub(crate) async fn open(
        context: &Arc<SessionContext>,
        cluster: &str,
    ) -> Result<Self, Failure> {
        let dialed = context.dial.dial(cluster, LineKind::Upgrade).await?;
        let basis = SessionBasis::of(&dialed);
        let (io, long) = RequestLine::new(dialed.io);
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(BUFFER)
            .handshake::<_, UpgradeBody>(TokioIo::new(io))
            .await
            .map_err(|error| Failure::Lost {
                cluster: cluster.to_owned(),
                source: Cause::Handshake(Arc::new(error)),
            })?;
        let name = cluster.to_owned();
        context.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(cluster = name, %error, "upgrade session failed");
            }
        });
        Ok(Self {
            sender,
            long,
            basis,
            held: GaugeGuard::new(&context.metrics.upgrade_sessions),
        })
    }

    pub(crate) fn is_usable(&self, now: Epoch) -> bool {
        self.basis.is_current(now) && !self.is_closed()
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.basis.is_connected()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}
