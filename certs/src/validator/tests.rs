use super::*;
use crate::testing::{Forger, World, uri};
use proptest::prelude::*;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
};

fn validator(forger: &Forger) -> Validator {
    let roots = Roots::new(vec![forger.ca.clone()]).unwrap();
    let domain = roots.trust_domain().clone();
    Validator::new(roots, domain)
}

fn check(change: impl FnOnce(&mut CertificateParams)) -> Result<PeerIdentity, CheckError> {
    let forger = Forger::new("d");
    let leaf = forger.issue(&PKCS_ECDSA_P256_SHA256, change);
    validator(&forger).check(&[leaf], ExpectedPeer::SESSION_USER, SystemTime::now())
}

#[test]
fn a_good_one_is_good() {
    assert_eq!(
        check(|_| ()).unwrap().id.to_string(),
        "spiffe://d/user/alice"
    );
}

/// Even the authority itself cannot make us accept these.
#[test]
fn each_rule_is_checked() {
    let bad_name = |change: fn(&mut CertificateParams)| {
        let result = check(change);
        assert!(matches!(result, Err(CheckError::BadName(_))), "{result:?}");
    };
    bad_name(|params| params.subject_alt_names.clear());
    bad_name(|params| params.subject_alt_names.push(uri("spiffe://d/user/bob")));
    bad_name(|params| params.subject_alt_names = vec![uri("spiffe://other/user/alice")]);
    bad_name(|params| params.subject_alt_names = vec![uri("https://d/user/alice")]);
    bad_name(|params| params.subject_alt_names = vec![uri("spiffe://d/user/bob")]);
    bad_name(|params| {
        let name = SanType::DnsName("relay.example.com".try_into().unwrap());
        params.subject_alt_names.push(name);
    });
    bad_name(|params| {
        params
            .distinguished_name
            .push(DnType::OrganizationName, "a,b")
    });
    bad_name(|params| {
        params
            .distinguished_name
            .push(DnType::OrganizationName, "a\r\nb")
    });

    let bad_usage = |change: fn(&mut CertificateParams)| {
        let result = check(change);
        assert!(matches!(result, Err(CheckError::BadUsage(_))), "{result:?}");
    };
    bad_usage(|params| params.key_usages.clear());
    bad_usage(|params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]);
    bad_usage(|params| params.extended_key_usages.clear());
    bad_usage(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    bad_usage(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
}

#[test]
fn keys_on_other_curves_are_refused() {
    let forger = Forger::new("d");
    for algorithm in [&PKCS_ECDSA_P384_SHA384, &PKCS_ED25519] {
        let leaf = forger.issue(algorithm, |_| ());
        let result =
            validator(&forger).check(&[leaf], ExpectedPeer::SESSION_USER, SystemTime::now());
        assert!(
            matches!(
                &result,
                Err(CheckError::Malformed(MalformedCertificate::KeyType))
            ),
            "{result:?}"
        );
    }
}

#[test]
fn a_look_alike_authority_is_unknown() {
    let (ours, theirs) = (Forger::new("d"), Forger::new("d"));
    let leaf = theirs.issue(&PKCS_ECDSA_P256_SHA256, |_| ());
    let now = SystemTime::now();
    for chain in [vec![leaf.clone()], vec![leaf, theirs.ca.clone()]] {
        let result = validator(&ours).check(&chain, ExpectedPeer::SESSION_USER, now);
        assert_eq!(result, Err(CheckError::UnknownIssuer));
    }
}

#[tokio::test]
async fn a_user_cannot_issue() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let forger = Forger::with(&alice);
    let leaf = forger.issue(&PKCS_ECDSA_P256_SHA256, |params| {
        params.subject_alt_names = vec![uri("spiffe://relay.example.com/user/alice")];
    });
    let chain = [leaf, alice.chain()[0].clone()];
    let result =
        world
            .authority
            .validator()
            .check(&chain, ExpectedPeer::SESSION_USER, SystemTime::now());
    assert_eq!(result, Err(CheckError::UnknownIssuer));
}

#[test]
fn an_expired_stranger_is_a_stranger() {
    let (ours, theirs) = (Forger::new("d"), Forger::new("d"));
    let leaf = theirs.issue(&PKCS_ECDSA_P256_SHA256, |_| ());
    let later = SystemTime::now() + Duration::from_secs(86_400);
    let result = validator(&ours).check(&[leaf], ExpectedPeer::SESSION_USER, later);
    assert_eq!(result, Err(CheckError::UnknownIssuer));
}

#[test]
fn the_revoked_are_refused_in_every_clone() {
    let forger = Forger::new("d");
    let chain = [forger.issue(&PKCS_ECDSA_P256_SHA256, |_| ())];
    let validator = validator(&forger);
    let clone = validator.clone();
    let now = SystemTime::now();
    let peer = clone
        .check(&chain, ExpectedPeer::SESSION_USER, now)
        .unwrap();
    assert!(validator.replace_revocations(Revocations::new(1).serial(&peer.serial)));
    let result = clone.check(&chain, ExpectedPeer::SESSION_USER, now);
    assert_eq!(
        result,
        Err(CheckError::Revoked {
            serial: peer.serial
        })
    );
}

#[test]
fn sizes_are_bounded() {
    let forger = Forger::new("d");
    let validator = validator(&forger);
    let leaf = forger.issue(&PKCS_ECDSA_P256_SHA256, |_| ());
    let now = SystemTime::now();
    let huge = CertificateDer::from(vec![0x30; MAX_CERTIFICATE + 1]);
    for chain in [vec![], vec![leaf.clone(); MAX_CHAIN + 1], vec![leaf, huge]] {
        let result = validator.check(&chain, ExpectedPeer::SESSION_USER, now);
        assert!(
            matches!(result, Err(CheckError::Malformed(_))),
            "{result:?}"
        );
    }
}

proptest! {
    #[test]
    fn nothing_panics(bytes in any::<Vec<u8>>()) {
        let forger = Forger::new("d");
        let chain = [CertificateDer::from(bytes)];
        prop_assert!(validator(&forger).check(&chain, ExpectedPeer::CARRIER, SystemTime::now()).is_err());
    }

    /// Every byte of a certificate counts.
    #[test]
    fn no_change_is_overlooked(at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let forger = Forger::new("d");
        let mut leaf = forger.issue(&PKCS_ECDSA_P256_SHA256, |_| ()).to_vec();
        let at = at.index(leaf.len());
        leaf[at] ^= 1 << bit;
        let chain = [CertificateDer::from(leaf)];
        let result = validator(&forger).check(&chain, ExpectedPeer::SESSION_USER, SystemTime::now());
        prop_assert!(result.is_err(), "{at}");
    }
}
