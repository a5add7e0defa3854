//! Idle agents at a relay of ours.

use std::time::Duration;

use throwline_e2e::Relay;
use throwline_e2e::simulated::{Enrolled, Simulated};

use super::Site;

/// Agents that dial at once: fewer than a relay shakes hands with in a second. Few, as memory of handshakes
/// that were made at once is not all given back.
const BATCH: usize = 50;
/// How long they may take to connect.
const PATIENCE: Duration = Duration::from_secs(120);

/// A relay, and agents of this process with a carrier each.
pub(crate) struct SimulatedAgents {
    simulated: Simulated,
    enrolled: Enrolled,
    relay: Relay,
}

impl SimulatedAgents {
    /// The relay alone; the identities of `most` agents are issued.
    pub(super) async fn start(site: &Site, most: usize) -> anyhow::Result<Self> {
        let relay = Relay::start(&site.room("throwline-idle")?, &[]).await?;
        let enrolled = Enrolled::at(&relay, None, most).await?;
        Ok(Self {
            simulated: Simulated::new()?,
            enrolled,
            relay,
        })
    }

    pub(super) async fn connect(&mut self, count: usize) -> anyhow::Result<()> {
        let some = self.enrolled.split_off(count);
        connect(&mut self.simulated, some, &self.relay.public_url).await
    }

    pub(super) fn server(&self) -> u32 {
        self.relay.process.pid()
    }
}

/// In batches, so that a relay's limits delay none of them.
pub(crate) async fn connect(
    simulated: &mut Simulated,
    mut enrolled: Enrolled,
    public: &str,
) -> anyhow::Result<()> {
    while !enrolled.is_empty() {
        simulated.dial(enrolled.split_off(BATCH), public)?;
        simulated.all_connected(PATIENCE).await?;
    }
    Ok(())
}
