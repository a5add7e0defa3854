//! Idle agents at a peer's server.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, ensure};
use throwline_e2e::process::Process;
use throwline_e2e::{eventually, free_address};

use crate::proc;

/// How long one batch of agents may take to connect.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts the clients for whom a server is to open these ports.
type Dial = Box<dyn Fn(&[SocketAddr]) -> anyhow::Result<Vec<Process>> + Send + Sync>;

/// A peer's server, which opens a port for each agent.
pub(crate) struct PeerAgents {
    clients: Vec<Process>,
    server: Process,
    /// The ports that no client has asked for yet.
    doors: VecDeque<SocketAddr>,
    at_once: usize,
    dial: Dial,
}

impl PeerAgents {
    /// No agent yet. `at_once` of them dial together.
    pub(super) fn new(
        server: Process,
        doors: Vec<SocketAddr>,
        at_once: usize,
        dial: impl Fn(&[SocketAddr]) -> anyhow::Result<Vec<Process>> + Send + Sync + 'static,
    ) -> Self {
        Self {
            clients: Vec::new(),
            server,
            doors: doors.into(),
            at_once,
            dial: Box::new(dial),
        }
    }

    pub(super) async fn connect(&mut self, count: usize) -> anyhow::Result<()> {
        ensure!(
            count <= self.doors.len(),
            "the server is ready for {} more agents, not {count}",
            self.doors.len()
        );
        let doors: Vec<SocketAddr> = self.doors.drain(..count).collect();
        for batch in doors.chunks(self.at_once) {
            self.clients.extend((self.dial)(batch)?);
            self.opened(batch).await?;
        }
        Ok(())
    }

    pub(super) fn server(&self) -> u32 {
        self.server.pid()
    }

    /// A connection to the port would take the agent's idleness.
    async fn opened(&self, doors: &[SocketAddr]) -> anyhow::Result<()> {
        let opened = || async {
            self.server.check_running().await?;
            for client in &self.clients {
                client.check_running().await?;
            }
            let open = proc::listening_ports()?;
            let closed = doors.iter().filter(|door| !open.contains(&door.port()));
            let missing = closed.count();
            ensure!(missing == 0, "{missing} of {} agents", doors.len());
            Ok(())
        };
        eventually(PATIENCE, "the server has opened a port an agent", opened)
            .await
            .with_context(|| self.server.log())
    }
}

/// Distinct loopback addresses without a listener.
pub(super) fn free_addresses(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    (0..count).map(|_| free_address()).collect()
}
