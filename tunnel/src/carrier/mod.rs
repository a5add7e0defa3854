//! The carrier: one WebSocket between a relay and whoever dialled it, proven and multiplexed.
//!
//! One task drives a carrier ([`driver`]); streams are polled by whoever holds them. When the
//! driver fails or panics, this carrier and its streams end and nothing else does.

mod accept;
mod connect;
mod dial;
mod driver;
mod error;
mod handle;
mod patience;
mod proxy;
mod socket;
mod upgrade;

use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::proto::assertion::Claims;
use crate::proto::messages::{Challenge, Role, Welcome};
use crate::{mux, ws};

pub use accept::{AcceptConfig, accept};
pub use dial::{dial, dial_over};
pub use error::{AcceptError, DialError, OpenError};
pub use handle::{Carrier, Incoming, IncomingStream};
pub use proxy::{BadProxy, Proxies, ProxyFault, reach};

/// What this build is called by default.
const SOFTWARE: &str = concat!("throwline/", env!("CARGO_PKG_VERSION"));

pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A live carrier, as both ends get it.
#[derive(Debug)]
pub struct Connection {
    pub carrier: Carrier,
    pub incoming: Incoming,
    /// What the relay granted. On the accepting side: what was sent.
    pub welcome: Welcome,
    /// The relay that has accepted. On the accepting side: ourselves.
    pub relay: RelayName,
}

/// What a relay says of itself before it is shown who dials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayName {
    /// Its own among the relays of its set; at most [`RelayName::MAX`] bytes, of letters, digits,
    /// `-`, `.` and `_`. Empty where it says none, or one that is none.
    pub instance: String,
    /// Relays of the set that take lines, itself among them; 0: it does not say.
    pub relays: u32,
}

impl RelayName {
    /// As many as a DNS label has; a relay's certificate allows no more.
    pub const MAX: usize = 63;

    pub(crate) fn of(challenge: &Challenge) -> Self {
        let instance = &challenge.relay_instance;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        let is_name = instance.len() <= Self::MAX && instance.bytes().all(plain);
        Self {
            instance: if is_name {
                instance.clone()
            } else {
                String::new()
            },
            relays: challenge.relays,
        }
    }
}

/// The clocks of a carrier.
#[derive(Clone, Debug)]
pub struct Timing {
    /// Mean time between pings. Default 18 s: below the 30–60 s after which common load balancers
    /// drop an idle connection. The relay's Welcome may lower the dialer's. Cost: about 100 bytes
    /// on the wire each.
    pub ping_interval: Duration,
    /// Each interval is drawn from ± this share. Default 0.2.
    pub ping_jitter: f64,
    /// Without one inbound byte for this long the carrier is dead. Default 50 s, which three lost
    /// pings fit into.
    pub dead_after: Duration,
    /// With bytes to send, and none accepted by the network for this long, the carrier is dead.
    /// Default 30 s.
    pub write_stall: Duration,
    /// Challenge, proof and welcome together. Default 5 s; the longest that an unproven dialer
    /// holds a connection.
    pub handshake: Duration,
    /// TCP, TLS and HTTP upgrade of a dial, each, and the same with a proxy on the way. Default
    /// 10 s.
    pub connect: Duration,
    /// From opening a stream to the acceptor's reply. Default 10 s.
    pub open: Duration,
    /// From a stream's first frame to its complete header. Default 10 s; a silent stream holds
    /// one place below `max_streams` for so long.
    pub header: Duration,
    /// For goodbyes: the close handshake of a carrier, the last bytes of a dropped stream.
    /// Default 2 s.
    pub close: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            ping_interval: Duration::from_secs(18),
            ping_jitter: 0.2,
            dead_after: Duration::from_secs(50),
            write_stall: Duration::from_secs(30),
            handshake: Duration::from_secs(5),
            connect: Duration::from_secs(10),
            open: Duration::from_secs(10),
            header: Duration::from_secs(10),
            close: Duration::from_secs(2),
        }
    }
}

/// Signs claims as a JWS with the certificate's chain.
pub type AssertFn = Box<dyn Fn(&Claims) -> Result<String, BoxError> + Send + Sync>;
/// Signs a transcript with the certificate's key.
pub type SignFn = Box<dyn Fn(&[u8]) -> Result<Vec<u8>, BoxError> + Send + Sync>;

/// How a dialer proves who it is. Keys stay behind the closures.
pub struct Prover {
    /// Makes the bearer assertion for these claims.
    pub assertion: AssertFn,
    /// Signs the challenge's transcript.
    pub sign: SignFn,
    /// SHA-256, from whoever owns the crypto.
    pub sha256: fn(&[u8]) -> [u8; 32],
    /// The SPIFFE URI of the certificate.
    pub id: String,
}

impl std::fmt::Debug for Prover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Prover")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Everything needed to dial a relay.
#[derive(Clone, Debug)]
pub struct DialConfig {
    /// `https://host[:port][/prefix]`, or `http://` for loopback hosts.
    pub relay: Url,
    /// Needed for `https`; ALPN `http/1.1` is set by the dialer if the config has none.
    pub tls: Option<Arc<rustls::ClientConfig>>,
    /// Allows `http://` to hosts that are not loopback. Default no: the assertion would cross the
    /// network in the clear.
    pub allow_plaintext: bool,
    /// Whether a proxy is on the way. Default: none is.
    pub proxies: Proxies,
    pub prover: Arc<Prover>,
    pub role: Role,
    /// Tells two processes of one identity apart.
    pub instance: String,
    /// Name and version, for people at the other end.
    pub software: String,
    /// Relays, by instance, that are not wanted: the dial ends with [`DialError::Unwanted`] before
    /// it proves anything. Where a relay says that its set has no other, it is taken all the same.
    pub avoid: Vec<String>,
    pub timing: Timing,
    pub ws: ws::Config,
    pub mux: mux::Config,
}

impl DialConfig {
    /// A config with the defaults for an edge (agent, local proxy).
    pub fn new(
        relay: Url,
        tls: Option<Arc<rustls::ClientConfig>>,
        prover: Arc<Prover>,
        role: Role,
        instance: impl Into<String>,
    ) -> Self {
        Self {
            relay,
            tls,
            allow_plaintext: false,
            proxies: Proxies::none(),
            prover,
            role,
            instance: instance.into(),
            software: SOFTWARE.to_owned(),
            avoid: Vec::new(),
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
        }
    }
}
