//! What a component has to decide about its carriers.

use std::fmt::Display;
use std::future::{Future, pending, ready};
use std::time::Duration;

use throwline_ops::Shutdown;
use throwline_tunnel::carrier::{Carrier, Connection, DialError, IncomingStream};
use throwline_tunnel::proto::close::CloseReason;
use throwline_tunnel::proto::messages::AgentStatus;
use tokio::sync::watch;

/// The component whose carriers are kept. The methods with a default are for what not all need.
pub trait UplinkHandler: Send + Sync + 'static {
    /// Why there is no connection.
    type Error: DialFailure;

    /// Connects once, with the newest identity. The dial must not end at one of the relays in `avoid`
    /// while there are others.
    fn dial(
        &self,
        avoid: Vec<String>,
    ) -> impl Future<Output = Result<Connection, Self::Error>> + Send;

    /// Takes a stream that a relay has opened; must not block. `retiring` is requested when no more
    /// sessions may begin on its carrier, and those that it has should end as their requests do.
    fn accept(&self, stream: IncomingStream, retiring: &Shutdown);

    /// A dial has failed. The next one is made after the back-off.
    fn failed(&self, error: &Self::Error) {
        let _ = error;
    }

    /// A carrier is up and takes the place of any before it. The epoch rises with each carrier of a pool.
    fn connected(&self, carrier: &Carrier, epoch: u64) {
        let _ = (carrier, epoch);
    }

    /// The carrier has ended and has no successor; without a reason where it was
    /// [no longer needed](Self::unused).
    fn disconnected(&self, reason: Option<&CloseReason>) {
        let _ = reason;
    }

    /// A dial for the successor of a carrier that still works has failed; `attempt` counts from 1.
    /// Default: as any other dial.
    fn not_replaced(&self, error: &Self::Error, reason: ReplaceReason, attempt: u32) {
        let _ = (reason, attempt);
        self.failed(error);
    }

    /// What relays display about the cluster; only agents have it.
    fn status(&self) -> Option<watch::Receiver<AgentStatus>> {
        None
    }

    /// Follows the list of revocations over a carrier that is up. `newest` holds the newest version
    /// that its relay has announced. Dropped with the carrier.
    fn follow_revocations(
        &self,
        carrier: Carrier,
        newest: watch::Receiver<u64>,
    ) -> impl Future<Output = ()> + Send {
        let _ = (carrier, newest);
        ready(())
    }

    /// Ends when a carrier is needed. Default: at once.
    fn needed(&self) -> impl Future<Output = ()> + Send {
        ready(())
    }

    /// Ends when the carrier is not needed any more, and is closed then. Default: never.
    fn unused(&self, carrier: &Carrier) -> impl Future<Output = ()> + Send {
        let _ = carrier;
        pending()
    }

    /// Ends when work waits for a carrier, so that the back-off is cut short. Default: never.
    fn urgent(&self) -> impl Future<Output = ()> + Send {
        pending()
    }

    /// After how long a new carrier must be replaced, whatever [`Config::rotate`](crate::Config::rotate)
    /// is, as where its certificate ends. Default: no bound.
    fn max_age(&self) -> Duration {
        Duration::MAX
    }
}

/// Why a carrier that still works should have a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplaceReason {
    /// The relay has asked for it.
    Drain,
    /// The component has asked for it ([`Carriers::replace`](crate::Carriers::replace)).
    Requested,
    /// The identity was renewed.
    Identity,
    /// It is as old as it may become.
    Age,
    /// Its relay is held by a sibling, and there are others.
    Duplicate,
    /// The carrier's address came or went, another one leads to the relay now, or the machine has slept:
    /// the carrier may be dead.
    Network,
}

/// A dial that has failed.
pub trait DialFailure: Display + Send + Sync + 'static {
    /// A constant word for what went wrong, for the log throttle and the metric's label.
    fn kind(&self) -> &'static str;

    /// How long the relay asked to be left alone.
    fn retry_after(&self) -> Option<Duration>;

    /// Whether it ended at a relay that was to be avoided.
    fn is_unwanted(&self) -> bool;
}

impl DialFailure for DialError {
    fn kind(&self) -> &'static str {
        match self {
            Self::BadUrl { .. } => "bad-url",
            Self::Resolve { .. } => "resolve",
            Self::Connect { .. } => "connect",
            Self::Tls { .. } => "tls",
            Self::Proxy { fault, .. } => fault.kind(),
            Self::UnknownIssuer { .. } => "unknown-issuer",
            Self::ServerCertificateExpired { .. } => "server-certificate-expired",
            Self::WrongHost { .. } => "wrong-host",
            Self::Http { .. } => "http",
            Self::Busy { .. } => "busy",
            Self::NotARelay { .. } => "not-a-relay",
            Self::Unauthenticated => "unauthenticated",
            Self::Revoked => "revoked",
            Self::ClockSkew { .. } => "clock-skew",
            Self::CertificateExpired { .. } => "certificate-expired",
            Self::Version { .. } => "version",
            Self::Refused(_) => "refused",
            Self::Timeout { .. } => "timeout",
            Self::Unwanted(_) => "same-relay",
            _ => "other",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        Self::retry_after(self)
    }

    fn is_unwanted(&self) -> bool {
        matches!(self, Self::Unwanted(_))
    }
}
