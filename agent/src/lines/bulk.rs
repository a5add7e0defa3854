//! The carrier for bulk: dialled when a line of bulk arrives over another one, and kept while it is used.
//!
//! The local proxy classifies its lines (`throwline_tunnel::proto::traffic`) and names the class when it
//! resumes one. The agent cannot put a stream under a line itself: it asks the local proxy to resume the
//! line once more, and the relay then finds the carrier for bulk.

use std::time::Duration;

use throwline_tunnel::carrier::Carrier;
use throwline_tunnel::line::Handle;
use throwline_tunnel::mux;
use throwline_uplink::{CONTROL_STREAMS, Carriers, Demand};
use tokio::time::sleep;

/// How long the carrier is kept without a line.
const IDLE: Duration = Duration::from_secs(60);
/// From the carrier's arrival until lines are asked to move to it: the relays learn of it from each other.
const SETTLE: Duration = Duration::from_secs(1);

/// The agent's carrier for bulk, which it has on demand.
#[derive(Default)]
pub(crate) struct BulkCarrier {
    carriers: Carriers,
    /// Lines that wait for it.
    demand: Demand,
}

impl BulkCarrier {
    /// What the pool that dials it keeps.
    pub(crate) fn carriers(&self) -> &Carriers {
        &self.carriers
    }

    /// Ends when a line waits for the carrier.
    pub(crate) async fn needed(&self) {
        self.demand.arises().await;
    }

    /// Ends when the carrier has had no line for a while.
    pub(crate) async fn unused(&self, carrier: &Carrier) {
        carrier.idle_for(CONTROL_STREAMS, IDLE).await;
    }

    /// Asks the local proxy to resume the line when the carrier is there, if the line is still in that epoch.
    pub(crate) async fn request_move(&self, handle: &Handle<mux::Stream>, epoch: u64) {
        let arrived = async {
            let _waiting = self.demand.wait();
            self.carriers.carrier().await;
            sleep(SETTLE).await;
        };
        tokio::select! {
            () = arrived => handle.request_move(epoch),
            _ = handle.wait_until(|phase| phase.over || phase.epoch != epoch) => {}
        }
    }
}
