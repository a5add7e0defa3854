//! Tokens redeemed over HTTP.

use std::time::Duration;

use throwline_authority::Subject;
use throwline_certs::enrol::{self, Asker, EnrolRequest};
use throwline_certs::tls::Trust;
use throwline_certs::{EnrolmentToken, PendingIdentity};

use crate::harness::{Setup, World, eventually, unix_now};
use crate::raw::{self, Answer};

async fn token(world: &World, life: Duration) -> EnrolmentToken {
    let subject = Subject::Cluster("prod".into());
    world
        .authority
        .create_token(&subject, life, &world.url)
        .await
        .unwrap()
}

fn body(token: &EnrolmentToken) -> String {
    serde_json::to_string(&request(token, &prod())).unwrap()
}

fn request(token: &EnrolmentToken, asker: &Asker) -> EnrolRequest {
    let csr = PendingIdentity::generate().unwrap().csr_pem();
    token.request(asker, csr).unwrap()
}

fn prod() -> Asker {
    Asker::Cluster {
        uid: "1f".to_owned(),
    }
}

async fn enroll(world: &World, body: &str) -> Answer {
    raw::post(world.address, "/v1/enroll", body).await
}

#[tokio::test]
async fn a_pasted_token_becomes_an_identity_that_can_dial() {
    let world = World::new().await;
    let token = token(&world, Duration::from_secs(60)).await;
    let enrolled = enrol::redeem(&token, &prod(), Trust::default())
        .await
        .unwrap();
    assert_eq!(enrolled.identity.id().name(), "prod");
    let agent = world.agent(&enrolled.identity).await;
    drop(agent);
    assert!(
        enrol::redeem(&token, &prod(), Trust::default())
            .await
            .is_err()
    );
    world.end().await;
}

/// Case 13.
#[tokio::test]
async fn of_fifty_at_once_exactly_one_wins() {
    let world = World::new().await;
    let token = token(&world, Duration::from_secs(60)).await;
    let attempts = (0..50).map(|_| {
        let token = token.clone();
        tokio::spawn(async move {
            enrol::redeem(&token, &prod(), Trust::default())
                .await
                .is_ok()
        })
    });
    let attempts: Vec<_> = attempts.collect();
    let mut winners = 0;
    for attempt in attempts {
        winners += usize::from(attempt.await.unwrap());
    }
    assert_eq!(winners, 1);
    let outcome = |outcome| {
        world.metric(&format!(
            r#"throwline_relay_enrolments_total{{outcome="{outcome}"}}"#
        ))
    };
    assert_eq!((outcome("issued"), outcome("redeemed")), (1.0, 49.0));
    world.end().await;
}

#[tokio::test]
async fn each_bad_attempt_is_told_what_is_wrong() {
    let world = World::plaintext().await;
    let good = token(&world, Duration::from_secs(60)).await;
    let expired = token(&world, Duration::from_secs(1)).await;
    let made = unix_now();
    eventually("the token has expired", || unix_now() > made + 1).await;
    let redeemed = token(&world, Duration::from_secs(60)).await;
    assert_eq!(enroll(&world, &body(&redeemed)).await.status, 200);

    let mut unknown = good.clone();
    unknown.secret = throwline_certs::Secret::generate();
    let mut changed = request(&good, &prod());
    changed.csr = PendingIdentity::generate().unwrap().csr_pem();
    let elsewhere = Asker::Cluster {
        uid: "2f".to_owned(),
    };
    let to_string = |request: &EnrolRequest| serde_json::to_string(request).unwrap();
    for (what, body, status, code) in [
        ("unknown", body(&unknown), 403, enrol::code::UNKNOWN),
        ("expired", body(&expired), 403, enrol::code::EXPIRED),
        ("redeemed", body(&redeemed), 409, enrol::code::REDEEMED),
        (
            "not a secret",
            r#"{"token":"x","kind":"cluster","csr":"y","signature":"z"}"#.into(),
            403,
            enrol::code::UNKNOWN,
        ),
        ("not JSON", "{".into(), 400, enrol::code::BAD_REQUEST),
        (
            "not a request",
            r#"{"csr":"nonsense"}"#.into(),
            400,
            enrol::code::BAD_REQUEST,
        ),
        (
            "changed on its way",
            to_string(&changed),
            400,
            enrol::code::BAD_REQUEST,
        ),
        (
            "a user's request",
            to_string(&request(&good, &Asker::User)),
            409,
            enrol::code::WRONG_KIND,
        ),
        (
            "another cluster's",
            to_string(&request(&good, &elsewhere)),
            409,
            enrol::code::NAME_TAKEN,
        ),
        (
            "too long",
            "x".repeat(17 * 1024),
            413,
            enrol::code::BAD_REQUEST,
        ),
    ] {
        let answer = enroll(&world, &body).await;
        assert_eq!(
            (answer.status, answer.code().as_str()),
            (status, code),
            "{what}"
        );
    }
    // None of that has used the good one up.
    let answer = enroll(&world, &body(&good)).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer: enrol::EnrolAnswer = serde_json::from_str(&answer.body).unwrap();
    assert!(answer.chain.contains("BEGIN CERTIFICATE"));
    assert!(answer.ca.contains("BEGIN CERTIFICATE"));
    world.end().await;
}

#[tokio::test]
async fn an_address_that_tries_too_often_has_to_wait() {
    let world = World::with(Setup {
        tls: Some(throwline_relay::Tls::Plaintext),
        configure: Box::new(|config| {
            config.limits.enrolment_burst = 3;
            config.limits.enrolments_per_minute = 1;
        }),
        ..Setup::default()
    })
    .await;
    for _ in 0..3 {
        assert_eq!(enroll(&world, "{}").await.status, 400);
    }
    let answer = enroll(&world, "{}").await;
    assert_eq!((answer.status, answer.code().as_str()), (429, "limit"));
    let wait: u64 = answer.headers["retry-after"].parse().unwrap();
    assert!((1..=60).contains(&wait), "{wait}");
    world.end().await;
}
