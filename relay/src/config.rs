//! The configuration of a relay. Each knob's text gives its unit, its default and what the worst
//! case costs.

use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use throwline_ops::Shares;
use throwline_ops::admin::DrainToken;
use throwline_tunnel::{carrier, mux, ws};
use url::Url;

/// Everything [`crate::run`] needs besides a listener and an authority.
#[derive(Debug, Clone)]
pub struct Config {
    /// The address that agents and users dial, as it stands in their tokens. It is the audience
    /// of every assertion, so two relays behind one name share it, and two names do not.
    pub public_url: Url,
    pub tls: Tls,
    /// A name for this relay in challenges and logs. Default: random.
    pub instance: String,
    /// The balancers from which the name of a client is accepted, by `X-Forwarded-For` or the
    /// PROXY protocol. Default: none. An address in here can choose what limits, logs and the
    /// audit see, and has no limit on half-open connections; so it must be a
    /// balancer's that sets what it forwards, and no client's.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether connections of `trusted_proxies` to the public listener begin with a header of
    /// the PROXY protocol, version 1 or 2. Default: no. If yes, one without is closed.
    pub proxy_protocol: bool,
    /// What `POST /drain` on the admin listener must bring. Default: none, and no `/drain`.
    pub drain_token: Option<DrainToken>,
    pub limits: Limits,
    pub timing: Timing,
    pub ws: ws::Config,
    pub mux: mux::Config,
}

impl Config {
    pub fn new(public_url: Url, tls: Tls) -> Self {
        Self {
            public_url,
            tls,
            instance: format!("relay-{:08x}", rand::random::<u32>()),
            trusted_proxies: Vec::new(),
            proxy_protocol: false,
            drain_token: None,
            limits: Limits::default(),
            timing: Timing::default(),
            ws: ws::Config::default(),
            mux: mux::Config::default(),
        }
    }
}

/// Who ends TLS on the public listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// This process, with a certificate of the authority's for the public URL's host, renewed
    /// at two thirds of its life. Peers trust it by the pin in their tokens.
    Own,
    /// This process, with a certificate of another authority; the files are read again when they
    /// change.
    Files { cert: PathBuf, key: PathBuf },
    /// A balancer in front. The listener then speaks plain HTTP and must be reachable by the
    /// balancer alone; carriers still prove themselves, but their routing could be read.
    Plaintext,
}

/// How much of each thing there may be. A refusal for one of them carries the code `limit`, is
/// counted in `throwline_relay_refusals_total`, and the peer receives a time to try again.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Carriers in all. Default 20,000: twice what the design puts on one relay. Worst case:
    /// 32 KiB each when idle, so 640 MiB.
    pub carriers: usize,
    /// Carriers of one identity. Default 32: two per agent replica, twice that while they are
    /// rotated, and a user's several machines. A thief of one key can hold this many.
    pub carriers_per_identity: usize,
    /// Lines of one user at this relay, over all clusters and machines. Default 512: a kubectl
    /// needs one for each exec, port-forward or cp, and a few for everything else. Worst case: two
    /// splice buffers of 64 KiB and two mux windows of 256 KiB each that stall, so 320 MiB.
    pub lines_per_user: usize,
    /// Lines of one user on one carrier of an agent or to another relay, which has
    /// `mux.max_streams` (1,024) for all users. Default 256. The last quarter of a carrier's
    /// streams is reserved for users with less than a sixteenth of their share.
    pub lines_per_user_and_carrier: usize,
    /// Lines of all users to one cluster. Default 8,192.
    pub lines_per_cluster: usize,
    /// Lines of all users to all clusters, of which the last quarter is reserved like a carrier's.
    /// Default 50,000. Worst case: a few KiB each while idle,
    /// and what `buffered_bytes` allows.
    pub lines: usize,
    /// Bytes of all lines' splice buffers. Default 512 MiB: 4,096 lines that move bytes both ways
    /// at once. Where this, or one of the next two, is used up, a line goes on with 2 KiB a
    /// direction: slower, and never stopped by what others hold.
    pub buffered_bytes: u64,
    /// The same of one user's lines. Default 64 MiB: 512 lines at full speed both ways.
    pub buffered_bytes_per_user: u64,
    /// The same of the lines to one cluster. Default 128 MiB.
    pub buffered_bytes_per_cluster: u64,
    /// Handshakes (TLS and proof) that the relay takes on in a second at most, after as many at
    /// once. Default 200, about a fifth of a core. On a machine that cannot do so many it takes on
    /// fewer: as many as it was measured to complete in time. More wait up to 5 s, each network in
    /// its turn; beyond that they are rejected before TLS, with a time to retry after of 30 s at most.
    pub handshakes_per_second: u32,
    /// Streams that a peer may have open on one carrier; how many the relay opens to an agent
    /// is `mux.max_streams`. Default 1,024, and at most 65,536. Worst case: see `mux::Config`.
    pub streams_per_carrier: u32,
    /// Connections that have not yet become a carrier or been answered. Default 4,096; more shed
    /// the oldest. Worst case: one descriptor and about 40 KiB each while in TLS, so 160 MiB.
    pub half_open: usize,
    /// The same from one address (of IPv6, one /64). Default 1,024: a whole office or cluster
    /// behind one NAT after an outage, all of whom may wait for their turn to shake hands at once. Of `trusted_proxies`, it is each client's as soon as it
    /// is known. With `Tls::Plaintext` and no such list it is not applied: then all connections
    /// come from one balancer.
    pub half_open_per_address: usize,
    /// Enrolments that one address may try at once before it has to wait. Default 60.
    pub enrolment_burst: u32,
    /// Enrolments a minute that one address may keep up. Default 60. A token's secret has 256
    /// bits; this limit guards the database, not the secret.
    pub enrolments_per_minute: u32,
    /// Bytes of a request's head. Default 16 KiB, as much as an AWS balancer passes in one
    /// header; our own peers stay under 4 KiB. At least 8 KiB, hyper's own floor.
    pub head_bytes: usize,
    /// Bytes of an enrolment's body. Default 16 KiB.
    pub body_bytes: usize,
    /// Assertions remembered to refuse their replay. Default 100,000, each for at most two
    /// minutes: 800 carriers a second, for about 10 MiB. When it is full, handshakes are
    /// refused rather than let through unchecked.
    pub remembered_assertions: usize,
}

impl Config {
    /// The streams of one carrier, to be shared among the users whose lines it carries.
    pub(crate) fn lines_of_a_carrier(&self) -> Shares {
        Shares::new(self.mux.max_streams, self.limits.lines_per_user_and_carrier)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            carriers: 20_000,
            carriers_per_identity: 32,
            lines_per_user: 512,
            lines_per_user_and_carrier: 256,
            lines_per_cluster: 8_192,
            lines: 50_000,
            buffered_bytes: 512 << 20,
            buffered_bytes_per_user: 64 << 20,
            buffered_bytes_per_cluster: 128 << 20,
            handshakes_per_second: 200,
            streams_per_carrier: 1_024,
            half_open: 4_096,
            half_open_per_address: 1_024,
            enrolment_burst: 60,
            enrolments_per_minute: 60,
            head_bytes: 16 * 1024,
            body_bytes: 16 * 1024,
            remembered_assertions: 100_000,
        }
    }
}

/// How long things may take.
#[derive(Debug, Clone)]
pub struct Timing {
    /// From the accepted TCP connection to the end of its TLS handshake, a PROXY header before
    /// it included. Default 10 s.
    pub tls_handshake: Duration,
    /// From there to the last byte of the request's head. Default 10 s.
    pub request_head: Duration,
    /// From there to the last byte of the answer, upgrades excepted. Default 10 s.
    pub request: Duration,
    /// How far a peer's clock may be off. Default 60 s; an assertion is then good for at most
    /// two minutes, and is remembered that long.
    pub clock_tolerance: Duration,
    /// How long an `Open` waits for an agent that was here a moment ago. Default 5 s: an agent's
    /// first attempts to come back take that long. Zero turns the wait off. Worst case: one
    /// stream and one task for each line that waits, bounded by the line limits.
    pub agent_wait: Duration,
    /// What "a moment ago" means, and how long after its own start a relay takes every agent for
    /// one that is on its way back. Default 30 s.
    pub agent_memory: Duration,
    /// How long an agent may take to answer an `Open`. Default 4 s, so that with `agent_wait`
    /// the proxy gets our reason within its own 10 s.
    pub agent_answer: Duration,
    /// How long lines may live on after shutdown was asked for. Default 5 min; a pod needs as
    /// long a `terminationGracePeriodSeconds`.
    pub drain_timeout: Duration,
    /// Over how long peers spread their move to another relay when this one drains. Default 10 s.
    pub drain_spread: Duration,
    /// How long two processes of an agent must have been connected with one certificate before that is
    /// reported. Default 2 min: one that was killed may seem to be there for the carrier's
    /// `dead_after`.
    pub double_after: Duration,
    /// Heartbeats and deadlines of the carriers.
    pub carrier: carrier::Timing,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            tls_handshake: Duration::from_secs(10),
            request_head: Duration::from_secs(10),
            request: Duration::from_secs(10),
            clock_tolerance: Duration::from_secs(60),
            agent_wait: Duration::from_secs(5),
            agent_memory: Duration::from_secs(30),
            agent_answer: Duration::from_secs(4),
            drain_timeout: Duration::from_secs(300),
            drain_spread: Duration::from_secs(10),
            double_after: Duration::from_secs(120),
            carrier: carrier::Timing::default(),
        }
    }
}
