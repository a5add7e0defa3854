//! Carriers to the other relays of a set, over which lines go to agents that are connected there.
//!
//! One carrier is kept for each relay and class of traffic that was needed, made by the first line that
//! needs it (`throwline-uplink`, a pool of one for each). It is mutual TLS between relay identities, and on it
//! the same proof as every carrier's.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use throwline_certs::tls::{RelayIdentity, peer_client};
use throwline_ops::network::Changes;
use throwline_ops::{Denied, Share, Shares, Shutdown, ShutdownTrigger};
use throwline_tunnel::carrier::{
    self, Carrier, Connection, DialConfig, DialError, IncomingStream, OpenError, dial,
};
use throwline_tunnel::mux;
use throwline_tunnel::proto::backoff;
use throwline_tunnel::proto::close::CloseReason;
use throwline_tunnel::proto::messages::{Open, Refusal, RefusalCode, Role, StreamReply};
use throwline_tunnel::proto::traffic::TrafficClass;
use throwline_uplink::{
    Carriers, Config as UplinkConfig, Demand, Environment, FirstRetry, Metrics as UplinkMetrics,
    Pool, UplinkHandler, prover,
};
use tokio::sync::watch;
use tracing::info;
use url::Url;

use crate::config::Config;
use crate::metrics::Metrics;
use crate::registry::PeerRelay;

/// TCP, TLS and upgrade to a peer, each: relays are near each other, and a line has 10 s in all.
const CONNECT: Duration = Duration::from_secs(2);
/// How long a relay that could not be reached is not tried again.
const AVOIDED: Duration = Duration::from_secs(3);
/// How long a carrier without streams is kept.
const IDLE: Duration = Duration::from_secs(300);
/// After how long a carrier is replaced that is still used: the peer ends it with the certificate, long
/// before.
const NEVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The other relays, seen from this one.
pub(crate) struct Peers {
    peers: Mutex<HashMap<(PeerRelay, TrafficClass), Arc<Peer>>>,
    dialer: Arc<Dialer>,
}

/// What each dial needs.
struct Dialer {
    identity: Arc<RelayIdentity>,
    config: Config,
    metrics: Metrics,
}

/// One other relay, for one class of traffic. Dropping it ends its carrier.
struct Peer {
    link: Arc<Link>,
    _pool: Pool,
    _stop: ShutdownTrigger,
}

/// The way to one relay.
struct Link {
    relay: PeerRelay,
    class: TrafficClass,
    dialer: Arc<Dialer>,
    state: watch::Sender<State>,
    /// Lines that wait for a carrier.
    demand: Demand,
}

#[derive(Clone)]
enum State {
    /// A carrier is dialled when a line needs one.
    Idle,
    Up {
        carrier: Carrier,
        lines: Shares,
    },
    /// It could not be reached, and is not tried again yet.
    Avoided {
        why: String,
    },
}

/// Why a line did not get to a peer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("the relay {relay} cannot be reached: {why}")]
    Unreachable { relay: String, why: String },
    /// The carrier to the agent or to the other relay has no stream left for this user.
    #[error(transparent)]
    Share(#[from] Denied),
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A line's stream towards the agent, and the user's share of the carrier that it is on.
pub(crate) struct Opened {
    pub(crate) stream: mux::Stream,
    pub(crate) reply: StreamReply,
    pub(crate) share: Share,
}

impl Peers {
    pub(crate) fn new(identity: Arc<RelayIdentity>, config: Config, metrics: Metrics) -> Self {
        Self {
            peers: Mutex::default(),
            dialer: Arc::new(Dialer {
                identity,
                config,
                metrics,
            }),
        }
    }

    /// Opens a stream for a line at another relay, which has the agent.
    pub(crate) async fn open(&self, relay: &PeerRelay, told: &Open) -> Result<Opened, PeerError> {
        let peer = self.peer(relay, TrafficClass::of(told.bulk));
        let (carrier, lines) = peer.link.carrier().await?;
        match open_on(&carrier, &lines, told).await {
            // It may have been closed as unused at this very moment.
            Err(PeerError::Open(OpenError::CarrierLost(_))) => {
                let (carrier, lines) = peer.link.carrier().await?;
                open_on(&carrier, &lines, told).await
            }
            opened => opened,
        }
    }

    fn peer(&self, relay: &PeerRelay, class: TrafficClass) -> Arc<Peer> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (relay.clone(), class);
        if !peers.contains_key(&key) {
            // Relays come and go under new names. A count of one: no line is about to use it.
            peers.retain(|_, peer| Arc::strong_count(peer) > 1 || !peer.link.is_idle());
        }
        let start = || Arc::new(Peer::start(relay.clone(), class, self.dialer.clone()));
        Arc::clone(peers.entry(key).or_insert_with(start))
    }
}

impl Peer {
    fn start(relay: PeerRelay, class: TrafficClass, dialer: Arc<Dialer>) -> Self {
        let link = Arc::new(Link {
            relay,
            class,
            dialer,
            state: watch::Sender::new(State::Idle),
            demand: Demand::default(),
        });
        let config = UplinkConfig {
            count: 1,
            backoff: backoff::Config {
                min: AVOIDED,
                max: AVOIDED,
                max_asked: AVOIDED,
                ..backoff::Config::default()
            },
            // The next line dials at once.
            first_retry: Some(FirstRetry {
                within: Duration::ZERO,
                settled: Duration::ZERO,
            }),
            rotate: NEVER,
            quiet: true,
            control: false,
            ..UplinkConfig::default()
        };
        let (stop, shutdown) = Shutdown::new();
        let environment = Environment {
            shutdown,
            ready: None,
            // A relay's network does not change under it.
            network: Changes::never(),
            metrics: UplinkMetrics::new("relay_peer").expect("the name is of letters"),
        };
        Self {
            _pool: Pool::start(link.clone(), Carriers::new(), config, environment),
            _stop: stop,
            link,
        }
    }
}

impl Link {
    /// The carrier that there is, or else one that is dialled now, for all lines that wait.
    async fn carrier(&self) -> Result<(Carrier, Shares), PeerError> {
        let mut state = self.state.subscribe();
        let _waiting = self.demand.wait();
        let settled = state.wait_for(|state| match state {
            State::Idle => false,
            State::Up { carrier, .. } => !carrier.is_closed(),
            State::Avoided { .. } => true,
        });
        // `self` keeps the channel open.
        let settled = settled.await.map(|state| state.clone());
        match settled {
            Ok(State::Up { carrier, lines }) => Ok((carrier, lines)),
            Ok(State::Avoided { why }) => Err(self.unreachable(why)),
            Ok(State::Idle) | Err(_) => Err(self.unreachable("there is no carrier".to_owned())),
        }
    }

    fn unreachable(&self, why: String) -> PeerError {
        PeerError::Unreachable {
            relay: self.relay.instance.clone(),
            why,
        }
    }

    fn is_idle(&self) -> bool {
        match &*self.state.borrow() {
            State::Idle => true,
            State::Up { carrier, .. } => carrier.is_closed(),
            State::Avoided { .. } => false,
        }
    }
}

impl UplinkHandler for Link {
    type Error = DialError;

    async fn dial(&self, _avoid: Vec<String>) -> Result<Connection, DialError> {
        let own = |error: throwline_certs::Error| DialError::Prover(error.into());
        let Dialer {
            identity, config, ..
        } = &*self.dialer;
        let url = audience(&self.relay.address).ok_or_else(|| DialError::BadUrl {
            url: self.relay.address.clone(),
            why: "a peer's address is HOST:PORT",
        })?;
        let tls = peer_client(identity, &self.relay.instance).map_err(own)?;
        let prover = Arc::new(prover(&identity.current()));
        let instance = config.instance.clone();
        let mut dialling = DialConfig::new(url, Some(tls), prover, Role::Relay, instance);
        dialling.timing = carrier::Timing {
            connect: CONNECT,
            handshake: CONNECT,
            ..config.timing.carrier.clone()
        };
        dialling.ws = config.ws.clone();
        dialling.mux = config.mux.clone();
        dialling.class = self.class;
        dial(&dialling).await
    }

    fn accept(&self, stream: IncomingStream, _retiring: &Shutdown) {
        tokio::spawn(stream.refuse(Refusal::new(
            RefusalCode::Unsupported,
            "lines go over the carrier that their own relay has dialled",
        )));
    }

    fn failed(&self, error: &DialError) {
        self.dialer.metrics.peer_failures.inc();
        let (relay, why) = (&self.relay, error.to_string());
        info!(peer = %relay.instance, address = %relay.address, why, "cannot connect to a peer");
        self.state.send_replace(State::Avoided { why });
    }

    fn connected(&self, carrier: &Carrier, _epoch: u64) {
        let relay = &self.relay;
        info!(peer = %relay.instance, address = %relay.address, "connected to a peer");
        self.state.send_replace(State::Up {
            carrier: carrier.clone(),
            lines: self.dialer.config.lines_of_a_carrier(),
        });
    }

    fn disconnected(&self, _reason: Option<&CloseReason>) {
        self.state.send_replace(State::Idle);
    }

    async fn needed(&self) {
        // The time in which it was avoided is over.
        self.state.send_replace(State::Idle);
        self.demand.arises().await;
    }

    async fn unused(&self, carrier: &Carrier) {
        carrier.idle_for(0, IDLE).await;
    }
}

/// Opens a line's stream on a carrier, if the user's share of the carrier allows it.
pub(crate) async fn open_on(
    carrier: &Carrier,
    lines: &Shares,
    told: &Open,
) -> Result<Opened, PeerError> {
    let share = lines.take(&told.user)?;
    let (stream, reply) = carrier.open(told.clone().into()).await?;
    Ok(Opened {
        stream,
        reply,
        share,
    })
}

/// What a peer's carrier is asked for, and so the audience of its assertion.
pub(crate) fn audience(address: &str) -> Option<Url> {
    let url = Url::parse(&format!("https://{address}")).ok()?;
    let plain = url.path() == "/" && url.username().is_empty() && url.password().is_none();
    (plain && url.query().is_none() && url.fragment().is_none()).then_some(url)
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
