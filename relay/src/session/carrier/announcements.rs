//! What the relay announces on a control stream: relays, revocations, its own end.

use throwline_tunnel::proto::messages::{ControlKind, Drain, RelaySet, RevocationsVersion};
use tracing::debug;

use super::Session;

impl Session {
    /// An agent with this number above 1 keeps its carriers to different relays.
    pub(super) async fn announce_relays(&mut self) {
        let relays = *self.sessions.relays.borrow();
        let (Some(_), Some(control)) = (&self.tunnel, &mut self.control) else {
            return;
        };
        if relays == 0 || relays == self.announced_relays {
            return;
        }
        self.announced_relays = relays;
        let set = ControlKind::RelaySet(RelaySet { relays });
        if let Err(error) = control.send(&set.into()).await {
            debug!(%error, "an agent could not be told how many relays there are");
        }
    }

    /// Sends only the list's version: the peer fetches the list when it has an older one.
    pub(super) async fn announce_revocations(&mut self) {
        let version = self.sessions.directory.validator().revocations().version();
        let Some(control) = &mut self.control else {
            return;
        };
        if version == 0 {
            return;
        }
        let news = ControlKind::Revocations(RevocationsVersion { version });
        if let Err(error) = control.send(&news.into()).await {
            debug!(%error, "a peer could not be told of a revocation");
        }
    }

    pub(super) async fn ask_to_move(&mut self) {
        let Some(control) = &mut self.control else {
            return;
        };
        let spread = self.sessions.config.timing.drain_spread;
        let drain = Drain {
            delay_ms: 0,
            spread_ms: u64::try_from(spread.as_millis()).unwrap_or(u64::MAX),
            reason: "the relay is stopping".into(),
        };
        if let Err(error) = control.send(&ControlKind::Drain(drain).into()).await {
            debug!(%error, "a peer could not be told to move");
        }
    }
}
