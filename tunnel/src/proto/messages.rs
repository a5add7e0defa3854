//! The messages, as prost derives them. Field numbers are for ever; a field that is no longer used
//! keeps its number reserved. Unknown fields and unknown enum values are tolerated.

use prost::{Enumeration, Message, Oneof};

/// Relay → dialer, first bytes after the 101.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Challenge {
    #[prost(uint32, tag = "1")]
    pub version_min: u32,
    #[prost(uint32, tag = "2")]
    pub version_max: u32,
    /// 32 bytes, fresh for each connection.
    #[prost(bytes = "vec", tag = "3")]
    pub nonce: Vec<u8>,
    #[prost(string, tag = "4")]
    pub relay_instance: String,
    #[prost(uint64, tag = "5")]
    pub time_unix_ms: u64,
    /// Relays of the set that this one knows to take lines, itself among them; 0: it does not say.
    #[prost(uint32, tag = "6")]
    pub relays: u32,
}

/// Dialer → relay: the signature over [`super::challenge::transcript`].
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Proof {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// 32 bytes, the dialer's.
    #[prost(bytes = "vec", tag = "2")]
    pub nonce: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub signature: Vec<u8>,
    #[prost(enumeration = "Role", tag = "4")]
    pub role: i32,
    /// Tells two processes of one identity apart; made anew at each start.
    #[prost(string, tag = "5")]
    pub instance: String,
    /// Name and version, for people.
    #[prost(string, tag = "6")]
    pub software: String,
}

/// What a dialer is. Only a hint for logs and limits: rights follow the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Role {
    Unspecified = 0,
    Agent = 1,
    LocalProxy = 2,
    Relay = 3,
}

/// Relay → dialer, last message before the first mux byte.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct HandshakeReply {
    #[prost(oneof = "Verdict", tags = "1, 2")]
    pub verdict: Option<Verdict>,
}

#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum Verdict {
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    #[prost(message, tag = "2")]
    Refused(Refusal),
}

#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Welcome {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(string, tag = "2")]
    pub carrier_id: String,
    /// The dialer pings at least this often; 0 leaves it its own default.
    #[prost(uint32, tag = "3")]
    pub ping_interval_ms: u32,
    /// Streams the dialer may have open at once that it opened itself; 0 means its own default.
    #[prost(uint32, tag = "4")]
    pub max_streams: u32,
}

/// A refusal that a program can act on and a person can read.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Refusal {
    #[prost(enumeration = "RefusalCode", tag = "1")]
    pub code: i32,
    #[prost(string, tag = "2")]
    pub message: String,
    /// 0: no advice.
    #[prost(uint64, tag = "3")]
    pub retry_after_ms: u64,
    /// Since when it has been so (a cluster's last connection); 0: not known.
    #[prost(uint64, tag = "4")]
    pub since_unix_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum RefusalCode {
    Unspecified = 0,
    UnknownCluster = 1,
    NeverConnected = 2,
    Offline = 3,
    NotAllowed = 4,
    Limit = 5,
    Draining = 6,
    Version = 7,
    BadRequest = 8,
    Internal = 9,
    Timeout = 10,
    Unauthenticated = 11,
    Unsupported = 12,
    /// The cluster has agents, but not the process that was asked for.
    InstanceGone = 13,
}

/// Longest refusal text that is sent; the rest is cut at a character.
const MAX_REFUSAL_TEXT: usize = 1024;

impl Refusal {
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > MAX_REFUSAL_TEXT {
            let cut = (0..=MAX_REFUSAL_TEXT)
                .rev()
                .find(|at| message.is_char_boundary(*at));
            message.truncate(cut.unwrap_or(0));
        }
        Self {
            code: code.into(),
            message,
            retry_after_ms: 0,
            since_unix_ms: 0,
        }
    }

    pub fn retry_after(mut self, delay: std::time::Duration) -> Self {
        self.retry_after_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self
    }

    pub fn since(mut self, unix_ms: u64) -> Self {
        self.since_unix_ms = unix_ms;
        self
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.message.is_empty() {
            write!(f, "refused: {:?}", self.code())
        } else {
            f.write_str(&self.message)
        }
    }
}

/// The first message on every stream, from its opener.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct StreamHeader {
    #[prost(oneof = "StreamKind", tags = "1, 2, 3, 4")]
    pub kind: Option<StreamKind>,
}

#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum StreamKind {
    #[prost(message, tag = "1")]
    Open(Open),
    #[prost(message, tag = "2")]
    Control(Control),
    #[prost(message, tag = "3")]
    ListClusters(ListClusters),
    #[prost(message, tag = "4")]
    Renew(Renew),
}

impl From<StreamKind> for StreamHeader {
    fn from(kind: StreamKind) -> Self {
        Self { kind: Some(kind) }
    }
}

impl From<Open> for StreamHeader {
    fn from(open: Open) -> Self {
        StreamKind::Open(open).into()
    }
}

/// Asks for a line to a cluster's agent.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Open {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// 16 bytes, chosen by the local proxy.
    #[prost(bytes = "vec", tag = "3")]
    pub line_id: Vec<u8>,
    #[prost(enumeration = "LineKind", tag = "4")]
    pub kind: i32,
    /// Set by the relay from the authenticated carrier; what a dialer writes here is discarded.
    #[prost(string, tag = "5")]
    pub user: String,
    /// Set by the relay; what a dialer writes here is discarded.
    #[prost(string, tag = "6")]
    pub client_addr: String,
    /// Asks for this instance of the agent; empty means any.
    #[prost(string, tag = "7")]
    pub agent_instance: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum LineKind {
    Unspecified = 0,
    /// HTTP/2, all plain requests of one user to one cluster.
    Api = 1,
    /// HTTP/1.1, one upgraded request.
    Upgrade = 2,
}

/// The control stream: `ControlMessage` both ways, one a carrier, opened first by the dialer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Control {}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct ListClusters {}

/// Asks for a new certificate for the carrier's identity.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Renew {
    /// PKCS #10, DER.
    #[prost(bytes = "vec", tag = "1")]
    pub csr: Vec<u8>,
}

/// The acceptor's first message on every stream.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct StreamReply {
    /// Absent: accepted.
    #[prost(message, optional, tag = "1")]
    pub refusal: Option<Refusal>,
    #[prost(string, tag = "2")]
    pub agent_instance: String,
}

impl StreamReply {
    pub fn accepted() -> Self {
        Self::default()
    }

    pub fn refused(refusal: Refusal) -> Self {
        Self {
            refusal: Some(refusal),
            agent_instance: String::new(),
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ControlMessage {
    #[prost(oneof = "ControlKind", tags = "1, 2, 3")]
    pub kind: Option<ControlKind>,
}

#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum ControlKind {
    #[prost(message, tag = "1")]
    AgentStatus(AgentStatus),
    #[prost(message, tag = "2")]
    Drain(Drain),
    #[prost(message, tag = "3")]
    RelaySet(RelaySet),
}

impl From<ControlKind> for ControlMessage {
    fn from(kind: ControlKind) -> Self {
        Self { kind: Some(kind) }
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct AgentStatus {
    #[prost(string, tag = "1")]
    pub kubernetes_version: String,
    #[prost(string, tag = "2")]
    pub agent_version: String,
    #[prost(bool, tag = "3")]
    pub api_server_reachable: bool,
    #[prost(string, tag = "4")]
    pub message: String,
}

/// The relay is going away: move within `delay_ms`, spread over `spread_ms`.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Drain {
    #[prost(uint64, tag = "1")]
    pub delay_ms: u64,
    #[prost(uint64, tag = "2")]
    pub spread_ms: u64,
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Relay → agent, when it changes: the same number as in [`Challenge`].
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RelaySet {
    #[prost(uint32, tag = "1")]
    pub relays: u32,
}

#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ClusterList {
    #[prost(message, repeated, tag = "1")]
    pub clusters: Vec<ClusterInfo>,
}

#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ClusterInfo {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(bool, tag = "2")]
    pub connected: bool,
    /// Since when it has been connected, or not; 0: never was.
    #[prost(uint64, tag = "3")]
    pub since_unix_ms: u64,
    #[prost(string, tag = "4")]
    pub kubernetes_version: String,
    #[prost(string, tag = "5")]
    pub agent_version: String,
    /// Relay to agent; 0: not measured.
    #[prost(uint64, tag = "6")]
    pub round_trip_us: u64,
    #[prost(uint32, tag = "7")]
    pub carriers: u32,
    #[prost(string, tag = "8")]
    pub message: String,
}

/// The answer to `Renew`.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Certificate {
    /// DER, leaf first.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub chain: Vec<Vec<u8>>,
    /// DER; the authority's certificates, old and new.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub ca: Vec<Vec<u8>>,
}

/// First message on a line, from the local proxy.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineHello {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub line_id: Vec<u8>,
    /// 0. The epoch rises with each stream that a line is resumed on.
    #[prost(uint32, tag = "3")]
    pub epoch: u32,
    /// Bytes the sender of this message is willing to have unacknowledged towards it.
    #[prost(uint32, tag = "4")]
    pub window: u32,
    /// How long the line may be without a stream; 0: it ends with its stream.
    #[prost(uint32, tag = "5")]
    pub detached_ms: u32,
}

/// The agent's answer.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineHelloReply {
    #[prost(uint32, tag = "1")]
    pub version: u32,
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    #[prost(uint32, tag = "3")]
    pub window: u32,
    /// What holds for the line: at most what the hello asked for.
    #[prost(uint32, tag = "4")]
    pub detached_ms: u32,
}

/// RESUME: takes a line up on a new stream. The epoch is the frame's value.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineResume {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub line_id: Vec<u8>,
    /// 16 bytes, fresh.
    #[prost(bytes = "vec", tag = "2")]
    pub nonce: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub received: u64,
    #[prost(uint64, tag = "4")]
    pub consumed: u64,
    #[prost(bool, tag = "5")]
    pub ended: bool,
    /// 32 bytes; over all of the above and the epoch.
    #[prost(bytes = "vec", tag = "6")]
    pub mac: Vec<u8>,
}

/// OK: the line goes on. The epoch is the frame's value.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineResumed {
    /// 16 bytes, fresh.
    #[prost(bytes = "vec", tag = "1")]
    pub nonce: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub received: u64,
    #[prost(uint64, tag = "3")]
    pub consumed: u64,
    #[prost(bool, tag = "4")]
    pub ended: bool,
    /// 32 bytes; over all of the above, the epoch, the line's id and the nonce that is answered.
    #[prost(bytes = "vec", tag = "5")]
    pub mac: Vec<u8>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_refusals_are_cut_at_a_character() {
        let refusal = Refusal::new(RefusalCode::Internal, "é".repeat(1000));
        assert_eq!(refusal.message.len(), 1024);
        assert_eq!(refusal.code(), RefusalCode::Internal);
    }

    #[test]
    fn an_unknown_code_is_unspecified_and_survives() {
        let newer = Refusal {
            code: 77,
            ..Refusal::default()
        };
        assert_eq!(newer.code(), RefusalCode::Unspecified);
        let bytes = newer.encode_to_vec();
        assert_eq!(Refusal::decode(&bytes[..]).unwrap().code, 77);
    }

    #[test]
    fn golden_open() {
        let header = StreamHeader::from(Open {
            version: 1,
            cluster: "prod".into(),
            line_id: vec![7; 2],
            kind: LineKind::Upgrade.into(),
            ..Open::default()
        });
        assert_eq!(
            header.encode_to_vec(),
            b"\x0a\x0e\x08\x01\x12\x04prod\x1a\x02\x07\x07\x20\x02"
        );
    }
}
