//! What the command line and the environment may say, as clap reads it.
//!
//! These are strings and numbers as people type them; each command turns its own into the
//! typed configuration of the crate that it calls.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use throwline_policy::system_names::check_exception;
use throwline_policy::{ReservedName, SystemNames};
use throwline_tunnel::carrier::{BadProxy, Proxies};
use url::Url;

/// Reach Kubernetes clusters that have no inbound access.
///
/// An agent in the cluster holds one outbound connection to a relay. On your machine, a local
/// proxy forwards kubectl, helm and k9s over that relay to the cluster's API server. No inbound
/// port, no VPN, and the relay sees none of the traffic.
#[cfg_attr(
    feature = "demo",
    doc = "\nTry it at once, without a cluster: throwline demo"
)]
#[derive(Debug, Parser)]
#[command(
    name = "throwline",
    version,
    max_term_width = 100,
    subcommand_required = true
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// How to write logs, which always go to standard error.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "THROWLINE_LOG_FORMAT", help_heading = "Logging")]
    pub(crate) log_format: LogFormat,
    /// What to log, for example "info" or "throwline_relay=debug".
    #[arg(
        long,
        global = true,
        value_name = "FILTER",
        env = "THROWLINE_LOG",
        help_heading = "Logging"
    )]
    pub(crate) log: Option<String>,
    /// Allow core dumps and debuggers, which see private keys. For looking into a fault.
    #[arg(
        long,
        global = true,
        env = "THROWLINE_CORE_DUMPS",
        help_heading = "Logging"
    )]
    pub(crate) core_dumps: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// The configuration file of a command that runs until it is stopped.
#[derive(Debug, Args)]
pub(crate) struct ConfigFile {
    /// Read options from this TOML file: each key is an option's name without its dashes, as in
    /// max-carriers = 1000. Command line and environment take precedence.
    #[arg(
        id = "config",
        long = "config",
        value_name = "FILE",
        env = "THROWLINE_CONFIG"
    )]
    _file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[cfg(feature = "demo")]
    Demo(Demo),
    Relay(Box<Relay>),
    #[command(subcommand)]
    Token(Token),
    #[command(subcommand)]
    Revoke(Revoke),
    #[command(subcommand)]
    Cluster(Cluster),
    #[command(subcommand)]
    Database(Database),
    Agent(Agent),
    Login(Login),
    Clusters(Clusters),
    Proxy(Proxy),
}

/// Run a relay, an agent, a local proxy and a small cluster in one process, to try things.
///
/// Everything listens on free loopback ports and lives in a private directory, which is removed
/// at the end. With --kubeconfig, a cluster of yours takes the place of the small one; nothing
/// is installed into it.
///
/// Examples:
///   throwline demo
///   throwline demo -- kubectl get pods -A
///   throwline demo --kubeconfig ~/.kube/config --user dana --group devs -- k9s
#[cfg(feature = "demo")]
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Demo {
    /// Reach the cluster of this kubeconfig's current context instead of the small demo cluster.
    ///
    /// Its user must be allowed to impersonate users and groups.
    #[arg(long, value_name = "FILE", env = "THROWLINE_DEMO_KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Who the cluster sees. By default the kubeconfig's own user.
    #[arg(long, value_name = "NAME", requires = "kubeconfig")]
    pub(crate) user: Option<String>,
    /// A group that the cluster sees the user in; may be given several times.
    ///
    /// By default, where --user is not given either, the groups of the kubeconfig's own user
    /// without system:masters, which RBAC cannot limit.
    #[arg(long = "group", value_name = "GROUP", requires = "kubeconfig")]
    pub(crate) groups: Vec<String>,
    /// Run this with KUBECONFIG set, then stop everything and exit with its status.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// Run a relay: the public meeting point of agents and users.
///
/// On its first start it makes its certificate authority in the state directory, writes one
/// enrolment token for an administrator to admin.token there, and prints that. Make more with
/// "throwline token create".
///
/// Examples:
///   throwline relay --listen 0.0.0.0:443 --public-url https://relay.example.com --state-dir /var/lib/throwline
///   throwline relay --listen 127.0.0.1:8080 --plaintext --public-url https://relay.example.com --state-dir /var/lib/throwline
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Relay {
    #[command(flatten)]
    _config: ConfigFile,
    /// The address to accept agents and users on.
    #[arg(long, value_name = "ADDR", env = "THROWLINE_LISTEN")]
    pub(crate) listen: SocketAddr,
    /// The URL by which agents and users reach this relay, through any load balancer.
    ///
    /// It is part of what they sign, so it must be the one that they use.
    #[arg(long, value_name = "URL", env = "THROWLINE_PUBLIC_URL")]
    pub(crate) public_url: Url,
    /// Where the certificate authority and the enrolments are kept. Keep it private, back it up.
    #[arg(long, value_name = "DIR", env = "THROWLINE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    #[command(flatten)]
    pub(crate) database: SharedDatabase,
    /// Where the other relays of a shared database bring lines; unused without one. Only relays
    /// of the same authority are accepted; no agent and no user connects to it.
    #[arg(
        long,
        value_name = "ADDR",
        default_value = "0.0.0.0:8444",
        env = "THROWLINE_PEER_LISTEN",
        help_heading = "Shared database"
    )]
    pub(crate) peer_listen: SocketAddr,
    /// HOST:PORT by which the others reach that listener. By default its address or, where it
    /// listens on all, this machine's on the way to the database.
    #[arg(
        long,
        value_name = "HOST:PORT",
        env = "THROWLINE_PEER_ADDRESS",
        help_heading = "Shared database"
    )]
    pub(crate) peer_address: Option<String>,
    /// How old the data about other relays' tunnels may be by which lines are opened, while the database
    /// does not answer.
    #[arg(long, alias = "registry-belief", value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration, env = "THROWLINE_REGISTRY_MAX_STALENESS", help_heading = "Shared database")]
    pub(crate) registry_max_staleness: Duration,
    /// This relay's name: lower-case letters, digits and "-", 63 at most, and of no other relay.
    /// By default random.
    #[arg(long, value_name = "NAME", env = "THROWLINE_INSTANCE")]
    pub(crate) instance: Option<String>,
    /// A certificate chain (PEM) for the public URL's host. By default one of our own authority,
    /// which agents and users trust by their token.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_key",
        env = "THROWLINE_TLS_CERT",
        help_heading = "TLS"
    )]
    pub(crate) tls_cert: Option<PathBuf>,
    /// The private key (PEM) of that certificate.
    #[arg(
        long,
        value_name = "FILE",
        requires = "tls_cert",
        env = "THROWLINE_TLS_KEY",
        help_heading = "TLS"
    )]
    pub(crate) tls_key: Option<PathBuf>,
    /// Speak plain HTTP, for a load balancer that ends TLS.
    #[arg(long, conflicts_with_all = ["tls_cert", "tls_key"], env = "THROWLINE_PLAINTEXT", help_heading = "TLS")]
    pub(crate) plaintext: bool,
    /// A balancer's address or network (CIDR), believed when it names its client by
    /// X-Forwarded-For or the PROXY protocol; may be given several times. By default none is.
    #[arg(
        long = "trust-proxy",
        value_name = "CIDR",
        value_delimiter = ',',
        value_parser = network,
        env = "THROWLINE_TRUST_PROXY",
        help_heading = "Balancer"
    )]
    pub(crate) trusted_proxies: Vec<IpNet>,
    /// Connections from --trust-proxy begin with a PROXY protocol header, version 1 or 2; one
    /// without is closed. Connections from elsewhere must not have one.
    #[arg(long, env = "THROWLINE_PROXY_PROTOCOL", help_heading = "Balancer")]
    pub(crate) proxy_protocol: bool,
    /// Threads that move bytes. By default one for each processor that the relay may use.
    #[arg(long, value_name = "N", value_parser = threads(), env = "THROWLINE_THREADS")]
    pub(crate) threads: Option<u16>,
    /// Serve /healthz, /readyz, /metrics and POST /drain on this address. Keep it off the internet.
    /// POST /drain needs the token in drain.token of the state directory, made at each start.
    #[arg(long, value_name = "ADDR", env = "THROWLINE_ADMIN_LISTEN")]
    pub(crate) admin_listen: Option<SocketAddr>,
    /// How often to ping each carrier. Lower it under a load balancer's idle limit; peers
    /// adopt this interval.
    #[arg(long, value_name = "DURATION", default_value = "18s", value_parser = humantime::parse_duration, env = "THROWLINE_PING_INTERVAL", help_heading = "Timing")]
    pub(crate) ping_interval: Duration,
    /// Over how long agents and users spread their move to the other relays when this one stops.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration, env = "THROWLINE_DRAIN_SPREAD", help_heading = "Timing")]
    pub(crate) drain_spread: Duration,
    /// How long to let open lines end when stopping, or when asked to by POST /drain.
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration, env = "THROWLINE_DRAIN_TIMEOUT", help_heading = "Timing")]
    pub(crate) drain_timeout: Duration,
    /// How long a user's certificate lives. The local proxy renews it while it runs.
    #[arg(long, value_name = "DURATION", default_value = "24h", value_parser = humantime::parse_duration, env = "THROWLINE_USER_CERTIFICATE_LIFE", help_heading = "Timing")]
    pub(crate) user_certificate_life: Duration,
    /// How long an agent's certificate lives. The agent renews it at two thirds of its life.
    #[arg(long, value_name = "DURATION", default_value = "7d", value_parser = humantime::parse_duration, env = "THROWLINE_AGENT_CERTIFICATE_LIFE", help_heading = "Timing")]
    pub(crate) agent_certificate_life: Duration,
    /// How long after an enrolment a user's certificate is renewed, expired or not; then the user
    /// needs a new token. At most 3650d.
    #[arg(long, value_name = "DURATION", default_value = "30d", value_parser = enrolment_life, env = "THROWLINE_USER_ENROLMENT_LIFE", help_heading = "Timing")]
    pub(crate) user_enrolment_life: Duration,
    /// How long after its end an agent's certificate is still renewed; an agent that was off for longer
    /// needs a new token. At most 3650d.
    #[arg(long, value_name = "DURATION", default_value = "90d", value_parser = enrolment_life, env = "THROWLINE_AGENT_ABSENCE", help_heading = "Timing")]
    pub(crate) agent_absence: Duration,
    /// The most carriers (agents and users together) at once.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_CARRIERS",
        help_heading = "Limits"
    )]
    pub(crate) max_carriers: Option<usize>,
    /// The most connections at once that have not proved an identity.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_HALF_OPEN",
        help_heading = "Limits"
    )]
    pub(crate) max_half_open: Option<usize>,
    /// The most handshakes to take on in a second; more wait, or are rejected with
    /// the time after which to try again.
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..),
        env = "THROWLINE_MAX_HANDSHAKES",
        help_heading = "Limits"
    )]
    pub(crate) max_handshakes: Option<u32>,
    /// The most lines that one user may hold at once.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_LINES_PER_USER",
        help_heading = "Limits"
    )]
    pub(crate) max_lines_per_user: Option<usize>,
    /// The most lines that one user may hold on one carrier of an agent, of the 1024 that it has.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_LINES_PER_USER_AND_CARRIER",
        help_heading = "Limits"
    )]
    pub(crate) max_lines_per_user_and_carrier: Option<usize>,
    #[command(flatten)]
    pub(crate) system_names: AllowedSystemNames,
}

/// Exceptions for names that Kubernetes keeps for its own components.
#[derive(Debug, Args)]
pub(crate) struct AllowedSystemNames {
    /// A user or group of this exact name, beginning with "system:", may pass; may be given several
    /// times. By default none does, because Kubernetes' own roles are bound to such names.
    /// system:masters never does. Needed where the token is made, at the relay and at the agent.
    #[arg(
        long = "allow-system-name",
        value_name = "NAME",
        value_delimiter = ',',
        value_parser = system_name,
        env = "THROWLINE_ALLOW_SYSTEM_NAMES"
    )]
    names: Vec<String>,
}

impl AllowedSystemNames {
    pub(crate) fn names(self) -> Result<SystemNames, ReservedName> {
        SystemNames::allowing(self.names)
    }
}

fn system_name(text: &str) -> Result<String, ReservedName> {
    check_exception(text).map(|()| text.to_owned())
}

/// Make enrolment tokens.
#[derive(Debug, Subcommand)]
pub(crate) enum Token {
    Create(TokenCreate),
}

/// Make a token that enrols one cluster or one user, once.
///
/// It prints the token alone on standard output, or writes it to a file of --out. Run it where the
/// relay's state directory is; the relay may be running.
///
/// Examples:
///   throwline token create --cluster prod-eu --out agent.token --state-dir /var/lib/throwline
///   throwline token create --user dana --group devs --ttl 15m --state-dir /var/lib/throwline
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct TokenCreate {
    /// The cluster to enrol: lower-case letters, digits and "-", 63 at most.
    #[arg(long, value_name = "NAME", required_unless_present = "user", conflicts_with_all = ["user", "groups"])]
    pub(crate) cluster: Option<String>,
    /// The user to enrol, by the name that the clusters' RBAC has.
    #[arg(long, value_name = "NAME")]
    pub(crate) user: Option<String>,
    /// A group of that user; may be given several times.
    #[arg(long = "group", value_name = "GROUP", requires = "user")]
    pub(crate) groups: Vec<String>,
    #[command(flatten)]
    pub(crate) system_names: AllowedSystemNames,
    /// How long the token may be redeemed.
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = humantime::parse_duration)]
    pub(crate) ttl: Duration,
    /// Write the token to this new file, which only you can read, instead of standard output.
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// The relay's state directory.
    #[arg(long, value_name = "DIR", env = "THROWLINE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    #[command(flatten)]
    pub(crate) database: SharedDatabase,
}

/// Manage the names of clusters.
#[derive(Debug, Subcommand)]
pub(crate) enum Cluster {
    Release(ClusterRelease),
}

/// Give a cluster's name up, so that another cluster can be enrolled under it.
///
/// A name belongs to the cluster that was enrolled under it first, by the UID of its namespace
/// kube-system. Agents of the old cluster are not renewed any more. Run it where the relay's state
/// directory is; the relay may be running.
///
/// Example:
///   throwline cluster release prod-eu --state-dir /var/lib/throwline
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct ClusterRelease {
    /// The name to give up.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) at: AuthorityAt,
}

/// Revoke a user, a cluster or one certificate, at once and everywhere.
///
/// Within 10 s every relay and agent closes the connections that prove a revoked certificate, cuts
/// what runs over them, and refuses new connections, resumption and renewal. A user or cluster that
/// was revoked can be enrolled again with a new token: certificates that are issued later count.
/// A cluster's name stays with that cluster, unless "throwline cluster release" gives it up.
///
/// Run it where the relay's state directory is; the relay may be running.
///
/// Examples:
///   throwline revoke user dana --state-dir /var/lib/throwline
///   throwline revoke cluster prod-eu --state-dir /var/lib/throwline
///   throwline revoke certificate 5f3a0c…91 --state-dir /var/lib/throwline
#[derive(Debug, Subcommand)]
#[command(verbatim_doc_comment)]
pub(crate) enum Revoke {
    /// All certificates of a user so far, and the tokens that were made for it.
    User(RevokeName),
    /// All certificates of a cluster's agents so far, and the tokens that were made for it.
    Cluster(RevokeName),
    /// One certificate, and all that were renewed from it.
    Certificate(RevokeCertificate),
}

#[derive(Debug, Args)]
pub(crate) struct RevokeName {
    /// Its name, as the token had it.
    #[arg(value_name = "NAME")]
    pub(crate) name: String,
    #[command(flatten)]
    pub(crate) at: AuthorityAt,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeCertificate {
    /// Its serial number in hexadecimal, as the relay's log and openssl show it.
    #[arg(value_name = "SERIAL")]
    pub(crate) serial: String,
    #[command(flatten)]
    pub(crate) at: AuthorityAt,
}

/// Where the authority is.
#[derive(Debug, Args)]
pub(crate) struct AuthorityAt {
    /// The relay's state directory.
    #[arg(long, value_name = "DIR", env = "THROWLINE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    #[command(flatten)]
    pub(crate) database: SharedDatabase,
}

/// The PostgreSQL that several relays share, if they do.
#[derive(Args)]
pub(crate) struct SharedDatabase {
    /// The PostgreSQL that several relays share: postgres://USER@HOST:PORT/NAME?sslmode=verify-full
    ///
    /// Without it, everything is kept in the state directory, for one relay. A password belongs
    /// in --database-file, in the environment or in PGPASSFILE, not here.
    #[arg(
        long,
        value_name = "URL",
        env = "THROWLINE_DATABASE",
        hide_env_values = true,
        conflicts_with = "database_file",
        help_heading = "Shared database"
    )]
    pub(crate) database: Option<String>,
    /// A file that holds that URL.
    #[arg(
        long,
        value_name = "FILE",
        env = "THROWLINE_DATABASE_FILE",
        help_heading = "Shared database"
    )]
    pub(crate) database_file: Option<PathBuf>,
}

impl std::fmt::Debug for SharedDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may hold a password.
        f.debug_struct("SharedDatabase")
            .field("database", &self.database.as_ref().map(|_| "(hidden)"))
            .field("database_file", &self.database_file)
            .finish()
    }
}

/// Look after the database that relays share.
#[derive(Debug, Subcommand)]
pub(crate) enum Database {
    Migrate(DatabaseMigrate),
}

/// Make the tables of the shared database, or bring them up to date.
///
/// A relay does this when it starts. Where its role may not, run this as the database's owner.
#[derive(Debug, Args)]
pub(crate) struct DatabaseMigrate {
    #[command(flatten)]
    pub(crate) database: SharedDatabase,
}

/// Connect a cluster: run in it, or anywhere that reaches its API server.
///
/// The first start enrols with the token and keeps its identity in the state directory; later
/// starts need no token. Until stopped, it holds an outbound connection to the relay, or to two of
/// several. One audit event a request is written as a JSON line.
///
/// Examples:
///   throwline agent --token-file agent.token --state-dir /var/lib/throwline-agent
///   throwline agent --token-file - --state-dir ./agent --kubeconfig ~/.kube/config < agent.token
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Agent {
    #[command(flatten)]
    _config: ConfigFile,
    /// A file with the enrolment token, or - for standard input. Not needed once enrolled; another
    /// token than the one that was redeemed enrols again, as after a revocation.
    #[arg(long, value_name = "FILE", env = "THROWLINE_TOKEN_FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Where the agent's identity is kept. Keep it private.
    #[arg(long, value_name = "DIR", env = "THROWLINE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    /// Keep the identity in this Secret of the cluster too, so that a pod whose state directory is
    /// empty starts as the same agent: NAME in the pod's namespace, or NAMESPACE/NAME. All
    /// replicas share it. The agent's account needs get and update on it.
    #[arg(long, value_name = "NAME", env = "THROWLINE_STATE_SECRET")]
    pub(crate) state_secret: Option<String>,
    /// Reach the API server by the current context of this kubeconfig. By default the agent
    /// runs in a pod and uses its service account.
    #[arg(long, value_name = "FILE", env = "THROWLINE_KUBECONFIG")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The UID of the cluster's namespace kube-system, where the agent's account may not read it:
    /// kubectl get namespace kube-system -o jsonpath={.metadata.uid}
    ///
    /// A cluster's name belongs to the cluster that was enrolled under it first, by this UID.
    #[arg(long, value_name = "UID", env = "THROWLINE_CLUSTER_UID")]
    pub(crate) cluster_uid: Option<String>,
    /// The connections to keep, to a relay each, where there are several relays.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8), env = "THROWLINE_CARRIERS")]
    pub(crate) carriers: u8,
    /// How long a user's line may be cut off and still go on: while a relay restarts, or a network
    /// changes. 0s ends it with its connection.
    #[arg(long, value_name = "DURATION", default_value = "120s", value_parser = humantime::parse_duration, env = "THROWLINE_DETACHED_LIFE")]
    pub(crate) detached_life: Duration,
    /// Replace each connection to a relay at this age, more or less 20 %, at least 1s: before a
    /// balancer that bounds the life of connections ends it. What goes over it moves to the new one.
    #[arg(long, value_name = "DURATION", default_value = "2h", value_parser = carrier_life, env = "THROWLINE_CARRIER_LIFE", help_heading = "Timing")]
    pub(crate) carrier_life: Duration,
    /// How long execs, watches and other requests may go on when the agent is stopped. What is
    /// left then ends, with that as the reason. A pod's terminationGracePeriodSeconds must be longer.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration, env = "THROWLINE_DRAIN_TIMEOUT", help_heading = "Timing")]
    pub(crate) drain_timeout: Duration,
    /// Where audit events go: "stdout", "off", or a file to append to.
    #[arg(
        long,
        value_name = "WHERE",
        default_value = "stdout",
        env = "THROWLINE_AUDIT_LOG"
    )]
    pub(crate) audit_log: String,
    /// Refuse requests whose audit event cannot be written.
    #[arg(long, env = "THROWLINE_AUDIT_REQUIRED")]
    pub(crate) audit_required: bool,
    #[command(flatten)]
    pub(crate) system_names: AllowedSystemNames,
    #[command(flatten)]
    pub(crate) threads: Threads,
    /// Serve /healthz, /readyz and /metrics on this address.
    #[arg(long, value_name = "ADDR", env = "THROWLINE_ADMIN_LISTEN")]
    pub(crate) admin_listen: Option<SocketAddr>,
    /// The memory for what users make the agent keep, as 256MiB or 2GiB; the other limits follow
    /// it. By default about 1.8GiB in the worst case.
    #[arg(long, value_name = "SIZE", value_parser = byte_size, env = "THROWLINE_MAX_MEMORY", help_heading = "Limits")]
    pub(crate) max_memory: Option<u64>,
    /// The most lines that one user may hold at once.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_LINES_PER_USER",
        help_heading = "Limits"
    )]
    pub(crate) max_lines_per_user: Option<usize>,
    /// The most requests and watches that one user may have under way at once.
    #[arg(
        long,
        value_name = "N",
        env = "THROWLINE_MAX_REQUESTS_PER_USER",
        help_heading = "Limits"
    )]
    pub(crate) max_requests_per_user: Option<usize>,
    #[command(flatten)]
    pub(crate) outbound: Outbound,
}

/// A number of bytes: alone, or with KiB, MiB or GiB behind it.
fn byte_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text[digits.len()..].trim() {
        "" => 1,
        "KiB" | "Ki" => 1 << 10,
        "MiB" | "Mi" => 1 << 20,
        "GiB" | "Gi" => 1 << 30,
        other => return Err(format!("{other} is not KiB, MiB or GiB")),
    };
    let count: u64 = digits.parse().map_err(|_| "not a number".to_owned())?;
    count
        .checked_mul(unit)
        .ok_or_else(|| "more bytes than can be counted".to_owned())
}

/// The way out to the relay, the same for each component that dials one.
#[derive(Args)]
pub(crate) struct Outbound {
    /// Reach the relay through this HTTP proxy: http://HOST:PORT, or https:// if it speaks TLS.
    ///
    /// By default as HTTPS_PROXY and NO_PROXY say. A user and a password go before the host,
    /// http://USER:PASSWORD@HOST:PORT, percent-encoded; give such a URL in THROWLINE_PROXY, since
    /// everyone on this machine sees a command's arguments.
    #[arg(
        long,
        value_name = "URL",
        env = "THROWLINE_PROXY",
        hide_env_values = true,
        help_heading = "Network"
    )]
    proxy: Option<String>,
    /// CA certificates (PEM) to trust for the relay, beside the token's, and for a proxy on the way:
    /// where a load balancer ends TLS, or a proxy inspects it. Remembered when enrolling.
    #[arg(
        long,
        value_name = "FILE",
        env = "THROWLINE_CA_FILE",
        help_heading = "Network"
    )]
    pub(crate) ca_file: Option<PathBuf>,
    /// Trust this machine's store of CAs for the relay too: where a load balancer with a publicly
    /// trusted certificate ends TLS. Remembered when enrolling.
    #[arg(long, env = "THROWLINE_SYSTEM_CA", help_heading = "Network")]
    pub(crate) system_ca: bool,
}

impl Outbound {
    /// The flag's proxy, else the environment's.
    pub(crate) fn proxies(&self) -> Result<Proxies, BadProxy> {
        match self.proxy.as_deref().map(str::trim) {
            None | Some("") => Proxies::from_environment(std::env::var_os),
            Some(url) => Proxies::always(url, "--proxy (or THROWLINE_PROXY)"),
        }
    }
}

impl std::fmt::Debug for Outbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The URL may hold a password.
        f.debug_struct("Outbound")
            .field("proxy", &self.proxy.as_ref().map(|_| "(hidden)"))
            .field("ca_file", &self.ca_file)
            .field("system_ca", &self.system_ca)
            .finish()
    }
}

/// Where this user's identity is kept.
#[derive(Debug, Args)]
pub(crate) struct UserState {
    /// Where your identity is kept. By default ~/.throwline
    #[arg(long, value_name = "DIR", env = "THROWLINE_STATE_DIR")]
    pub(crate) state_dir: Option<PathBuf>,
}

/// Sign in: enrol this machine's user with a token.
///
/// Example:
///   throwline login --token-file - < my.token
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Login {
    /// A file with the enrolment token, or - for standard input.
    #[arg(long, value_name = "FILE", env = "THROWLINE_TOKEN_FILE")]
    pub(crate) token_file: PathBuf,
    #[command(flatten)]
    pub(crate) outbound: Outbound,
    #[command(flatten)]
    pub(crate) state: UserState,
}

/// List the clusters that you may reach, and how they are.
#[derive(Debug, Args)]
pub(crate) struct Clusters {
    /// How to print them.
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) outbound: Outbound,
    #[command(flatten)]
    pub(crate) state: UserState,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

/// Forward kubectl to your clusters, until stopped.
///
/// Writes a context throwline-NAME for each cluster into your kubeconfig and touches nothing
/// else in it, your current context included. Without names, all clusters that you may reach;
/// those that are enrolled later get their context while it runs.
///
/// Clients that send what is for 127.0.0.1 through HTTPS_PROXY need NO_PROXY=127.0.0.1; kubectl,
/// helm and k9s do not.
///
/// Examples:
///   throwline proxy
///   throwline proxy prod-eu --kubeconfig ./kubeconfig
///   kubectl --context throwline-prod-eu get pods
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(crate) struct Proxy {
    #[command(flatten)]
    _config: ConfigFile,
    /// The clusters to forward to. By default all that you may reach.
    #[arg(value_name = "CLUSTER")]
    pub(crate) clusters: Vec<String>,
    /// The loopback port to listen on. By default 47611; a busy one is stepped over.
    // Not THROWLINE_PORT: Kubernetes sets that in every pod beside a Service named "throwline".
    #[arg(long, value_name = "N", env = "THROWLINE_LOOPBACK")]
    pub(crate) port: Option<u16>,
    /// The kubeconfig to write to. By default as kubectl: the files in $KUBECONFIG, else
    /// ~/.kube/config
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// Make the (one) named cluster's context the current one.
    #[arg(long)]
    pub(crate) set_current_context: bool,
    /// How long kubectl's streams may be cut off and still go on: while a relay restarts, or the
    /// network changes. The agent may allow less; 0s ends them with their connection.
    #[arg(long, value_name = "DURATION", default_value = "120s", value_parser = humantime::parse_duration, env = "THROWLINE_DETACHED_LIFE")]
    pub(crate) detached_life: Duration,
    /// Replace each connection to a relay at this age, more or less 20 %, at least 1s: before a
    /// balancer that bounds the life of connections ends it. What goes over it moves to the new one.
    #[arg(long, value_name = "DURATION", default_value = "2h", value_parser = carrier_life, env = "THROWLINE_CARRIER_LIFE", help_heading = "Timing")]
    pub(crate) carrier_life: Duration,
    /// Serve /healthz, /readyz and /metrics on this address.
    #[arg(long, value_name = "ADDR", env = "THROWLINE_ADMIN_LISTEN")]
    pub(crate) admin_listen: Option<SocketAddr>,
    #[command(flatten)]
    pub(crate) threads: Threads,
    #[command(flatten)]
    pub(crate) outbound: Outbound,
    #[command(flatten)]
    pub(crate) state: UserState,
}

/// How many threads move bytes, where one does unless asked otherwise.
#[derive(Debug, Args)]
pub(crate) struct Threads {
    /// Threads that move bytes. One moves some 300 MB/s, and answers sooner than two, which hand
    /// each request to and fro. More are for many busy users at once.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = threads(), env = "THROWLINE_THREADS")]
    pub(crate) threads: u16,
}

fn threads() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=1024)
}

/// Below a second, dialling would be all that is done.
fn carrier_life(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(life) if life >= Duration::from_secs(1) => Ok(life),
        Ok(_) => Err("at least 1s".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// As long as the authority itself lives, at most.
fn enrolment_life(text: &str) -> Result<Duration, String> {
    const MOST: Duration = Duration::from_secs(3650 * 86_400);
    match humantime::parse_duration(text) {
        Ok(life) if life <= MOST => Ok(life),
        Ok(_) => Err("at most 3650d".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// `10.0.0.0/8`, or a bare address for itself alone.
fn network(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .map(|network| network.trunc())
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map_err(|_| "not an address or a network, as 10.0.0.5 or 10.0.0.0/24".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// For a Service named NAME, Kubernetes sets NAME_SERVICE_HOST, NAME_SERVICE_PORT,
    /// NAME_SERVICE_PORT_..., NAME_PORT and NAME_PORT_443_TCP... in every pod beside it
    /// (kubelet `envvars.FromServices`), to what is no value of any flag.
    #[test]
    fn no_service_can_set_a_flag() {
        fn collect(command: &clap::Command, names: &mut Vec<String>) {
            let variables = command.get_arguments().filter_map(clap::Arg::get_env);
            names.extend(variables.map(|name| name.to_string_lossy().into_owned()));
            for command in command.get_subcommands() {
                collect(command, names);
            }
        }
        let mut names = Vec::new();
        collect(&Cli::command(), &mut names);
        assert!(names.len() > 30, "{names:?}");
        for name in names {
            let is_of_a_service = name.ends_with("_PORT")
                || name.ends_with("_SERVICE_HOST")
                || name.contains("_SERVICE_PORT")
                || name.contains("_PORT_");
            assert!(!is_of_a_service, "{name}");
        }
    }

    #[test]
    fn a_size_has_a_unit_that_is_known() {
        assert_eq!(byte_size("4096"), Ok(4096));
        assert_eq!(byte_size("256MiB"), Ok(256 << 20));
        assert_eq!(byte_size("2 Gi"), Ok(2 << 30));
        for wrong in ["", "MiB", "1.5GiB", "2GB", "-1", "99999999999GiB"] {
            assert!(byte_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_cluster_token_takes_no_groups() {
        let args = [
            "throwline",
            "token",
            "create",
            "--cluster",
            "a",
            "--group",
            "g",
            "--state-dir",
            "d",
        ];
        assert!(Cli::try_parse_from(args).is_err());
    }

    #[test]
    fn a_carrier_lives_a_second_at_least() {
        assert_eq!(carrier_life("90m"), Ok(Duration::from_secs(5400)));
        assert!(carrier_life("999ms").is_err());
        assert!(carrier_life("soon").is_err());
    }

    #[test]
    fn who_sits_at_one_carrier_has_one_thread_unless_asked() {
        let threads = |words: &str| {
            let words = format!("throwline {words}");
            let command = Cli::try_parse_from(words.split(' '))?.command;
            Ok::<_, clap::Error>(crate::commands::threads(&command))
        };
        let relay = "relay --listen [::]:1 --public-url https://r --state-dir d";
        assert_eq!(threads(relay).unwrap(), None);
        assert_eq!(threads(&format!("{relay} --threads 3")).unwrap(), Some(3));
        for part in ["agent --state-dir d", "proxy"] {
            assert_eq!(threads(part).unwrap(), Some(1));
            assert_eq!(threads(&format!("{part} --threads 8")).unwrap(), Some(8));
            for wrong in ["0", "1025", "all"] {
                assert!(threads(&format!("{part} --threads {wrong}")).is_err());
            }
        }
    }

    fn trusted(words: &[&str]) -> Result<Vec<String>, clap::Error> {
        let relay = "throwline relay --listen [::]:1 --public-url https://r --state-dir d";
        let words = relay.split(' ').chain(words.iter().copied());
        let Command::Relay(relay) = Cli::try_parse_from(words)?.command else {
            panic!("not relay")
        };
        let networks = relay.trusted_proxies.iter();
        Ok(networks.map(ToString::to_string).collect())
    }

    #[test]
    fn balancers_are_addresses_or_networks() {
        let flags = "--trust-proxy 10.0.0.5 --trust-proxy 10.1.2.3/16,2001:db8::1";
        let flags: Vec<_> = flags.split(' ').collect();
        assert_eq!(
            trusted(&flags).unwrap(),
            ["10.0.0.5/32", "10.1.0.0/16", "2001:db8::1/128"]
        );
        assert!(trusted(&[]).unwrap().is_empty());
        for wrong in ["balancer.internal", "10.0.0.0/33", "10.0.0.5:443", ""] {
            let error = trusted(&["--trust-proxy", wrong]).unwrap_err().to_string();
            assert!(error.contains("10.0.0.0/24"), "{error}");
        }
    }

    #[test]
    fn a_token_needs_a_subject() {
        let args = ["throwline", "token", "create", "--state-dir", "d"];
        assert!(Cli::try_parse_from(args).is_err());
    }

    #[test]
    fn a_proxys_password_is_not_in_debug() {
        let url = "http://ann:secret@proxy:3128";
        for command in [
            &["login", "--token-file", "t"][..],
            &["clusters"],
            &["proxy"],
        ] {
            let args = [&["throwline"], command, &["--proxy", url]].concat();
            let cli = Cli::try_parse_from(args).unwrap();
            let shown = format!("{cli:?}");
            assert!(
                shown.contains("(hidden)") && !shown.contains("secret"),
                "{shown}"
            );
        }
    }

    #[cfg(feature = "demo")]
    #[test]
    fn everything_after_two_dashes_is_the_demo_command() {
        let cli = Cli::try_parse_from(["throwline", "demo", "--", "kubectl", "get", "--user", "x"])
            .unwrap();
        let Command::Demo(demo) = cli.command else {
            panic!("not demo")
        };
        assert_eq!(demo.command, ["kubectl", "get", "--user", "x"]);
    }
}
