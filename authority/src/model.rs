//! What the authority is asked for, by people and by commands.

use std::time::{Duration, SystemTime};

use throwline_certs::{Kind, NameError, SpiffeId, TrustDomain, spiffe};

pub(crate) const HOUR: Duration = Duration::from_secs(3600);
pub(crate) const DAY: Duration = Duration::from_secs(86_400);

/// Whom an enrolment token is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The agent of the cluster with this name.
    Cluster(String),
    /// A user, with the groups that Kubernetes sees.
    User {
        /// The name.
        name: String,
        /// The groups of the user.
        groups: Vec<String>,
    },
}

/// What is revoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// All certificates that a user has so far.
    User(String),
    /// All certificates that a cluster's agents have so far.
    Cluster(String),
    /// One certificate by its serial number, and those that were renewed from it.
    Certificate(String),
}

/// How long certificates live. The longer, the longer a stolen key serves its thief unless it is
/// revoked; the shorter, the sooner an authority that is down locks people out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Of users. Default 24 h.
    pub user: Duration,
    /// Of clusters. Default 7 days.
    pub agent: Duration,
    /// Of the relay's HTTPS certificate. Default 30 days.
    pub relay: Duration,
    /// For how long after its enrolment a user's certificate can be renewed, expired or not.
    /// Default 30 days.
    pub user_since_enrolment: Duration,
    /// For how long after its end a cluster's certificate can still be renewed. Default 90 days: an
    /// agent that was off for less reconnects by itself.
    pub agent_absence: Duration,
}

impl Default for Validity {
    fn default() -> Self {
        Self {
            user: 24 * HOUR,
            agent: 7 * DAY,
            relay: 30 * DAY,
            user_since_enrolment: 30 * DAY,
            agent_absence: 90 * DAY,
        }
    }
}

/// What a revocation was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Certificates of it that had not expired.
    pub certificates: u64,
    /// Enrolment tokens that can no longer be redeemed.
    pub tokens: u64,
}

/// What a cluster's name was given up with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Released {
    /// The UID that it was bound to.
    pub uid: Option<String>,
    /// When the last certificate under it ends, if any is good now and not revoked. Nothing of before is
    /// renewed.
    pub certificates_until: Option<SystemTime>,
}

impl Subject {
    /// The kind of identity.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Cluster(_) => Kind::Cluster,
            Self::User { .. } => Kind::User,
        }
    }

    /// The name of the cluster or user.
    pub fn name(&self) -> &str {
        match self {
            Self::Cluster(name) | Self::User { name, .. } => name,
        }
    }

    /// The groups of a user; empty for a cluster.
    pub fn groups(&self) -> &[String] {
        match self {
            Self::Cluster(_) => &[],
            Self::User { groups, .. } => groups,
        }
    }
}

impl Subject {
    /// Checks the names, once, where a token is made.
    pub(crate) fn check(&self, domain: &TrustDomain) -> Result<SpiffeId, NameError> {
        if let Self::User { groups, .. } = self {
            spiffe::check_groups(groups)?;
        }
        SpiffeId::new(domain.clone(), self.kind(), self.name())
    }
}
