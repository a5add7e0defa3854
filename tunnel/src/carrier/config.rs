//! What a dialer needs to reach a relay and to authenticate itself.

use std::sync::Arc;

use url::Url;

use crate::proto::assertion::Claims;
use crate::proto::messages::Role;
use crate::proto::traffic::TrafficClass;
use crate::{mux, ws};

use super::proxy::{Proxies, SOFTWARE};
use super::{BoxError, Timing};

/// Signs claims as a JWS with the certificate's chain.
pub type AssertFn = Box<dyn Fn(&Claims) -> Result<String, BoxError> + Send + Sync>;
/// Signs a transcript with the certificate's key.
pub type SignFn = Box<dyn Fn(&[u8]) -> Result<Vec<u8>, BoxError> + Send + Sync>;

/// How a dialer authenticates itself. Keys stay behind the closures.
pub struct Prover {
    /// Makes the bearer assertion for these claims.
    pub assertion: AssertFn,
    /// Signs the challenge's transcript.
    pub sign: SignFn,
    /// SHA-256, from the caller's cryptography provider.
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
    /// Authenticates the dialer.
    pub prover: Arc<Prover>,
    /// The role that the dialer announces.
    pub role: Role,
    /// Distinguishes two processes of one identity.
    pub instance: String,
    /// Name and version, for people at the other end.
    pub software: String,
    /// Replicas share this identity, so that two processes with it are no reason to report. Default no.
    pub shares_identity: bool,
    /// The carrier is for a renewal alone, which an expired certificate may open as well: the relay
    /// accepts no other stream on it, and ends it soon. Default no.
    pub for_renewal: bool,
    /// What the carrier is for. Default: interactive.
    pub class: TrafficClass,
    /// Relays, by instance, to avoid: the dial ends with
    /// [`DialError::Unwanted`](super::DialError::Unwanted) before the dialer authenticates itself. A
    /// relay that reports that its set has no other is taken all the same.
    pub avoid: Vec<String>,
    /// Deadlines and intervals.
    pub timing: Timing,
    /// The WebSocket's limits.
    pub ws: ws::Config,
    /// The multiplexer's limits.
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
            shares_identity: false,
            for_renewal: false,
            class: TrafficClass::default(),
            avoid: Vec::new(),
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
        }
    }
}
