//! Carriers to the other relays of a set, over which lines go to agents that are connected there.
//!
//! One carrier is kept for each relay that was needed, made by the first line that needs it. It is
//! mutual TLS between relay identities, and on it the same proof as every carrier's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::ServerConfig;
use throwline_certs::tls::{RelayIdentity, peer_client, peer_server};
use throwline_certs::{Identity, jws, sha256};
use throwline_tunnel::carrier::{
    self, Carrier, DialConfig, DialError, Incoming, OpenError, Prover, dial,
};
use throwline_tunnel::mux;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, Role, StreamReply};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info};
use url::Url;

use crate::accept::Gate;
use crate::config::Config;
use crate::error::Error;
use crate::metrics::Metrics;
use crate::registry::PeerRelay;

/// TCP, TLS and upgrade to a peer, each: relays are near each other, and a line has 10 s in all.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a relay that could not be reached is not tried again.
const AVOIDED: Duration = Duration::from_secs(3);
/// How long a carrier without streams is kept.
const IDLE: Duration = Duration::from_secs(300);
/// How often it is looked at.
const LOOK: Duration = Duration::from_secs(15);

/// The other relays, seen from this one.
pub(crate) struct Peers {
    identity: Arc<RelayIdentity>,
    pub(crate) gate: Gate,
    pub(crate) tls: Arc<ServerConfig>,
    links: Mutex<HashMap<PeerRelay, Arc<tokio::sync::Mutex<Link>>>>,
    config: Config,
    metrics: Metrics,
}

/// What is known of the way to one relay.
#[derive(Default)]
struct Link {
    up: Option<Up>,
    failed: Option<(Instant, String)>,
}

struct Up {
    carrier: Carrier,
    _kept: AbortOnDropHandle<()>,
}

/// Why a line did not get to a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("the relay {relay} cannot be reached: {why}")]
    Unreachable { relay: String, why: String },
    #[error(transparent)]
    Open(#[from] OpenError),
}

impl Peers {
    /// `address` is what the registry tells the others. `gate` has it as its audience.
    pub(crate) fn new(
        identity: Arc<RelayIdentity>,
        gate: Gate,
        config: Config,
        metrics: Metrics,
    ) -> Result<Self, Error> {
        let tls = peer_server(Arc::clone(&identity)).map_err(Error::Tls)?;
        Ok(Self {
            identity,
            gate: gate.for_peers(),
            tls,
            links: Mutex::default(),
            config,
            metrics,
        })
    }

    /// Opens a stream for a line at another relay, which has the agent.
    pub(crate) async fn open(
        &self,
        relay: &PeerRelay,
        told: &Open,
    ) -> Result<(mux::Stream, StreamReply), PeerError> {
        let carrier = self.carrier(relay).await?;
        let opened = match carrier.open(told.clone().into()).await {
            // It may have been let go as idle at this very moment.
            Err(OpenError::CarrierLost(_)) => {
                let carrier = self.carrier(relay).await?;
                carrier.open(told.clone().into()).await
            }
            opened => opened,
        };
        Ok(opened?)
    }

    async fn carrier(&self, relay: &PeerRelay) -> Result<Carrier, PeerError> {
        let link = self.link(relay);
        // Whoever comes second waits for the first one's dial.
        let mut link = link.lock().await;
        if let Some(up) = &link.up
            && !up.carrier.is_closed()
        {
            return Ok(up.carrier.clone());
        }
        link.up = None;
        let unreachable = |why: String| PeerError::Unreachable {
            relay: relay.instance.clone(),
            why,
        };
        if let Some((at, why)) = &link.failed
            && at.elapsed() < AVOIDED
        {
            return Err(unreachable(why.clone()));
        }
        match self.dial(relay).await {
            Ok(up) => {
                info!(peer = %relay.instance, address = %relay.address, "connected to a peer");
                let carrier = up.carrier.clone();
                *link = Link {
                    up: Some(up),
                    failed: None,
                };
                Ok(carrier)
            }
            Err(error) => {
                self.metrics.peer_failures.inc();
                let why = error.to_string();
                info!(peer = %relay.instance, address = %relay.address, why, "cannot connect to a peer");
                link.failed = Some((Instant::now(), why.clone()));
                Err(unreachable(why))
            }
        }
    }

    fn link(&self, relay: &PeerRelay) -> Arc<tokio::sync::Mutex<Link>> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        if !links.contains_key(relay) {
            // Relays come and go under new names.
            links.retain(|_, link| match link.try_lock() {
                Ok(link) => {
                    let is_up = link.up.as_ref().is_some_and(|up| !up.carrier.is_closed());
                    let is_avoided = |(at, _): &(Instant, String)| at.elapsed() < AVOIDED;
                    is_up || link.failed.as_ref().is_some_and(is_avoided)
                }
                Err(_) => true,
            });
        }
        Arc::clone(links.entry(relay.clone()).or_default())
    }

    async fn dial(&self, relay: &PeerRelay) -> Result<Up, DialError> {
        let own = |error: throwline_certs::Error| DialError::Prover(error.into());
        let url = audience(&relay.address).ok_or_else(|| DialError::BadUrl {
            url: relay.address.clone(),
            why: "a peer's address is HOST:PORT",
        })?;
        let tls = peer_client(&self.identity, &relay.instance).map_err(own)?;
        let mut dialling = DialConfig::new(
            url,
            Some(tls),
            Arc::new(prover(self.identity.current())),
            Role::Relay,
            self.config.instance.clone(),
        );
        dialling.timing = carrier::Timing {
            connect: CONNECT,
            handshake: CONNECT,
            ..self.config.timing.carrier.clone()
        };
        dialling.ws = self.config.ws.clone();
        dialling.mux = self.config.mux.clone();
        let connection = Box::pin(dial(&dialling)).await?;
        let carrier = connection.carrier;
        let kept = tokio::spawn(keep(carrier.clone(), connection.incoming));
        Ok(Up {
            carrier,
            _kept: AbortOnDropHandle::new(kept),
        })
    }
}

/// Lets a carrier go that nobody uses. The far end has nothing to open on it.
async fn keep(carrier: Carrier, mut incoming: Incoming) {
    let mut used = Instant::now();
    loop {
        tokio::select! {
            stream = incoming.next() => match stream {
                Some(stream) => {
                    let refused = Refusal::new(
                        RefusalCode::Unsupported,
                        "lines go over the carrier that their own relay has dialled",
                    );
                    stream.refuse(refused).await;
                }
                None => return debug!("a peer carrier has ended"),
            },
            () = tokio::time::sleep(LOOK) => {
                if carrier.streams() > 0 {
                    used = Instant::now();
                } else if used.elapsed() >= IDLE {
                    return carrier.close(CloseCode::Normal, "not used");
                }
            }
        }
    }
}

/// What a peer's carrier is asked for, and so the audience of its assertion.
pub(crate) fn audience(address: &str) -> Option<Url> {
    let url = Url::parse(&format!("https://{address}")).ok()?;
    let plain = url.path() == "/" && url.username().is_empty() && url.password().is_none();
    (plain && url.query().is_none() && url.fragment().is_none()).then_some(url)
}

fn prover(identity: Identity) -> Prover {
    let (asserting, signing) = (identity.clone(), identity.clone());
    Prover {
        assertion: Box::new(move |claims| Ok(jws::sign(&asserting, claims)?)),
        sign: Box::new(move |message| Ok(signing.sign(message)?)),
        sha256,
        id: identity.id().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_address_is_a_host_and_a_port() {
        assert!(audience("192.0.2.1:8444").is_some());
        assert!(audience("[2001:db8::1]:8444").is_some());
        assert!(audience("relay-0.relays:8444").is_some());
        for crafted in [
            "",
            "a/b",
            "user@host:1",
            "host:1?x",
            "host:99999",
            "host:1#x",
        ] {
            assert!(audience(crafted).is_none(), "{crafted}");
        }
    }
}
