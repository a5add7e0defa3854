use super::*;
use crate::{CheckError, Usage, Want, verify_signature};
use std::sync::atomic::{AtomicU64, Ordering};

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
    let issued = authority
        .redeem(&token.secret, &pending.csr_pem())
        .await
        .unwrap();
    pending.complete(issued.chain).unwrap()
}

async fn renew(authority: &Authority, identity: &Identity) -> Result<Identity, RenewError> {
    let pending = PendingIdentity::generate().unwrap();
    let issued = authority
        .renew(identity.as_peer(), pending.csr_der())
        .await?;
    Ok(pending.complete(issued.chain).unwrap())
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
    // Moving the relay does not move anybody's identity.
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
        Err(error @ Error::Corrupt { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let key = std::fs::read(state.join("ca.key")).unwrap();
    std::fs::remove_file(state.join("ca.key")).unwrap();
    assert!(error(Authority::open(&state).await).contains("ca.key"));
    let stranger = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    std::fs::write(state.join("ca.key"), stranger.serialize_pem()).unwrap();
    assert!(error(Authority::open_or_create(&state, &url()).await).contains("not the key"));
    std::fs::write(state.join("ca.key"), key).unwrap();
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
    std::fs::write(copy.path().join("authority.db"), nonsense).unwrap();
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
    let peer = check(&alice, Want::SESSION_USER).unwrap();
    assert_eq!(
        peer.id.to_string(),
        "spiffe://relay.example.com/user/alice@example.com"
    );
    assert_eq!(peer.groups, ["dev", "oidc:ops team"]);
    assert_eq!(&peer, alice.as_peer());
    assert!(verify_signature(&peer, b"m", &alice.sign(b"m").unwrap()));
    assert!(!verify_signature(&peer, b"n", &alice.sign(b"m").unwrap()));
    assert!(!verify_signature(&peer, b"m", b""));
    let peer = check(&prod, Want::SESSION_CLUSTER).unwrap();
    assert_eq!(
        peer.id.to_string(),
        "spiffe://relay.example.com/cluster/prod-eu"
    );
    check(&prod, Want::CARRIER).unwrap();

    assert_eq!(
        check(&prod, Want::SESSION_USER),
        Err(CheckError::WrongKind(Kind::Cluster))
    );
    assert_eq!(
        check(&alice, Want::SESSION_CLUSTER),
        Err(CheckError::WrongKind(Kind::User))
    );
    let as_server = Want {
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
        crate::jws::sign(&identity, &serde_json::json!({ "aud": "x".repeat(200) })).unwrap();
    let (peer, _) = crate::jws::verify::<serde_json::Value>(
        &token,
        authority.validator(),
        Want::CARRIER,
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
    let issued = authority
        .redeem(&token.secret, &csr.pem().unwrap())
        .await
        .unwrap();
    let peer = authority
        .validator()
        .check(&issued.chain, Want::SESSION_USER, set.now())
        .unwrap();
    assert_eq!((peer.id.name(), peer.groups.len()), ("bob", 0));
}

#[tokio::test]
async fn a_token_tells_its_fate_to_its_holder_only() {
    let set = Set::new();
    let authority = set.open().await;
    let csr = || PendingIdentity::generate().unwrap().csr_pem();
    let unknown = authority.redeem(&Secret::generate(), &csr()).await;
    assert!(matches!(unknown, Err(RedeemError::Unknown)));

    let token = authority
        .create_token(&cluster("a"), HOUR, &url())
        .await
        .unwrap();
    assert_eq!(token.pin, authority.roots().pins()[0]);
    let bad = authority.redeem(&token.secret, "nonsense").await;
    assert!(matches!(bad, Err(RedeemError::BadCsr(_))));
    // The bad request did not spend it.
    authority.redeem(&token.secret, &csr()).await.unwrap();
    let again = authority.redeem(&token.secret, &csr()).await;
    assert!(matches!(again, Err(RedeemError::AlreadyRedeemed { at }) if at == set.now()));

    let token = authority
        .create_token(&cluster("a"), HOUR, &url())
        .await
        .unwrap();
    set.wait(HOUR);
    let late = authority.redeem(&token.secret, &csr()).await;
    assert!(matches!(late, Err(RedeemError::Expired { at }) if at == set.now()));
}

#[tokio::test]
async fn bad_subjects_and_lives_are_refused() {
    let set = Set::new();
    let authority = set.open().await;
    for subject in [
        cluster("A"),
        cluster(""),
        user("a b", &[]),
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

/// Case 13 of the abuses: fifty at once, from two processes' worth of handles, and one wins.
#[tokio::test(flavor = "multi_thread")]
async fn one_of_fifty_redeems() {
    let set = Set::new();
    let (one, two) = (set.open().await, set.open().await);
    let token = one.create_token(&cluster("a"), HOUR, &url()).await.unwrap();
    let results = futures_all((0..50).map(|n| {
        let authority = if n % 2 == 0 { one.clone() } else { two.clone() };
        let secret = token.secret.clone();
        async move {
            let csr = PendingIdentity::generate().unwrap().csr_pem();
            authority.redeem(&secret, &csr).await
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
    let issued = authority
        .renew(new.as_peer(), pending.csr_der())
        .await
        .unwrap();
    let csr = pending.csr_der().to_vec();
    let newest = pending.complete(issued.chain).unwrap();
    let same = authority.renew(newest.as_peer(), &csr).await;
    assert!(matches!(same, Err(RenewError::BadCsr(_))));

    set.wait(5 * HOUR);
    assert!(matches!(
        renew(&authority, &old).await,
        Err(RenewError::Expired { .. })
    ));
    authority
        .validator()
        .revoke([new.serial().to_owned()].into());
    assert!(matches!(
        renew(&authority, &new).await,
        Err(RenewError::Revoked)
    ));
    let stranger = Set::new();
    let elsewhere = stranger.open().await;
    assert!(matches!(
        renew(&elsewhere, &newest).await,
        Err(RenewError::Unknown)
    ));
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
    let last = authority
        .renew(
            alice.as_peer(),
            PendingIdentity::generate().unwrap().csr_der(),
        )
        .await;
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
    // Nobody made a token for this one, so it is not made up here either.
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
            .check(alice.chain(), Want::SESSION_USER, now)
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
