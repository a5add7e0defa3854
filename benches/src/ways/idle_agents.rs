//! Agents that do nothing, at a server of their own: what the relay's side of a way holds for each.

use super::peer_agents::PeerAgents;
use super::simulated_agents::SimulatedAgents;
use super::{Site, rathole, ssh, throwline, wstunnel};
use crate::proc;

/// A server, and the idle agents that are connected to it. Both end when this is dropped.
pub(crate) enum IdleAgents {
    Throwline(Box<SimulatedAgents>),
    Peer(Box<PeerAgents>),
}

impl IdleAgents {
    /// The server alone, ready for at most so many agents. `None` for a way without a server, and for
    /// one whose server is another way's.
    pub(crate) async fn of(
        name: &'static str,
        site: &Site,
        most: usize,
    ) -> anyhow::Result<Option<Self>> {
        Ok(Some(match name {
            throwline::THROWLINE => {
                Self::Throwline(Box::new(SimulatedAgents::start(site, most).await?))
            }
            ssh::NAME => Self::Peer(Box::new(ssh::idle_agents(site, most)?)),
            rathole::NAME => Self::Peer(Box::new(rathole::idle_agents(site, most)?)),
            wstunnel::NAME => Self::Peer(Box::new(wstunnel::idle_agents(site, most)?)),
            _ => return Ok(None),
        }))
    }

    /// Connects so many more, and returns when all of them are connected.
    pub(crate) async fn connect(&mut self, count: usize) -> anyhow::Result<()> {
        match self {
            Self::Throwline(agents) => agents.connect(count).await,
            Self::Peer(agents) => agents.connect(count).await,
        }
    }

    /// Memory of the server and of the processes that it has started, in KiB.
    pub(crate) fn server_kib(&self) -> f64 {
        let server = match self {
            Self::Throwline(agents) => agents.server(),
            Self::Peer(agents) => agents.server(),
        };
        let family = proc::family(server).into_iter();
        family.map(proc::proportional_kib).sum()
    }
}
