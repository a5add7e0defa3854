//! The messages, as prost derives them. Field numbers never change; a field that is no longer used
//! keeps its number reserved. Unknown fields and unknown enum values are tolerated.

use prost::{Enumeration, Message, Oneof};

/// Relay → dialer, first bytes after the 101.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Challenge {
    /// The lowest protocol version that the relay supports.
    #[prost(uint32, tag = "1")]
    pub version_min: u32,
    /// The highest protocol version that the relay supports.
    #[prost(uint32, tag = "2")]
    pub version_max: u32,
    /// 32 bytes, fresh for each connection.
    #[prost(bytes = "vec", tag = "3")]
    pub nonce: Vec<u8>,
    /// The relay's name within its set.
    #[prost(string, tag = "4")]
    pub relay_instance: String,
    /// The relay's clock.
    #[prost(uint64, tag = "5")]
    pub time_unix_ms: u64,
    /// Relays of the set that take lines, this one among them; 0: not sent.
    #[prost(uint32, tag = "6")]
    pub relays: u32,
}

/// Dialer → relay: the signature over [`super::challenge::transcript`].
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Proof {
    /// The version that the dialer has chosen.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// 32 bytes, the dialer's.
    #[prost(bytes = "vec", tag = "2")]
    pub nonce: Vec<u8>,
    /// By the key of the assertion's certificate.
    #[prost(bytes = "vec", tag = "3")]
    pub signature: Vec<u8>,
    /// A [`Role`].
    #[prost(enumeration = "Role", tag = "4")]
    pub role: i32,
    /// Distinguishes two processes of one identity; random at each start.
    #[prost(string, tag = "5")]
    pub instance: String,
    /// Name and version, for people.
    #[prost(string, tag = "6")]
    pub software: String,
    /// Other processes have this identity too, as replicas that share it: no reason to report two.
    #[prost(bool, tag = "7")]
    pub shares_identity: bool,
    /// The carrier is for bulk: lines that are not come over it only where there is no other.
    #[prost(bool, tag = "8")]
    pub bulk: bool,
}

/// What a dialer is. Only a hint for logs and limits: rights follow the certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Role {
    /// Not sent, or unknown to this version.
    Unspecified = 0,
    /// A cluster's agent.
    Agent = 1,
    /// A user's local proxy.
    LocalProxy = 2,
    /// Another relay.
    Relay = 3,
}

/// Relay → dialer, last message before the first mux byte.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct HandshakeReply {
    /// Absent only from a relay of an unknown version.
    #[prost(oneof = "Verdict", tags = "1, 2")]
    pub verdict: Option<Verdict>,
}

/// Whether the dialer is accepted.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum Verdict {
    /// Accepted.
    #[prost(message, tag = "1")]
    Welcome(Welcome),
    /// Refused; the relay closes the carrier.
    #[prost(message, tag = "2")]
    Refused(Refusal),
}

/// The parameters of an accepted carrier.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Welcome {
    /// The version in use.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// Names the carrier in the logs of both ends.
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
    /// A [`RefusalCode`].
    #[prost(enumeration = "RefusalCode", tag = "1")]
    pub code: i32,
    /// A sentence for people.
    #[prost(string, tag = "2")]
    pub message: String,
    /// 0: no advice.
    #[prost(uint64, tag = "3")]
    pub retry_after_ms: u64,
    /// Since when it has been so (a cluster's last connection); 0: not known.
    #[prost(uint64, tag = "4")]
    pub since_unix_ms: u64,
}

/// The reason of a refusal, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum RefusalCode {
    /// Not sent, or unknown to this version.
    Unspecified = 0,
    /// There is no cluster of this name.
    UnknownCluster = 1,
    /// The cluster's agent has not connected yet.
    NeverConnected = 2,
    /// The cluster has no carrier now.
    Offline = 3,
    /// The policy denies it.
    NotAllowed = 4,
    /// A limit is reached.
    Limit = 5,
    /// The relay, or the agent, is being stopped.
    Draining = 6,
    /// No common protocol version.
    Version = 7,
    /// The message is invalid.
    BadRequest = 8,
    /// The sender failed.
    Internal = 9,
    /// The other end did not answer in time.
    Timeout = 10,
    /// The proof is invalid.
    Unauthenticated = 11,
    /// The stream's kind is unknown here.
    Unsupported = 12,
    /// The cluster has agents, but not the process that was asked for.
    InstanceGone = 13,
    /// The requester's identity, or the cluster's, was revoked.
    Revoked = 14,
}

/// Longest refusal text that is sent; the rest is cut at a character.
const MAX_REFUSAL_TEXT: usize = 1024;

impl Refusal {
    /// A refusal; a long text is cut.
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

    /// Adds an advice when to try again.
    pub fn retry_after(mut self, delay: std::time::Duration) -> Self {
        self.retry_after_ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self
    }

    /// Adds since when it has been so.
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
    /// Tag 4 was a renewal without a signature by the old key: never to be used again.
    #[prost(oneof = "StreamKind", tags = "1, 2, 3, 5, 6")]
    pub kind: Option<StreamKind>,
}

/// What a stream is for.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum StreamKind {
    /// A line to a cluster.
    #[prost(message, tag = "1")]
    Open(Open),
    /// The control stream.
    #[prost(message, tag = "2")]
    Control(Control),
    /// The list of clusters.
    #[prost(message, tag = "3")]
    ListClusters(ListClusters),
    /// A new certificate.
    #[prost(message, tag = "5")]
    Renewal(Renewal),
    /// The list of revocations.
    #[prost(message, tag = "6")]
    FetchRevocations(FetchRevocations),
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
    /// The version of this message, 1.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The cluster's name.
    #[prost(string, tag = "2")]
    pub cluster: String,
    /// 16 bytes, chosen by the local proxy.
    #[prost(bytes = "vec", tag = "3")]
    pub line_id: Vec<u8>,
    /// A [`LineKind`].
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
    /// How long the line may be without a stream, as the local proxy will ask in its hello; 0: not at
    /// all. Tells a relay that stops which lines it must wait for.
    #[prost(uint32, tag = "8")]
    pub detached_ms: u32,
    /// The line moves bulk, and should come over carriers for bulk. All that a relay learns of what is
    /// in the line, beside its amount.
    #[prost(bool, tag = "9")]
    pub bulk: bool,
}

/// What a line carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum LineKind {
    /// Not sent, or unknown to this version.
    Unspecified = 0,
    /// HTTP/2, all plain requests of one user to one cluster.
    Api = 1,
    /// HTTP/1.1, one upgraded request.
    Upgrade = 2,
}

/// The control stream: `ControlMessage` both ways, one a carrier, opened first by the dialer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Control {}

/// Asks for the clusters that the user may open lines to; a [`ClusterList`] follows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct ListClusters {}

/// Asks for the list of revocations, which follows an accepting reply.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct FetchRevocations {}

/// What is revoked, as the authority has signed it. The relay is only its carrier.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RevocationList {
    /// The signed document.
    #[prost(bytes = "vec", tag = "1")]
    pub list: Vec<u8>,
    /// By the authority's CA key.
    #[prost(bytes = "vec", tag = "2")]
    pub signature: Vec<u8>,
}

/// Asks for a new certificate. After the accepting reply come [`RenewalChallenge`],
/// [`RenewalRequest`] and [`RenewalReply`], one each.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Renewal {}

/// Relay → dialer: what the key of the old certificate has to sign over.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RenewalChallenge {
    /// 32 bytes of the authority's, fresh for each renewal and good for one.
    #[prost(bytes = "vec", tag = "1")]
    pub nonce: Vec<u8>,
    /// SHA-256 of the certificate of the CA that will sign.
    #[prost(bytes = "vec", tag = "2")]
    pub authority: Vec<u8>,
}

/// Dialer → relay: the request, and its signature by the old key.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RenewalRequest {
    /// DER, leaf first: the certificate to renew. It is of the carrier's identity.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub chain: Vec<Vec<u8>>,
    /// PKCS #10, DER, for the new key.
    #[prost(bytes = "vec", tag = "2")]
    pub csr: Vec<u8>,
    /// ECDSA P-256 with SHA-256, ASN.1, by the old key; docs/protocol.md defines the signed bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub signature: Vec<u8>,
}

/// Relay → dialer, the last message.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RenewalReply {
    /// Absent only from a relay of an unknown version.
    #[prost(oneof = "RenewalVerdict", tags = "1, 2")]
    pub verdict: Option<RenewalVerdict>,
}

/// Whether the certificate was renewed.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum RenewalVerdict {
    /// The new certificate.
    #[prost(message, tag = "1")]
    Issued(Certificate),
    /// The reason.
    #[prost(message, tag = "2")]
    Refused(Refusal),
}

/// The acceptor's first message on every stream.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct StreamReply {
    /// Absent: accepted.
    #[prost(message, optional, tag = "1")]
    pub refusal: Option<Refusal>,
    /// The instance of the agent that accepted.
    #[prost(string, tag = "2")]
    pub agent_instance: String,
    /// An agent's: how long it lets a line be without a stream at most; 0: not at all.
    #[prost(uint32, tag = "3")]
    pub detached_ms: u32,
}

impl StreamReply {
    /// The stream is accepted.
    pub fn accepted() -> Self {
        Self::default()
    }

    /// The stream is refused.
    pub fn refused(refusal: Refusal) -> Self {
        Self {
            refusal: Some(refusal),
            ..Self::default()
        }
    }
}

/// One message on the control stream.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ControlMessage {
    /// Absent where it is unknown to this version; it is ignored then.
    #[prost(oneof = "ControlKind", tags = "1, 2, 3, 4")]
    pub kind: Option<ControlKind>,
}

/// The messages of the control stream.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum ControlKind {
    /// Agent → relay.
    #[prost(message, tag = "1")]
    AgentStatus(AgentStatus),
    /// Relay → dialer.
    #[prost(message, tag = "2")]
    Drain(Drain),
    /// Relay → agent.
    #[prost(message, tag = "3")]
    RelaySet(RelaySet),
    /// Relay → dialer.
    #[prost(message, tag = "4")]
    Revocations(RevocationsVersion),
}

impl From<ControlKind> for ControlMessage {
    fn from(kind: ControlKind) -> Self {
        Self { kind: Some(kind) }
    }
}

/// An agent's report about its cluster.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct AgentStatus {
    /// The API server's version; empty: not known.
    #[prost(string, tag = "1")]
    pub kubernetes_version: String,
    /// The agent's version.
    #[prost(string, tag = "2")]
    pub agent_version: String,
    /// Whether the API server answers the agent.
    #[prost(bool, tag = "3")]
    pub api_server_reachable: bool,
    /// What is wrong, for people; empty: nothing.
    #[prost(string, tag = "4")]
    pub message: String,
    /// An [`Impersonation`].
    #[prost(enumeration = "Impersonation", tag = "20")]
    pub impersonation: i32,
}

/// How an agent's account may act for users (KEP-5284).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Impersonation {
    /// Not asked yet, or a value that this version does not know.
    Unspecified = 0,
    /// By constrained impersonation alone: a ceiling is in force.
    Constrained = 1,
    /// By the verb `impersonate`: no ceiling.
    Legacy = 2,
    /// By both: what the ceiling refuses passes by the verb `impersonate`, so it is void.
    Both = 3,
    /// The account has constrained rights only, and the API server does not know them.
    Unsupported = 4,
    /// Not at all.
    None = 5,
}

impl Impersonation {
    /// The word for people and scripts; empty where nothing is known.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unspecified => "",
            Self::Constrained => "constrained",
            Self::Legacy => "legacy",
            Self::Both => "both",
            Self::Unsupported => "unsupported",
            Self::None => "none",
        }
    }
}

/// The relay is going away: move within `delay_ms`, spread over `spread_ms`.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Drain {
    /// Time until the relay closes its carriers.
    #[prost(uint64, tag = "1")]
    pub delay_ms: u64,
    /// Time over which the dialers spread their moves.
    #[prost(uint64, tag = "2")]
    pub spread_ms: u64,
    /// For people.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// Relay → dialer, when it changes: the version of the list that
/// [`FetchRevocations`] gives.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct RevocationsVersion {
    /// The version of the list.
    #[prost(uint64, tag = "1")]
    pub version: u64,
}

/// Relay → agent, when it changes: the same number as in [`Challenge`].
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct RelaySet {
    /// The number of relays that take lines.
    #[prost(uint32, tag = "1")]
    pub relays: u32,
}

/// The clusters that a user may open lines to.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ClusterList {
    /// One entry a cluster.
    #[prost(message, repeated, tag = "1")]
    pub clusters: Vec<ClusterInfo>,
    /// How many there are, where some were left out of this list; 0: these are all.
    #[prost(uint32, tag = "2")]
    pub total: u32,
}

/// What is known of one cluster.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct ClusterInfo {
    /// The cluster's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Whether it has a carrier.
    #[prost(bool, tag = "2")]
    pub connected: bool,
    /// Since when it has been connected, or not; 0: never was.
    #[prost(uint64, tag = "3")]
    pub since_unix_ms: u64,
    /// The API server's version; empty: not known.
    #[prost(string, tag = "4")]
    pub kubernetes_version: String,
    /// The agent's version; empty: not known.
    #[prost(string, tag = "5")]
    pub agent_version: String,
    /// Relay to agent; 0: not measured.
    #[prost(uint64, tag = "6")]
    pub round_trip_us: u64,
    /// The number of its carriers.
    #[prost(uint32, tag = "7")]
    pub carriers: u32,
    /// What is wrong, for people; empty: nothing.
    #[prost(string, tag = "8")]
    pub message: String,
    /// An [`Impersonation`].
    #[prost(enumeration = "Impersonation", tag = "20")]
    pub impersonation: i32,
}

/// A new certificate.
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
    /// The line's protocol version.
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
    /// The line's protocol version.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The epoch of the hello.
    #[prost(uint32, tag = "2")]
    pub epoch: u32,
    /// Bytes that the agent is willing to have unacknowledged towards it.
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
    /// Bytes that this end has received.
    #[prost(uint64, tag = "3")]
    pub received: u64,
    /// Bytes that its reader has taken.
    #[prost(uint64, tag = "4")]
    pub consumed: u64,
    /// Whether it has received FIN.
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
    /// Bytes that this end has received.
    #[prost(uint64, tag = "2")]
    pub received: u64,
    /// Bytes that its reader has taken.
    #[prost(uint64, tag = "3")]
    pub consumed: u64,
    /// Whether it has received FIN.
    #[prost(bool, tag = "4")]
    pub ended: bool,
    /// 32 bytes; over all of the above, the epoch, the line's id and the nonce that is answered.
    #[prost(bytes = "vec", tag = "5")]
    pub mac: Vec<u8>,
}

/// The host of the one request in a sealed API session that is for the agent itself: a `POST` whose
/// body is [`LineCredentials`] with a 16-bit length, and its answer's [`LineCredentialsReply`]. No
/// cluster has a name with a dot.
pub const LINE_CREDENTIALS_HOST: &str = "lines.throwline.internal";

/// In a sealed session, from a local proxy to an agent: lines of the same user that the session's
/// certificate stands for from now on.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineCredentials {
    /// One entry a line.
    #[prost(message, repeated, tag = "1")]
    pub lines: Vec<LineCredential>,
}

/// One of them, with the proof that the sender has its other end.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineCredential {
    /// 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub line_id: Vec<u8>,
    /// 32 bytes, by the line's own key, over its id and the fingerprint of the certificate.
    #[prost(bytes = "vec", tag = "2")]
    pub mac: Vec<u8>,
}

/// The answer: the lines of which that was accepted.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct LineCredentialsReply {
    /// Their ids.
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub accepted: Vec<Vec<u8>>,
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
