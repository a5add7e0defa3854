//! Renewals: by the old key and by nothing else, also when it is the last thing that a certificate is
//! good for.

use std::time::{Duration, SystemTime};

use throwline_authority::Validity;
use throwline_certs::{Identity, PendingIdentity, renewal};
use throwline_tunnel::carrier::{Connection, DialError, dial};
use throwline_tunnel::message;
use throwline_tunnel::proto::close::CloseCode;
use throwline_tunnel::proto::messages::{
    Certificate, ClusterList, Control, ListClusters, Refusal, RefusalCode, Renewal,
    RenewalChallenge, RenewalReply, RenewalRequest, RenewalVerdict, StreamKind,
};
use throwline_tunnel::proto::wire::CERTIFICATE_CAP;
use throwline_tunnel::renewal::{RenewalError, ask};

use crate::harness::{PATIENCE, Setup, World, open, refused};

async fn renew(
    world: &World,
    connection: &Connection,
    identity: &Identity,
    pending: &PendingIdentity,
) -> Result<Certificate, RenewalError> {
    let csr = pending.csr_der();
    ask(&connection.carrier, chain(identity), csr, |asked| {
        let (nonce, authority) = (&asked.nonce, &asked.authority);
        let roots = world.authority.roots();
        Ok(renewal::sign(identity, roots, nonce, authority, csr)?)
    })
    .await
}

fn chain(identity: &Identity) -> Vec<Vec<u8>> {
    identity.chain().iter().map(|der| der.to_vec()).collect()
}

fn completed(pending: &PendingIdentity, certificate: Certificate) -> Identity {
    let chain = certificate.chain.into_iter().map(Into::into).collect();
    pending.again().complete(chain).unwrap()
}

fn outcome(world: &World, outcome: &str) -> f64 {
    world.metric(&format!(
        r#"throwline_relay_renewals_total{{outcome="{outcome}"}}"#
    ))
}

#[tokio::test]
async fn a_renewed_identity_is_the_same_with_another_key() {
    let world = World::new().await;
    for identity in [world.cluster("prod").await, world.user("anna").await] {
        let connection = world.dial(&identity).await.unwrap();
        let pending = PendingIdentity::generate().unwrap();
        let renewed = renew(&world, &connection, &identity, &pending).await;
        let renewed = renewed.unwrap();
        assert_eq!(
            renewed.ca,
            [world.authority.roots().certificates()[0].to_vec()]
        );
        let renewed = completed(&pending, renewed);
        assert_eq!(renewed.id(), identity.id());
        assert_eq!(renewed.groups(), identity.groups());
        assert_ne!(renewed.serial(), identity.serial());
        let again = world.dial(&renewed).await.unwrap();
        drop((connection, again));
    }
    assert_eq!(outcome(&world, "issued"), 2.0);
    world.end().await;
}

/// A request by a peer that has the carrier and not the key.
async fn ask_unsigned(
    connection: &Connection,
    request: impl FnOnce(&RenewalChallenge) -> RenewalRequest,
) -> Refusal {
    let header = StreamKind::Renewal(Renewal {}).into();
    let (mut stream, _) = connection.carrier.open(header).await.unwrap();
    let challenge = message::read(&mut stream, CERTIFICATE_CAP).await.unwrap();
    let request = request(&challenge);
    message::write(&mut stream, &request, CERTIFICATE_CAP)
        .await
        .unwrap();
    let reply: RenewalReply = message::read(&mut stream, CERTIFICATE_CAP).await.unwrap();
    match reply.verdict {
        Some(RenewalVerdict::Refused(refusal)) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn a_carrier_alone_renews_nothing() {
    let world = World::plaintext().await;
    let (anna, mallory) = (world.user("anna").await, world.user("mallory").await);
    let attacker = PendingIdentity::generate().unwrap();
    let csr = attacker.csr_der().to_vec();
    let sign = |identity: &Identity, asked: &RenewalChallenge| {
        let roots = world.authority.roots();
        renewal::sign(identity, roots, &asked.nonce, &asked.authority, &csr).unwrap()
    };
    // The first has nothing, the second another key, the third shows its own certificate with it.
    for attempt in 0..3 {
        let carrier = world.proxy(&anna).await;
        let refusal = ask_unsigned(&carrier, |asked| RenewalRequest {
            chain: chain(if attempt == 2 { &mallory } else { &anna }),
            csr: csr.clone(),
            signature: match attempt {
                0 => Vec::new(),
                _ => sign(&mallory, asked),
            },
        })
        .await;
        assert_eq!(refusal.code(), RefusalCode::NotAllowed, "{attempt}");
        drop(carrier);
    }
    assert_eq!(outcome(&world, "not-signed"), 3.0);

    // Nonsense, and a second one while the carrier waits for what it did.
    let carrier = world.proxy(&anna).await;
    let refusal = ask_unsigned(&carrier, |_| RenewalRequest {
        chain: vec![b"nonsense".to_vec(); 99],
        csr: b"nonsense".to_vec(),
        signature: b"nonsense".to_vec(),
    })
    .await;
    assert_eq!(refusal.code(), RefusalCode::NotAllowed);
    let refusal = refused(&carrier, StreamKind::Renewal(Renewal {})).await;
    assert_eq!(refusal.code(), RefusalCode::Limit);
    assert!(refusal.retry_after_ms > 0);
    drop(carrier);
    assert_eq!(outcome(&world, "issued"), 0.0);
    world.end().await;
}

#[tokio::test]
async fn a_challenge_is_good_for_one_answer_at_one_relay() {
    let world = World::plaintext().await;
    let anna = world.user("anna").await;
    let pending = PendingIdentity::generate().unwrap();
    let carrier = world.proxy(&anna).await;
    let mut seen = None;
    let csr = pending.csr_der();
    ask(&carrier.carrier, chain(&anna), csr, |asked| {
        let roots = world.authority.roots();
        let signature = renewal::sign(&anna, roots, &asked.nonce, &asked.authority, csr)?;
        seen = Some(signature.clone());
        Ok(signature)
    })
    .await
    .unwrap();
    let replayed = ask_unsigned(&carrier, |_| RenewalRequest {
        chain: chain(&anna),
        csr: csr.to_vec(),
        signature: seen.clone().unwrap(),
    })
    .await;
    assert_eq!(replayed.code(), RefusalCode::NotAllowed);
    drop(carrier);
    world.end().await;
}

#[tokio::test]
async fn two_keys_for_one_certificate_are_counted_and_shown() {
    let world = World::plaintext().await;
    let prod = world.cluster("prod").await;
    let carrier = world.dial(&prod).await.unwrap();
    for _ in 0..2 {
        let pending = PendingIdentity::generate().unwrap();
        renew(&world, &carrier, &prod, &pending).await.unwrap();
    }
    assert_eq!(
        (outcome(&world, "issued"), outcome(&world, "second-key")),
        (1.0, 1.0)
    );
    let said = shown(&world).await;
    assert!(said.contains("renewed with two keys"), "{said}");
    drop(carrier);
    world.end().await;
}

/// What a user sees beside the one cluster.
async fn shown(world: &World) -> String {
    let proxy = world.proxy(&world.user("anna").await).await;
    let header = StreamKind::ListClusters(ListClusters {}).into();
    let (mut stream, _) = proxy.carrier.open(header).await.unwrap();
    let mut list: ClusterList = message::read_long(&mut stream, 65_536).await.unwrap();
    list.clusters.remove(0).message
}

#[tokio::test]
async fn two_agents_with_one_certificate_are_counted_and_shown() {
    let world = World::configured(|config| {
        config.timing.double_after = Duration::from_millis(300);
    })
    .await;
    let (prod, replica) = (world.cluster("prod").await, world.cluster("prod").await);
    let doubles = "throwline_relay_double_agents_total";
    let one = world.agent(&prod).await;
    let other = world.agent(&replica).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(world.metric(doubles), 0.0, "replicas have their own");
    let said = shown(&world).await;
    assert!(!said.contains("one certificate"), "{said}");

    let copy = world.agent(&prod).await;
    world.until_metric(doubles, |count| count == 1.0).await;
    let said = shown(&world).await;
    assert!(
        said.contains("two agents run with one certificate"),
        "{said}"
    );
    drop((one, other, copy));
    world.end().await;
}

/// A certificate that has ended two seconds after its enrolment.
async fn ended(lives: Validity) -> (World, Identity) {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        lives: Validity {
            user: Duration::from_secs(1),
            ..lives
        },
        ..Setup::default()
    })
    .await;
    let anna = world.user("anna").await;
    while SystemTime::now() <= anna.not_after() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    (world, anna)
}

#[tokio::test]
async fn an_expired_certificate_is_good_for_its_renewal_and_nothing_else() {
    let (world, anna) = ended(Validity::default()).await;
    let refused_whole = world.dial(&anna).await.unwrap_err();
    assert!(
        matches!(refused_whole, DialError::CertificateExpired { .. }),
        "{refused_whole}"
    );
    let mut config = world.dial_config(&anna);
    config.for_renewal = true;
    let carrier = dial(&config).await.unwrap();
    for kind in [
        StreamKind::Open(open("prod")),
        StreamKind::ListClusters(ListClusters {}),
        StreamKind::Control(Control {}),
    ] {
        let refusal = refused(&carrier, kind).await;
        assert_eq!(refusal.code(), RefusalCode::NotAllowed);
    }
    let pending = PendingIdentity::generate().unwrap();
    let renewed = renew(&world, &carrier, &anna, &pending).await.unwrap();
    assert_eq!(completed(&pending, renewed).groups(), anna.groups());
    drop(carrier);
    world.end().await;
}

#[tokio::test]
async fn an_enrolment_that_is_over_opens_nothing() {
    let (world, anna) = ended(Validity {
        user_since_enrolment: Duration::from_secs(1),
        ..Validity::default()
    })
    .await;
    let mut config = world.dial_config(&anna);
    config.for_renewal = true;
    let error = dial(&config).await.unwrap_err();
    assert!(
        matches!(error, DialError::CertificateExpired { .. }),
        "{error}"
    );
    world.end().await;
}

#[tokio::test]
async fn a_carrier_for_a_renewal_is_none_of_an_agent() {
    let world = World::plaintext().await;
    let prod = world.cluster("prod").await;
    let mut config = world.dial_config(&prod);
    config.for_renewal = true;
    let carrier = dial(&config).await.unwrap();
    world
        .until_metric(r#"throwline_relay_carriers{role="renewal"}"#, |n| n == 1.0)
        .await;
    assert_eq!(
        world.metric(r#"throwline_relay_carriers{role="agent"}"#),
        0.0
    );
    let proxy = world.proxy(&world.user("anna").await).await;
    let refusal = refused(&proxy, open("prod")).await;
    assert_eq!(refusal.code(), RefusalCode::NeverConnected);
    carrier.carrier.close(CloseCode::Normal, "done");
    tokio::time::timeout(PATIENCE, carrier.carrier.closed())
        .await
        .unwrap();
    drop((carrier, proxy));
    world.end().await;
}
