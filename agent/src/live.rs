//! The registry of live sessions, their lines and the permissions of their requests, and the reasons
//! for which they are ended early.
//!
//! `LiveRegistry::end` is the one way to end them from outside; an entry ends by itself when its
//! certificate or its permission ends. The first reason counts.
//!
//! **Invariant:** a session's revocation is checked after its entry was made, and again after a renewed
//! certificate took its place, so that no revocation falls between the check and the registry.
//!
//! **Invariant:** an entry is selected by the present certificate of its session, and is in the registry
//! for as long as anything of the session lives.

use std::future::pending;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use throwline_certs::{CheckError, PeerIdentity, Validator};
use throwline_ops::{Live, LiveGuard};
use throwline_tunnel::line::Handle;
use throwline_tunnel::mux;
use throwline_tunnel::proto::line::ResetCode;
use tokio::sync::watch;
use tracing::debug;

use crate::message::from_agent;

/// The clock may be set during a wait, so it is read again at least this often.
const CLOCK_CHECK: Duration = Duration::from_secs(60);

/// Why the agent ends a session or a request early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndReason {
    /// The user's certificate was revoked.
    Revoked,
    /// It has expired, and no renewed one took its place.
    CertificateExpired,
    /// The permission of one request has ended.
    PermissionEnded,
    AgentStopping,
}

/// The facts by which entries are ended.
#[derive(Debug)]
struct LiveKey {
    /// The identity and the serial of the certificate that stands for the session now.
    credential: Arc<watch::Sender<PeerIdentity>>,
    cluster: Arc<str>,
}

type LiveEntry = LiveGuard<LiveKey, EndReason>;

/// The live sessions of this agent.
pub(crate) struct LiveRegistry {
    entries: Arc<Live<LiveKey, EndReason>>,
    validator: Validator,
    cluster: Arc<str>,
}

/// One session in the registry. Clones are of the same session.
#[derive(Clone)]
pub struct LiveSession {
    entry: Arc<LiveEntry>,
    entries: Arc<Live<LiveKey, EndReason>>,
    credential: Arc<watch::Sender<PeerIdentity>>,
    cluster: Arc<str>,
    /// The line below, whose other end receives the reason.
    line: Option<Handle<mux::Stream>>,
}

/// The permission of one request; in the registry only if it ends before its session.
pub(crate) struct Permission(Option<(LiveEntry, SystemTime)>);

impl LiveRegistry {
    pub(crate) fn new(validator: Validator, cluster: &str) -> Self {
        Self {
            entries: Arc::default(),
            validator,
            cluster: cluster.into(),
        }
    }

    /// Enters a session of this user.
    ///
    /// # Errors
    /// The certificate was revoked, or has expired, since it was checked.
    pub(crate) fn enter(
        &self,
        peer: PeerIdentity,
        line: Option<Handle<mux::Stream>>,
    ) -> Result<LiveSession, CheckError> {
        let session = LiveSession::enter(self.entries.clone(), self.cluster.clone(), peer, line);
        self.check(&session)?;
        Ok(session)
    }

    /// Whether the session's certificate is still valid, as when the session was opened.
    pub(crate) fn check(&self, session: &LiveSession) -> Result<(), CheckError> {
        let peer = session.credential.borrow();
        self.validator.check_standing(&peer, SystemTime::now())
    }

    /// Puts a renewed certificate under the session; true if it stands for the session now. The caller
    /// has checked the certificate, and that its holder has the session's other end.
    pub(crate) fn renew(&self, session: &LiveSession, newer: &PeerIdentity) -> bool {
        let is_renewed = session.renew(newer);
        if is_renewed && self.validator.is_revoked(newer) {
            session.entry.end(EndReason::Revoked);
        }
        is_renewed
    }

    /// Ends each session and permission for which `decide` returns a reason, by the identity with its
    /// certificate's serial, and the cluster. Returns their number.
    pub(crate) fn end(&self, decide: impl Fn(&PeerIdentity, &str) -> Option<EndReason>) -> usize {
        self.entries
            .end(|key| decide(&key.credential.borrow(), &key.cluster))
    }

    /// Ends everything of revoked identities and certificates, now and whenever the list changes.
    /// Returns only when there is no more list.
    pub(crate) async fn follow_revocations(&self) {
        let mut revocations = self.validator.subscribe();
        loop {
            let version = revocations.borrow_and_update().version();
            let ended = self.end_revoked();
            if ended > 0 {
                tracing::info!(ended, version, "sessions of revoked users were ended");
            }
            if revocations.changed().await.is_err() {
                return;
            }
        }
    }

    fn end_revoked(&self) -> usize {
        self.end(|identity, cluster| {
            let is_revoked = self.validator.is_revoked(identity);
            if is_revoked {
                debug!(id = %identity.id, serial = identity.serial, cluster, "ends what was revoked");
            }
            is_revoked.then_some(EndReason::Revoked)
        })
    }

    /// Ends everything, now and whatever enters later.
    pub(crate) fn close(&self) {
        self.entries.close(EndReason::AgentStopping);
    }
}

impl LiveSession {
    /// In a registry that holds this session alone.
    pub fn alone(peer: PeerIdentity) -> Self {
        Self::enter(Arc::default(), "".into(), peer, None)
    }

    fn enter(
        entries: Arc<Live<LiveKey, EndReason>>,
        cluster: Arc<str>,
        peer: PeerIdentity,
        line: Option<Handle<mux::Stream>>,
    ) -> Self {
        let credential = Arc::new(watch::Sender::new(peer));
        let entry = entries.enter(LiveKey {
            credential: credential.clone(),
            cluster: cluster.clone(),
        });
        Self {
            entry: Arc::new(entry),
            entries,
            credential,
            cluster,
            line,
        }
    }

    /// Enters the permission of one request of this session, which lasts until then at most.
    pub(crate) fn permit(&self, until: Option<SystemTime>) -> Permission {
        Permission(until.map(|until| {
            let entry = self.entries.enter(LiveKey {
                credential: self.credential.clone(),
                cluster: self.cluster.clone(),
            });
            if let Some(reason) = self.entry.ending().reason() {
                entry.end(reason);
            }
            (entry, until)
        }))
    }

    /// Accepts a renewed certificate of the same user that ends later. One with other groups is
    /// rejected: what runs was allowed to the groups of before.
    fn renew(&self, newer: &PeerIdentity) -> bool {
        self.credential.send_if_modified(|present| {
            let is_renewed = newer.id == present.id
                && newer.groups == present.groups
                && newer.not_after > present.not_after;
            if is_renewed {
                *present = newer.clone();
            }
            is_renewed
        }) || self.credential.borrow().fingerprint == newer.fingerprint
    }

    /// Waits until the session must end, and sends the reason to the line's other end.
    pub(crate) async fn ended(&self) -> EndReason {
        let ending = self.entry.ending();
        let reason = tokio::select! {
            reason = ending.ended() => reason,
            () = self.expired() => {
                ending.end(EndReason::CertificateExpired);
                // A revocation may have been first.
                ending.reason().unwrap_or(EndReason::CertificateExpired)
            }
        };
        if let (Some(line), Some(code)) = (&self.line, reason.reset_code()) {
            line.end(code, &from_agent(reason.text()));
        }
        reason
    }

    async fn expired(&self) {
        let mut credential = self.credential.subscribe();
        loop {
            let not_after = credential.borrow_and_update().not_after;
            tokio::select! {
                () = reached(not_after) => return,
                // The sender is in `self`.
                _ = credential.changed() => {}
            }
        }
    }
}

impl Permission {
    /// Waits for the end of the permission; never returns if it lasts as long as the session.
    pub(crate) async fn ended(&self) -> EndReason {
        let Some((entry, until)) = &self.0 else {
            return pending().await;
        };
        let ending = entry.ending();
        tokio::select! {
            reason = ending.ended() => reason,
            () = reached(*until) => {
                ending.end(EndReason::PermissionEnded);
                ending.reason().unwrap_or(EndReason::PermissionEnded)
            }
        }
    }

    /// Whether it may end before its session.
    pub(crate) fn is_limited(&self) -> bool {
        self.0.is_some()
    }
}

/// Waits for a moment of the wall clock.
async fn reached(moment: SystemTime) {
    while let Ok(left) = moment.duration_since(SystemTime::now()) {
        tokio::time::sleep((left + Duration::from_millis(1)).min(CLOCK_CHECK)).await;
    }
}

impl EndReason {
    /// For the audit.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::CertificateExpired => "expired",
            Self::PermissionEnded => "policy",
            Self::AgentStopping => "agent",
        }
    }

    /// `None`: the line ends by other means. A line at an agent that stops has its RESET from the
    /// registry of lines, behind everything that was written.
    fn reset_code(self) -> Option<ResetCode> {
        match self {
            Self::Revoked => Some(ResetCode::Revoked),
            Self::CertificateExpired => Some(ResetCode::Expired),
            Self::PermissionEnded | Self::AgentStopping => None,
        }
    }

    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Revoked => "the user's certificate was revoked",
            Self::CertificateExpired => "the user's certificate has expired",
            Self::PermissionEnded => "the permission for this request has ended",
            Self::AgentStopping => "the agent is stopping",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use throwline_certs::Revocations;

    fn peer(name: &str, serial: &str, ends_in: Duration) -> PeerIdentity {
        let now = SystemTime::now();
        PeerIdentity {
            id: format!("spiffe://d/user/{name}").parse().unwrap(),
            groups: vec!["dev".to_owned()],
            serial: serial.to_owned(),
            not_before: now,
            not_after: now + ends_in,
            fingerprint: throwline_certs::sha256(serial.as_bytes()),
            public_key: Vec::new(),
        }
    }

    fn reason(session: &LiveSession) -> Option<EndReason> {
        session.entry.ending().reason()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn the_revoked_end_and_no_others_and_no_new_ones_begin() {
        let authority = authority().await;
        let validator = authority.1.validator().clone();
        let live = Arc::new(LiveRegistry::new(validator.clone(), "prod-eu"));
        let following = Arc::clone(&live);
        let following = tokio::spawn(async move { following.follow_revocations().await });
        let dana = live.enter(peer("dana", "01", HOUR), None).unwrap();
        let kim = live.enter(peer("kim", "02", HOUR), None).unwrap();
        assert!(validator.replace_revocations(Revocations::new(1).serial("01")));
        assert_eq!(dana.ended().await, EndReason::Revoked);
        assert_eq!(reason(&kim), None);
        let again = live.enter(peer("dana", "01", HOUR), None);
        assert!(matches!(again, Err(CheckError::Revoked { .. })));
        assert!(live.check(&dana).is_err() && live.check(&kim).is_ok());
        // A renewed certificate's revocation ends what it stands for; the older one's does not.
        assert!(live.renew(&kim, &peer("kim", "03", 2 * HOUR)));
        assert!(validator.replace_revocations(Revocations::new(2).serial("02")));
        tokio::task::yield_now().await;
        assert_eq!(reason(&kim), None);
        assert!(validator.replace_revocations(Revocations::new(3).serial("03")));
        assert_eq!(kim.ended().await, EndReason::Revoked);
        drop((dana, kim));
        assert!(live.entries.is_empty());
        following.abort();
    }

    #[tokio::test]
    async fn one_call_ends_what_it_selects_by_identity_or_serial_and_nothing_else() {
        let authority = authority().await;
        let live = LiveRegistry::new(authority.1.validator().clone(), "prod-eu");
        let enter = |name, serial| live.enter(peer(name, serial, HOUR), None).unwrap();
        let (first, second, kim) = (enter("dana", "01"), enter("dana", "02"), enter("kim", "03"));
        let end = |selects: &dyn Fn(&PeerIdentity, &str) -> bool| {
            live.end(|identity, cluster| selects(identity, cluster).then_some(EndReason::Revoked))
        };
        assert_eq!(end(&|_, cluster| cluster == "other"), 0);
        assert_eq!(end(&|identity, _| identity.serial == "01"), 1);
        assert_eq!(
            [&first, &second, &kim].map(reason),
            [Some(EndReason::Revoked), None, None]
        );
        let permission = second.permit(Some(SystemTime::now() + HOUR));
        assert_eq!(end(&|identity, _| identity.id.name() == "dana"), 2);
        assert_eq!(permission.ended().await, EndReason::Revoked);
        assert_eq!(reason(&second), Some(EndReason::Revoked));
        assert_eq!(reason(&kim), None);
        // A permission under a session that has ended has ended, too.
        let late = second.permit(Some(SystemTime::now() + HOUR));
        assert_eq!(late.ended().await, EndReason::Revoked);
        live.close();
        assert_eq!(kim.ended().await, EndReason::AgentStopping);
        assert_eq!(reason(&enter("late", "04")), Some(EndReason::AgentStopping));
        drop((first, second, kim, permission, late));
        assert!(live.entries.is_empty());
    }

    #[tokio::test]
    async fn a_revocation_before_the_renewal_of_a_session_ends_it() {
        let authority = authority().await;
        let validator = authority.1.validator().clone();
        let live = LiveRegistry::new(validator.clone(), "prod-eu");
        let dana = live.enter(peer("dana", "01", HOUR), None).unwrap();
        assert!(validator.replace_revocations(Revocations::new(1).serial("02")));
        assert_eq!(live.end_revoked(), 0);
        live.renew(&dana, &peer("dana", "02", 2 * HOUR));
        assert_eq!(reason(&dana), Some(EndReason::Revoked));
    }

    #[tokio::test]
    async fn a_permission_ends_in_its_time_and_its_session_goes_on() {
        let session = LiveSession::alone(peer("dana", "01", HOUR));
        let permission = session.permit(Some(SystemTime::now() + Duration::from_millis(20)));
        assert!(permission.is_limited() && !session.permit(None).is_limited());
        assert_eq!(permission.ended().await, EndReason::PermissionEnded);
        assert_eq!(reason(&session), None);
        assert_eq!(session.entries.len(), 2);
        drop(permission);
        assert_eq!(session.entries.len(), 1);
    }

    #[tokio::test]
    async fn a_renewed_certificate_of_the_same_user_and_groups_takes_over() {
        let session = LiveSession::alone(peer("dana", "01", Duration::from_millis(150)));
        let mut others = peer("dana", "02", HOUR);
        others.groups.push("admins".to_owned());
        assert!(!session.renew(&peer("kim", "03", HOUR)));
        assert!(!session.renew(&others));
        assert!(!session.renew(&peer("dana", "04", Duration::ZERO)));
        assert_eq!(session.ended().await, EndReason::CertificateExpired);

        let session = LiveSession::alone(peer("dana", "01", Duration::from_millis(150)));
        assert!(session.renew(&peer("dana", "02", HOUR)));
        // A repetition is accepted.
        let renewed = session.credential.borrow().clone();
        assert!(session.renew(&renewed));
        let ended = tokio::time::timeout(Duration::from_millis(400), session.ended());
        assert!(ended.await.is_err());
    }

    async fn authority() -> (tempfile::TempDir, throwline_authority::Authority) {
        let dir = tempfile::tempdir().unwrap();
        let url = url::Url::parse("https://d").unwrap();
        let authority = throwline_authority::Authority::open_or_create(dir.path(), &url);
        let authority = authority.await.unwrap();
        (dir, authority)
    }
}
