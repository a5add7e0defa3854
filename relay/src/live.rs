//! The registry of live carriers and lines, and the reasons for which they are ended early.
//!
//! **Invariant:** revocation is checked after an entry was made, so that no revocation falls between
//! the check of a certificate and the registry.

use std::sync::Arc;

use throwline_certs::{PeerIdentity, Validator};
use throwline_ops::{Live, LiveGuard};
use throwline_tunnel::proto::close::CloseCode;
use tracing::debug;

/// Why a carrier or a line is ended by the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EndReason {
    Revoked,
    CertificateExpired,
    /// The policy's permission of a line has ended, and was not extended.
    PermissionEnded,
    /// A carrier that is for a renewal alone took too long.
    RenewalTimeout,
    RelayStopping,
}

/// The facts by which entries are ended.
#[derive(Debug)]
pub(crate) struct LiveKey {
    /// The identity and the serial of the carrier's certificate.
    pub(crate) identity: PeerIdentity,
    /// The destination of a line; `None` for a carrier.
    pub(crate) cluster: Option<String>,
}

pub(crate) type LiveEntry = LiveGuard<LiveKey, EndReason>;

pub(crate) struct LiveRegistry {
    entries: Arc<Live<LiveKey, EndReason>>,
    validator: Validator,
}

impl LiveRegistry {
    pub(crate) fn new(validator: Validator) -> Self {
        Self {
            entries: Arc::default(),
            validator,
        }
    }

    /// # Errors
    /// The identity was revoked meanwhile.
    pub(crate) fn enter_carrier(&self, identity: &PeerIdentity) -> Result<LiveEntry, EndReason> {
        self.enter(identity, None)
    }

    /// # Errors
    /// The identity was revoked meanwhile.
    pub(crate) fn enter_line(
        &self,
        identity: &PeerIdentity,
        cluster: &str,
    ) -> Result<LiveEntry, EndReason> {
        self.enter(identity, Some(cluster))
    }

    fn enter(
        &self,
        identity: &PeerIdentity,
        cluster: Option<&str>,
    ) -> Result<LiveEntry, EndReason> {
        let entry = self.entries.enter(LiveKey {
            identity: identity.clone(),
            cluster: cluster.map(str::to_owned),
        });
        if self.validator.is_revoked(identity) {
            return Err(EndReason::Revoked);
        }
        Ok(entry)
    }

    /// Ends everything of revoked identities and certificates; returns the number of entries.
    pub(crate) fn end_revoked(&self) -> usize {
        self.entries.end(|key| {
            let is_revoked = self.validator.is_revoked(&key.identity);
            if is_revoked {
                debug!(id = %key.identity.id, serial = key.identity.serial, cluster = key.cluster, "ends what was revoked");
            }
            is_revoked.then_some(EndReason::Revoked)
        })
    }

    /// Ends everything, now and whatever enters later.
    pub(crate) fn close(&self) {
        self.entries.close(EndReason::RelayStopping);
    }
}

impl EndReason {
    /// The label in metrics.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::CertificateExpired => "certificate-expired",
            Self::PermissionEnded => "permission-ended",
            Self::RenewalTimeout => "renewal-timeout",
            Self::RelayStopping => "relay-stopping",
        }
    }

    /// The code and the text with which a carrier is closed.
    pub(crate) fn close_code(self) -> (CloseCode, &'static str) {
        match self {
            Self::Revoked => (CloseCode::Revoked, "the identity was revoked"),
            Self::CertificateExpired => (CloseCode::Expired, "the certificate has expired"),
            // A permission is a line's; its carrier stays.
            Self::PermissionEnded => (CloseCode::Expired, "the permission has ended"),
            Self::RenewalTimeout => (CloseCode::Timeout, "the renewal took too long"),
            Self::RelayStopping => (CloseCode::GoingAway, "the relay is stopping"),
        }
    }
}
