use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use throwline_certs::directory::{Directory, DirectoryError, Issued, RedeemError, RenewError};
use throwline_certs::enrol::Asker;
use throwline_certs::tls::{HttpsCertificate, RelayIdentity, peer_of};
use throwline_certs::{
    CheckError, EnrolmentToken, Error as IdentityError, ExpectedPeer, Identity, Kind,
    PendingIdentity, Secret, Usage, files, renewal, verify_signature,
};
use url::Url;

use crate::authority::RENEWALS;
use crate::model::{DAY, HOUR};
use crate::store::Store;
use crate::testing::asker;
use crate::{Authority, Clock, Error, Subject, Target, Validity};

const RELAY: &str = "https://relay.example.com:8443";

/// An authority whose clock the test sets.
struct Set {
    dir: tempfile::TempDir,
    seconds: Arc<AtomicU64>,
}

impl Set {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            seconds: Arc::new(AtomicU64::new(1_800_000_000)),
        }
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.seconds.load(Ordering::SeqCst))
    }

    fn wait(&self, span: Duration) {
        self.seconds.fetch_add(span.as_secs(), Ordering::SeqCst);
    }

    async fn open(&self) -> Authority {
        let seconds = Arc::clone(&self.seconds);
        let clock: Clock = Arc::new(move || {
            SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.load(Ordering::SeqCst))
        });
        let state = self.dir.path().join("state");
        Authority::builder(&state)
            .clock(clock)
            .open_or_create(&url())
            .await
            .unwrap()
    }
}

fn url() -> Url {
    Url::parse(RELAY).unwrap()
}

fn user(name: &str, groups: &[&str]) -> Subject {
    Subject::User {
        name: name.to_owned(),
        groups: groups.iter().map(|&group| group.to_owned()).collect(),
    }
}

fn cluster(name: &str) -> Subject {
    Subject::Cluster(name.to_owned())
}

async fn enrol(authority: &Authority, subject: &Subject) -> Identity {
    let token = authority.create_token(subject, HOUR, &url()).await.unwrap();
    let pending = PendingIdentity::generate().unwrap();
    let request = token.request(&asker(subject), pending.csr_pem()).unwrap();
    let issued = authority.redeem(&request).await.unwrap();
    pending.complete(issued.chain).unwrap()
}

async fn renew(authority: &Authority, identity: &Identity) -> Result<Identity, RenewError> {
    let pending = PendingIdentity::generate().unwrap();
    let issued = renew_for(authority, identity, pending.csr_der()).await?;
    Ok(pending.complete(issued.chain).unwrap())
}

async fn renew_for(
    authority: &Authority,
    identity: &Identity,
    csr: &[u8],
) -> Result<Issued, RenewError> {
    let challenge = authority.renewal_challenge().unwrap();
    let signature = sign(authority, identity, &challenge, csr);
    let request = renewal::Request {
        chain: identity.chain(),
        csr,
        signature: &signature,
    };
    authority.renew(challenge, identity.id(), request).await
}

fn sign(
    authority: &Authority,
    identity: &Identity,
    challenge: &renewal::Challenge,
    csr: &[u8],
) -> Vec<u8> {
    let (nonce, pin) = (challenge.nonce(), challenge.authority());
    renewal::sign(identity, authority.roots(), nonce, pin, csr).unwrap()
}

#[tokio::test]
async fn is_made_once_and_found_again() {
    let set = Set::new();
    let missing = Authority::open(&set.dir.path().join("state")).await;
    assert!(
        matches!(missing, Err(Error::NoAuthority { .. })),
        "{missing:?}"
    );
    let first = set.open().await;
    let second = set.open().await;
    assert!(first.was_created() && !second.was_created());
    assert_eq!(first.roots(), second.roots());
    assert_eq!(first.trust_domain().as_str(), "relay.example.com");
    let moved = Url::parse("https://elsewhere.example.com").unwrap();
    second.set_relay_url(&moved).await.unwrap();
    assert_eq!(first.relay_url().await.unwrap(), moved);
    // Moving the relay changes no identity.
    let third = Authority::open_or_create(&set.dir.path().join("state"), &moved)
        .await
        .unwrap();
    assert_eq!(third.trust_domain().as_str(), "relay.example.com");
}

#[tokio::test(flavor = "multi_thread")]
async fn is_made_once_by_many_at_once() {
    let set = Set::new();
    let opened = futures_all((0..8).map(|_| {
        let state = set.dir.path().join("state");
        async move { Authority::open_or_create(&state, &url()).await.unwrap() }
    }))
    .await;
    assert_eq!(
        opened
            .iter()
            .filter(|authority| authority.was_created())
            .count(),
        1
    );
    assert!(
        opened
            .iter()
            .all(|authority| authority.roots() == opened[0].roots())
    );
}

#[cfg(unix)]
#[tokio::test]
async fn keeps_everything_to_itself() {
    use std::os::unix::fs::PermissionsExt;
    let set = Set::new();
    let authority = set.open().await;
    let token = authority
        .create_token(&cluster("a"), HOUR, &url())
        .await
        .unwrap();
    let state = set.dir.path().join("state");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&state), 0o700);
    for entry in std::fs::read_dir(&state).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
        let bytes = std::fs::read(&path).unwrap();
        let secret = token.secret.expose();
        assert!(!bytes.windows(43).any(|window| window == secret.as_bytes()));
    }
}

#[tokio::test]
async fn a_damaged_ca_is_named_and_not_replaced() {
    let set = Set::new();
    drop(set.open().await);
    let state = set.dir.path().join("state");
    let error = |result: Result<Authority, Error>| match result {
        Err(error @ Error::Identity(IdentityError::Corrupt { .. })) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let key = std::fs::read(state.join("ca.key")).unwrap();
    std::fs::remove_file(state.join("ca.key")).unwrap();
    assert!(error(Authority::open(&state).await).contains("ca.key"));
    let stranger = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    files::write_private(&state.join("ca.key"), stranger.serialize_pem().as_bytes()).unwrap();
    assert!(error(Authority::open_or_create(&state, &url()).await).contains("not the key"));
    files::write_private(&state.join("ca.key"), &key).unwrap();
    std::fs::write(state.join("ca.pem"), "nonsense").unwrap();
    assert!(error(Authority::open(&state).await).contains("ca.pem"));
}

#[tokio::test]
async fn a_damaged_database_is_named() {
    let set = Set::new();
    drop(set.open().await);
    let state = set.dir.path().join("state");
    let copy = tempfile::tempdir().unwrap();
    for file in ["ca.pem", "ca.key"] {
        std::fs::copy(state.join(file), copy.path().join(file)).unwrap();
    }
    let nonsense = "this is not a database at all".repeat(99);
    files::write_private(&copy.path().join("authority.db"), nonsense.as_bytes()).unwrap();
    let error = Authority::open(copy.path()).await.unwrap_err().to_string();
    assert!(error.contains("authority.db"), "{error}");
}

#[tokio::test]
async fn issues_what_validators_accept() {
    let set = Set::new();
    let authority = set.open().await;
    let alice = enrol(
        &authority,
        &user("alice@example.com", &["dev", "oidc:ops team"]),
    )
    .await;
    let prod = enrol(&authority, &cluster("prod-eu")).await;
    let check = |identity: &Identity, want| {
        authority
            .validator()
            .check(identity.chain(), want, set.now())
    };
    let peer = check(&alice, ExpectedPeer::SESSION_USER).unwrap();
    assert_eq!(
        peer.id.to_string(),
        "spiffe://relay.example.com/user/alice@example.com"
    );
    assert_eq!(peer.groups, ["dev", "oidc:ops team"]);
    assert_eq!(&peer, alice.as_peer());
    assert!(verify_signature(&peer, b"m", &alice.sign(b"m").unwrap()));
    assert!(!verify_signature(&peer, b"n", &alice.sign(b"m").unwrap()));
    assert!(!verify_signature(&peer, b"m", b""));
    let peer = check(&prod, ExpectedPeer::SESSION_CLUSTER).unwrap();
    assert_eq!(
        peer.id.to_string(),
        "spiffe://relay.example.com/cluster/prod-eu"
    );
    check(&prod, ExpectedPeer::CARRIER).unwrap();

    assert_eq!(
        check(&prod, ExpectedPeer::SESSION_USER),
        Err(CheckError::WrongKind(Kind::Cluster))
    );
    assert_eq!(
        check(&alice, ExpectedPeer::SESSION_CLUSTER),
        Err(CheckError::WrongKind(Kind::User))
    );
    let as_server = ExpectedPeer {
        kinds: &[Kind::User],
        usage: Usage::Server,
    };
    assert!(matches!(
        check(&alice, as_server),
        Err(CheckError::BadUsage(_))
    ));
}

#[tokio::test]
async fn the_largest_user_fits_into_an_assertion() {
    let set = Set::new();
    let authority = set.open().await;
    let groups: Vec<String> = (0..64).map(|n| format!("group-{n:010}")).collect();
    let subject = Subject::User {
        name: "u".repeat(128),
        groups,
    };
    let identity = enrol(&authority, &subject).await;
    let token =
        throwline_certs::jws::sign(&identity, &serde_json::json!({ "aud": "x".repeat(200) }))
            .unwrap();
    let (peer, _) = throwline_certs::jws::verify::<serde_json::Value>(
        &token,
        authority.validator(),
        ExpectedPeer::CARRIER,
        set.now(),
    )
    .unwrap();
    assert_eq!(peer.groups.len(), 64);
}

#[tokio::test]
async fn extensions_of_a_request_are_ignored() {
    let set = Set::new();
    let authority = set.open().await;
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::new(vec!["evil.example.com".to_owned()]).unwrap();
    let root = "spiffe://relay.example.com/user/root".try_into().unwrap();
    params.subject_alt_names.push(rcgen::SanType::URI(root));
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    params
        .distinguished_name
        .push(rcgen::DnType::OrganizationName, "system:masters");
    let csr = params.serialize_request(&key).unwrap();
    let token = authority
        .create_token(&user("bob", &[]), HOUR, &url())
        .await
        .unwrap();
    let request = token.request(&Asker::User, csr.pem().unwrap()).unwrap();
    let issued = authority.redeem(&request).await.unwrap();
    let peer = authority
        .validator()
        .check(&issued.chain, ExpectedPeer::SESSION_USER, set.now())
        .unwrap();
    assert_eq!((peer.id.name(), peer.groups.len()), ("bob", 0));
}

#[tokio::test]
async fn a_token_tells_its_fate_to_its_holder_only() {
    let set = Set::new();
    let authority = set.open().await;
    let csr = || PendingIdentity::generate().unwrap().csr_pem();
    let asker = asker(&cluster("a"));
    let redeem = async |token: &EnrolmentToken, csr: String| {
        authority.redeem(&token.request(&asker, csr).unwrap()).await
    };
    let unknown = EnrolmentToken {
        relay: url(),
        secret: Secret::generate(),
        pin: authority.roots().pins()[0],
    };
    let unknown = redeem(&unknown, csr()).await;
    assert!(matches!(unknown, Err(RedeemError::Unknown)));

    let token = authority
        .create_token(&cluster("a"), HOUR, &url())
        .await
        .unwrap();
    assert_eq!(token.pin, authority.roots().pins()[0]);
    let bad = redeem(&token, "nonsense".to_owned()).await;
    assert!(matches!(bad, Err(RedeemError::BadCsr(_))));
    // The bad request did not spend it, nor does one that was changed on its way.
    let mut changed = token.request(&asker, csr()).unwrap();
    changed.csr = csr();
    let changed = authority.redeem(&changed).await;
    assert!(matches!(changed, Err(RedeemError::NotSigned)));
    redeem(&token, csr()).await.unwrap();
    let again = redeem(&token, csr()).await;
    assert!(matches!(again, Err(RedeemError::AlreadyRedeemed { at }) if at == set.now()));

    let token = authority
        .create_token(&cluster("a"), HOUR, &url())
        .await
        .unwrap();
    set.wait(HOUR);
    let late = redeem(&token, csr()).await;
    assert!(matches!(late, Err(RedeemError::Expired { at }) if at == set.now()));
}

#[tokio::test]
async fn bad_subjects_and_lives_are_refused() {
    let set = Set::new();
    let authority = set.open().await;
    for subject in [
        cluster("A"),
        cluster(""),
        user("a\tb", &[]),
        user("a\u{202e}b", &[]),
        user("a", &["x,y"]),
        user("a", &["system:masters"]),
    ] {
        assert!(
            authority
                .create_token(&subject, HOUR, &url())
                .await
                .is_err(),
            "{subject:?}"
        );
    }
    for ttl in [Duration::ZERO, Duration::MAX] {
        assert!(
            authority
                .create_token(&cluster("a"), ttl, &url())
                .await
                .is_err()
        );
    }
    assert!(authority.clusters().await.unwrap().is_empty());
}

/// Kubernetes binds its own roles to such names.
#[tokio::test]
async fn names_of_kubernetes_own_are_refused_at_each_step_unless_allowed_there() {
    let set = Set::new();
    let strict = set.open().await;
    let names = ["system:nodes", "system:admin"].map(str::to_owned);
    let lenient = strict
        .clone()
        .with_system_names(throwline_policy::SystemNames::allowing(names.to_vec()).unwrap());
    for subject in [user("system:admin", &[]), user("a", &["system:nodes"])] {
        let refused = strict.create_token(&subject, HOUR, &url()).await;
        assert!(matches!(refused, Err(Error::SystemName(_))), "{refused:?}");

        let token = lenient.create_token(&subject, HOUR, &url()).await.unwrap();
        let pending = PendingIdentity::generate().unwrap();
        let request = token.request(&Asker::User, pending.csr_pem()).unwrap();
        let refused = strict.redeem(&request).await;
        assert!(matches!(refused, Err(RedeemError::SystemName(_))));
        // The refusal did not spend it.
        let issued = lenient.redeem(&request).await.unwrap();
        let identity = pending.complete(issued.chain).unwrap();
        let refused = renew(&strict, &identity).await;
        assert!(matches!(refused, Err(RenewError::SystemName(_))));
        renew(&lenient, &identity).await.unwrap();
    }
    let implied = user("a", &["devs", "system:authenticated"]);
    strict.create_token(&implied, HOUR, &url()).await.unwrap();
}

/// Case 13 of the abuses: fifty at once, from two processes' worth of handles, and one wins.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_fifty_redeems() {
    let set = Set::new();
    let (one, two) = (set.open().await, set.open().await);
    let token = one.create_token(&cluster("a"), HOUR, &url()).await.unwrap();
    let results = futures_all((0..50).map(|n| {
        let authority = if n % 2 == 0 { one.clone() } else { two.clone() };
        let token = token.clone();
        async move {
            let csr = PendingIdentity::generate().unwrap().csr_pem();
            let request = token.request(&asker(&cluster("a")), csr).unwrap();
            authority.redeem(&request).await
        }
    }))
    .await;
    let won = results.iter().filter(|result| result.is_ok()).count();
    let lost = |result: &&Result<_, _>| matches!(result, Err(RedeemError::AlreadyRedeemed { .. }));
    assert_eq!((won, results.iter().filter(lost).count()), (1, 49));
}

#[tokio::test]
async fn renewal_keeps_the_subject_and_changes_the_key() {
    let set = Set::new();
    let authority = set.open().await;
    let old = enrol(&authority, &user("alice", &["dev"])).await;
    set.wait(20 * HOUR);
    let new = renew(&authority, &old).await.unwrap();
    assert_eq!((new.id(), new.groups()), (old.id(), old.groups()));
    assert_ne!(new.as_peer().public_key, old.as_peer().public_key);
    assert_eq!(new.not_after(), set.now() + 24 * HOUR);
    assert!(new.renew_at() > set.now() + 15 * HOUR && new.renew_at() < set.now() + 17 * HOUR);

    // The old key in a new request is no renewal.
    let pending = PendingIdentity::generate().unwrap();
    let issued = renew_for(&authority, &new, pending.csr_der())
        .await
        .unwrap();
    let csr = pending.csr_der().to_vec();
    let newest = pending.complete(issued.chain).unwrap();
    let same = renew_for(&authority, &newest, &csr).await;
    assert!(matches!(same, Err(RenewError::BadCsr(_))));

    set.wait(5 * HOUR);
    assert!(matches!(
        renew(&authority, &old).await,
        Err(RenewError::Superseded)
    ));
    let target = Target::Certificate(new.serial().to_owned());
    assert_eq!(authority.revoke(&target).await.unwrap().certificates, 2);
    assert!(matches!(
        renew(&authority, &new).await,
        Err(RenewError::Revoked)
    ));
    let stranger = Set::new();
    let elsewhere = stranger.open().await;
    let challenge = elsewhere.renewal_challenge().unwrap();
    let request = renewal::Request {
        chain: newest.chain(),
        csr: &csr,
        signature: b"",
    };
    assert!(matches!(
        elsewhere.renew(challenge, newest.id(), request).await,
        Err(RenewError::Certificate(CheckError::UnknownIssuer))
    ));
}

#[tokio::test]
async fn only_the_old_key_renews() {
    let set = Set::new();
    let authority = set.open().await;
    let (alice, bob) = (
        enrol(&authority, &user("alice", &[])).await,
        enrol(&authority, &user("bob", &[])).await,
    );
    let attacker = PendingIdentity::generate().unwrap();
    let owner = PendingIdentity::generate().unwrap();
    let challenge = || authority.renewal_challenge().unwrap();
    let ask = async |challenge, carrier: &Identity, csr: &[u8], signature: &[u8]| {
        let request = renewal::Request {
            chain: alice.chain(),
            csr,
            signature,
        };
        authority.renew(challenge, carrier.id(), request).await
    };
    // An intermediary that carries a renewal sees the owner's signature, and substitutes its own request.
    let seen = challenge();
    let signed = sign(&authority, &alice, &seen, owner.csr_der());
    for (challenge, csr, signature) in [
        (challenge(), attacker.csr_der(), &b""[..]),
        (seen, attacker.csr_der(), &signed),
        (challenge(), attacker.csr_der(), &signed),
        (challenge(), owner.csr_der(), &signed),
    ] {
        let refused = ask(challenge, &alice, csr, signature).await;
        assert!(matches!(refused, Err(RenewError::NotSigned)), "{refused:?}");
    }
    // A key that is good for itself is not good for another.
    let given = challenge();
    let by_bob = sign(&authority, &bob, &given, attacker.csr_der());
    let refused = ask(given, &alice, attacker.csr_der(), &by_bob).await;
    assert!(matches!(refused, Err(RenewError::NotSigned)), "{refused:?}");
    let given = challenge();
    let signature = sign(&authority, &alice, &given, owner.csr_der());
    let refused = ask(given, &bob, owner.csr_der(), &signature).await;
    assert!(
        matches!(refused, Err(RenewError::WrongCarrier { .. })),
        "{refused:?}"
    );
    // A late answer is none.
    let given = challenge();
    let signature = sign(&authority, &alice, &given, owner.csr_der());
    set.wait(Duration::from_secs(61));
    let refused = ask(given, &alice, owner.csr_der(), &signature).await;
    assert!(matches!(refused, Err(RenewError::NotSigned)), "{refused:?}");

    let given = challenge();
    let signature = sign(&authority, &alice, &given, owner.csr_der());
    assert!(
        !ask(given, &alice, owner.csr_der(), &signature)
            .await
            .unwrap()
            .is_second
    );
}

#[tokio::test]
async fn a_second_key_for_one_certificate_is_reported_and_a_repeated_request_is_not() {
    let set = Set::new();
    let authority = set.open().await;
    let prod = enrol(&authority, &cluster("prod")).await;
    let pending = PendingIdentity::generate().unwrap();
    for _ in 0..2 {
        let issued = renew_for(&authority, &prod, pending.csr_der()).await;
        assert!(!issued.unwrap().is_second);
    }
    let reported = async || {
        authority
            .cluster("prod")
            .await
            .unwrap()
            .unwrap()
            .renewed_twice_at
    };
    assert_eq!(reported().await, None);
    let other = PendingIdentity::generate().unwrap();
    let issued = renew_for(&authority, &prod, other.csr_der()).await;
    assert!(issued.unwrap().is_second);
    assert_eq!(reported().await, Some(set.now()));
    // A new enrolment is the remedy.
    enrol(&authority, &cluster("prod")).await;
    assert_eq!(reported().await, None);
}

#[tokio::test]
async fn renewals_have_a_rate_and_old_certificates_are_forgotten() {
    let set = Set::new();
    let authority = set.open().await;
    let mut alice = enrol(&authority, &user("alice", &[])).await;
    let bob = enrol(&authority, &user("bob", &[])).await;
    for _ in 0..RENEWALS.0 {
        alice = renew(&authority, &alice).await.unwrap();
    }
    let refused = renew(&authority, &alice).await;
    let Err(RenewError::TooOften { retry_after }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(retry_after, HOUR);
    renew(&authority, &bob).await.unwrap();
    set.wait(retry_after);
    alice = renew(&authority, &alice).await.unwrap();

    // The next renewal after their end forgets all but what its owner may still need.
    set.wait(24 * HOUR);
    alice = renew(&authority, &alice).await.unwrap();
    assert_eq!(rows(&authority, "alice").await, 2);
    assert_eq!(rows(&authority, "bob").await, 2);
    // Bob never returns.
    assert_eq!(authority.prune().await.unwrap(), 0);
    set.wait(30 * DAY);
    assert_eq!(authority.prune().await.unwrap(), 4);
    assert_eq!(rows(&authority, "bob").await, 0);
    assert!(matches!(
        renew(&authority, &alice).await,
        Err(RenewError::Expired { .. })
    ));
}

async fn rows(authority: &Authority, name: &str) -> i64 {
    let Store::Sqlite { pool, .. } = &authority.store else {
        panic!("SQLite")
    };
    sqlx::query_scalar("SELECT count(*) FROM certificates WHERE name = $1")
        .bind(name)
        .fetch_one(pool)
        .await
        .unwrap()
}

#[tokio::test]
async fn an_expired_certificate_is_renewed_while_its_enrolment_holds() {
    let set = Set::new();
    let authority = set.open().await.with_validity(Validity {
        agent_absence: 10 * DAY,
        ..Validity::default()
    });
    let enrolled = set.now();
    let alice = enrol(&authority, &user("alice", &["dev"])).await;
    let prod = enrol(&authority, &cluster("prod")).await;
    // A weekend.
    set.wait(3 * DAY);
    assert!(alice.not_after() < set.now());
    let alice = renew(&authority, &alice).await.unwrap();
    assert_eq!(alice.groups(), ["dev"]);
    // Longer than a certificate of a cluster validity, and its absence may be.
    set.wait(13 * DAY);
    let prod = renew(&authority, &prod).await.unwrap();
    assert_eq!(
        authority.prune().await.unwrap(),
        0,
        "each may be the last that its owner has"
    );
    set.seconds.store(
        enrolled
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_secs()
            + 30 * DAY.as_secs(),
        Ordering::SeqCst,
    );
    let refused = renew(&authority, &alice).await;
    assert!(
        matches!(refused, Err(RenewError::EnrolmentTooOld { .. })),
        "{refused:?}"
    );
    set.wait(10 * DAY);
    let refused = renew(&authority, &prod).await;
    assert!(
        matches!(refused, Err(RenewError::Expired { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_revoked_certificate_is_never_renewed() {
    let set = Set::new();
    let authority = set.open().await;
    let alice = enrol(&authority, &user("alice", &[])).await;
    let target = Target::Certificate(alice.serial().to_owned());
    authority.revoke(&target).await.unwrap();
    for wait in [Duration::ZERO, 3 * DAY] {
        set.wait(wait);
        let refused = renew(&authority, &alice).await;
        assert!(matches!(refused, Err(RenewError::Revoked)), "{refused:?}");
    }
}

#[tokio::test]
async fn users_renew_for_thirty_days_and_clusters_for_ever() {
    let set = Set::new();
    let authority = set.open().await;
    let enrolled = set.now();
    let mut alice = enrol(&authority, &user("alice", &[])).await;
    let mut prod = enrol(&authority, &cluster("prod")).await;
    for _ in 0..40 {
        set.wait(18 * HOUR);
        prod = renew(&authority, &prod).await.unwrap();
        if set.now() < enrolled + 30 * DAY {
            alice = renew(&authority, &alice).await.unwrap();
        }
    }
    assert_eq!(alice.not_after(), enrolled + 30 * DAY);
    assert!(prod.not_after() > set.now());
    // On the last day there is nothing left to renew.
    let last = renew(&authority, &alice).await;
    let ended = |error: &RenewError| {
        matches!(
            error,
            RenewError::EnrolmentTooOld { .. } | RenewError::Expired { .. }
        )
    };
    assert!(last.as_ref().is_err_and(ended), "{last:?}");
}

#[tokio::test]
async fn clusters_are_remembered() {
    let set = Set::new();
    let authority = set.open().await;
    let made = set.now();
    authority
        .create_token(&cluster("b"), HOUR, &url())
        .await
        .unwrap();
    set.wait(HOUR);
    enrol(&authority, &cluster("a")).await;
    let enrolled = set.now();
    set.wait(HOUR);
    authority.record_connected("a", "0.1.0").await.unwrap();
    let connected = set.now();
    authority.record_status("a", "v1.36.0", "").await.unwrap();
    set.wait(HOUR);
    authority.record_disconnected("a").await.unwrap();
    // No token was made for this one, so it is not made up here either.
    authority.record_connected("ghost", "").await.unwrap();
    let clusters = authority.clusters().await.unwrap();
    let names: Vec<_> = clusters
        .iter()
        .map(|cluster| cluster.name.as_str())
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert_eq!(
        (clusters[1].created_at, clusters[1].enrolled_at),
        (made, None)
    );
    let a = authority.cluster("a").await.unwrap().unwrap();
    assert_eq!(a, clusters[0]);
    assert_eq!(
        (a.enrolled_at, a.last_connected_at),
        (Some(enrolled), Some(connected))
    );
    assert_eq!(a.last_seen_at, Some(set.now()));
    assert_eq!(a.kubernetes_version.as_deref(), Some("v1.36.0"));
    assert_eq!(a.agent_version.as_deref(), Some("0.1.0"));
    assert!(authority.cluster("ghost").await.unwrap().is_none());
}

/// Case 12: minutes of skew are named, a minute is forgiven.
#[tokio::test]
async fn clocks_that_differ() {
    let set = Set::new();
    let authority = set.open().await;
    let alice = enrol(&authority, &user("alice", &[])).await;
    let check = |now| {
        authority
            .validator()
            .check(alice.chain(), ExpectedPeer::SESSION_USER, now)
    };
    let minute = Duration::from_secs(60);
    for now in [
        set.now() - minute,
        set.now(),
        set.now() + minute,
        set.now() + 10 * minute,
    ] {
        check(now).unwrap();
    }
    let early = check(set.now() - 10 * minute).unwrap_err();
    assert!(matches!(early, CheckError::NotYetValid { .. }), "{early}");
    assert!(early.to_string().contains("9 min 0 s before"), "{early}");
    let late = check(alice.not_after() + 10 * minute).unwrap_err();
    assert!(late.to_string().contains("10 min 0 s ago"), "{late}");
}

/// `join_all` on real tasks.
async fn futures_all<F>(futures: impl Iterator<Item = F>) -> Vec<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    let tasks: Vec<_> = futures.map(tokio::spawn).collect();
    let mut results = Vec::new();
    for task in tasks {
        results.push(task.await.unwrap());
    }
    results
}

#[tokio::test]
async fn what_is_revoked_stays_so_and_may_enrol_again() {
    let set = Set::new();
    let authority = set.open().await;
    // The command runs in another process.
    let command = set.open().await;
    let dana = enrol(&authority, &user("dana", &["dev"])).await;
    let kim = enrol(&authority, &user("kim", &["dev"])).await;
    let open = authority
        .create_token(&user("dana", &["dev"]), HOUR, &url())
        .await
        .unwrap();
    assert_eq!(authority.refresh_revocations().await.unwrap(), None);

    let revoked = command.revoke(&Target::User("dana".to_owned())).await;
    let revoked = revoked.unwrap();
    assert_eq!((revoked.certificates, revoked.tokens), (1, 1));
    // Renewal asks the table, before the relay has read the list.
    assert!(matches!(
        renew(&authority, &dana).await,
        Err(RenewError::Revoked)
    ));
    let signed = authority.refresh_revocations().await.unwrap().unwrap();
    let list = signed.verify(authority.roots()).unwrap();
    assert!(list.covers(dana.as_peer()) && !list.covers(kim.as_peer()));
    assert_eq!(*authority.validator().revocations(), list);
    assert_eq!(authority.refresh_revocations().await.unwrap(), None);
    let check = |identity: &Identity| {
        let validator = authority.validator();
        validator.check(identity.chain(), ExpectedPeer::SESSION_USER, set.now())
    };
    assert!(matches!(check(&dana), Err(CheckError::Revoked { .. })));
    assert!(check(&kim).is_ok());
    assert!(renew(&authority, &kim).await.is_ok());
    // A token from before is void.
    let pending = PendingIdentity::generate().unwrap();
    let request = open.request(&Asker::User, pending.csr_pem()).unwrap();
    let late = authority.redeem(&request).await;
    assert!(matches!(late, Err(RedeemError::Expired { .. })), "{late:?}");

    // Within the same second, by a new token.
    let again = enrol(&authority, &user("dana", &["dev"])).await;
    assert!(check(&again).is_ok());
    assert!(renew(&authority, &again).await.is_ok());
    assert!(matches!(check(&dana), Err(CheckError::Revoked { .. })));

    // The same instant, another revocation: the version rises all the same.
    let before = authority.validator().revocations().version();
    command
        .revoke(&Target::User("kim".to_owned()))
        .await
        .unwrap();
    authority.refresh_revocations().await.unwrap().unwrap();
    assert!(authority.validator().revocations().version() > before);
    assert!(check(&again).is_ok());

    // Long after, the list is empty again, and renewal is still refused.
    set.wait(90 * DAY);
    command
        .revoke(&Target::User("dana".to_owned()))
        .await
        .unwrap();
    authority.refresh_revocations().await.unwrap().unwrap();
    assert_eq!(authority.validator().revocations().len(), 1);
    for unknown in [
        Target::User("nobody".to_owned()),
        Target::Cluster("dana".to_owned()),
        Target::Certificate("00".to_owned()),
    ] {
        let refused = command.revoke(&unknown).await;
        assert!(
            matches!(
                refused,
                Err(Error::NothingToRevoke { .. } | Error::UnknownSerial { .. })
            ),
            "{refused:?}"
        );
    }
}
async fn redeem_as(
    authority: &Authority,
    subject: &Subject,
    asker: &Asker,
) -> (EnrolmentToken, Result<Identity, RedeemError>) {
    let token = authority.create_token(subject, HOUR, &url()).await.unwrap();
    let result = again(authority, &token, asker).await;
    (token, result)
}

async fn again(
    authority: &Authority,
    token: &EnrolmentToken,
    asker: &Asker,
) -> Result<Identity, RedeemError> {
    let pending = PendingIdentity::generate().unwrap();
    let request = token.request(asker, pending.csr_pem()).unwrap();
    let issued = authority.redeem(&request).await?;
    Ok(pending.complete(issued.chain).unwrap())
}

fn at(uid: &str) -> Asker {
    Asker::Cluster {
        uid: uid.to_owned(),
    }
}

#[tokio::test]
async fn a_token_of_the_wrong_kind_is_not_used_up() {
    let set = Set::new();
    let authority = set.open().await;
    for (subject, wrong, right) in [
        (user("alice", &[]), at("1f"), Asker::User),
        (cluster("prod"), Asker::User, at("1f")),
    ] {
        let (token, refused) = redeem_as(&authority, &subject, &wrong).await;
        let text = refused.unwrap_err().to_string();
        assert!(text.contains("not used up"), "{text}");
        again(&authority, &token, &right).await.unwrap();
    }
    // An agent that sends no location, or nonsense.
    for uid in ["", "a b", &"a".repeat(65)] {
        let (_, refused) = redeem_as(&authority, &cluster("b"), &at(uid)).await;
        assert!(matches!(refused, Err(RedeemError::NoClusterUid)));
    }
}

#[tokio::test]
async fn a_name_belongs_to_the_cluster_that_had_it_first_until_it_is_given_up() {
    let set = Set::new();
    let authority = set.open().await;
    let prod = cluster("prod");
    let (_, first) = redeem_as(&authority, &prod, &at("one")).await;
    let first = first.unwrap();
    // Its replicas, and its agents outside of it, are the same cluster.
    redeem_as(&authority, &prod, &at("one")).await.1.unwrap();
    let (token, refused) = redeem_as(&authority, &prod, &at("two")).await;
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("throwline cluster release prod"), "{text}");
    // Another name is another matter, and one cluster may have two.
    redeem_as(&authority, &cluster("test"), &at("two"))
        .await
        .1
        .unwrap();

    assert_eq!(authority.release_cluster("nobody").await.unwrap(), None);
    set.wait(Duration::from_secs(60));
    let released = authority.release_cluster("prod").await.unwrap().unwrap();
    assert_eq!(released.uid.as_deref(), Some("one"));
    assert_eq!(released.certificates_until, Some(first.not_after()));
    set.wait(Duration::from_secs(1));
    let second = again(&authority, &token, &at("two")).await.unwrap();
    let refused = renew(&authority, &first).await;
    assert!(matches!(refused, Err(RenewError::Released)), "{refused:?}");
    renew(&authority, &second).await.unwrap();
    let (_, refused) = redeem_as(&authority, &prod, &at("one")).await;
    assert!(matches!(refused, Err(RedeemError::NameTaken { .. })));
}

#[tokio::test]
async fn a_revoked_cluster_keeps_its_name_until_that_is_given_up() {
    let set = Set::new();
    let authority = set.open().await;
    let prod = cluster("prod");
    let first = redeem_as(&authority, &prod, &at("one")).await.1.unwrap();
    set.wait(Duration::from_secs(60));
    let target = Target::Cluster("prod".to_owned());
    authority.revoke(&target).await.unwrap();
    authority.refresh_revocations().await.unwrap().unwrap();
    // The same cluster enrols again at once, and its new certificate counts.
    let second = redeem_as(&authority, &prod, &at("one")).await.1.unwrap();
    let validator = authority.validator();
    assert!(validator.is_revoked(first.as_peer()) && !validator.is_revoked(second.as_peer()));
    // Another cluster gets the remedy, and its token is good afterwards.
    let (token, refused) = redeem_as(&authority, &prod, &at("two")).await;
    let text = refused.unwrap_err().to_string();
    assert!(text.contains("throwline cluster release prod"), "{text}");
    assert!(text.contains("not used up"), "{text}");

    // Only certificates that are good are reported.
    let released = authority.release_cluster("prod").await.unwrap().unwrap();
    assert_eq!(released.certificates_until, Some(second.not_after()));
    let serial = Target::Certificate(second.serial().to_owned());
    authority.revoke(&serial).await.unwrap();
    let released = authority.release_cluster("prod").await.unwrap().unwrap();
    assert_eq!(released.certificates_until, None);
    set.wait(Duration::from_secs(1));
    let other = again(&authority, &token, &at("two")).await.unwrap();
    renew(&authority, &other).await.unwrap();
    let refused = renew(&authority, &second).await;
    assert!(matches!(refused, Err(RenewError::Revoked)), "{refused:?}");
}

/// Who has the key of the public certificate is no relay to other relays.
#[tokio::test]
async fn the_public_certificate_is_no_identity() {
    let set = Set::new();
    let authority = set.open().await;
    let hosts = ["relay.example.com".to_owned(), "::1".to_owned()];
    let pending = PendingIdentity::generate().unwrap();
    let issued = authority.certify_https(&hosts, pending.csr_der()).unwrap();
    let name = peer_of(&issued.chain).map(|peer| peer.id.to_string());
    assert!(name.is_err(), "{name:?}");
    for want in [ExpectedPeer::PEER_CLIENT, ExpectedPeer::PEER_SERVER] {
        let checked = authority.validator().check(&issued.chain, want, set.now());
        assert!(checked.is_err(), "{checked:?}");
    }
    // An enrolling part holds the last of the chain against its token's pin.
    assert_eq!(&issued.chain[1..], authority.roots().certificates());
}

/// The keys stay with the relay, which asks as it would ask a distant authority.
#[tokio::test]
async fn a_relay_renews_its_certificates_when_they_are_due() {
    let set = Set::new();
    let authority = set.open().await;
    let directory: Arc<dyn Directory> = Arc::new(authority.clone());
    let relay = RelayIdentity::issue(Arc::clone(&directory), "a").await;
    let relay = relay.unwrap();
    let first = relay.current();
    let check = |identity: &Identity| {
        let want = ExpectedPeer::PEER_SERVER;
        authority
            .validator()
            .check(identity.chain(), want, set.now())
    };
    assert_eq!(
        check(&first).unwrap().id.to_string(),
        relay.id().to_string()
    );
    set.wait(19 * DAY);
    relay.renew_if_due().await;
    assert_eq!(relay.current().serial(), first.serial());
    set.wait(DAY);
    relay.renew_if_due().await;
    let second = relay.current();
    assert_ne!(second.serial(), first.serial());
    assert_ne!(second.as_peer().public_key, first.as_peer().public_key);
    check(&second).unwrap();

    let https = HttpsCertificate::issue(Arc::clone(&directory), &url()).await;
    https.unwrap().renew_if_due().await;
    let pending = PendingIdentity::generate().unwrap();
    for (instance, csr) in [("no label", pending.csr_der()), ("a", b"".as_slice())] {
        let refused = directory.certify_relay(instance, csr).await;
        assert!(
            matches!(refused, Err(DirectoryError::Refused { .. })),
            "{refused:?}"
        );
    }
}
