use super::*;
use crate::{Kind, Usage, testing::World};
use proptest::prelude::*;
use serde_json::{Value, json as value};
use std::time::Duration;

fn claims() -> Value {
    value!({ "sub": "spiffe://d/user/alice", "aud": "https://relay.example.com", "exp": 4_000_000_000u64 })
}

fn check(world: &World, token: &str) -> Result<(PeerIdentity, Value), JwsError> {
    verify(
        token,
        world.authority.validator(),
        ExpectedPeer::CARRIER,
        SystemTime::now(),
    )
}

/// The parts of a token, with the header as JSON.
fn parts(token: &str) -> (Value, String, String) {
    let parts: Vec<_> = token.split('.').collect();
    let header = serde_json::from_slice(&decode(parts[0]).unwrap()).unwrap();
    (header, parts[1].to_owned(), parts[2].to_owned())
}

/// A token whose header was changed, and signed again.
fn with_header(identity: &Identity, token: &str, change: impl FnOnce(&mut Value)) -> String {
    let (mut header, payload, _) = parts(token);
    change(&mut header);
    let header = BASE64_URL_SAFE_NO_PAD.encode(header.to_string());
    let signed = format!("{header}.{payload}");
    let signature = identity.sign_fixed(signed.as_bytes()).unwrap();
    format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

#[tokio::test]
async fn what_is_signed_is_verified() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let (peer, found) = check(&world, &sign(&alice, &claims()).unwrap()).unwrap();
    assert_eq!((&peer, found), (alice.as_peer(), claims()));
}

#[tokio::test]
async fn a_jwt_library_agrees() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let point = &alice.as_peer().public_key;
    let [x, y] = [&point[1..33], &point[33..]].map(|half| BASE64_URL_SAFE_NO_PAD.encode(half));
    let token = sign(&alice, &claims()).unwrap();
    let key = jsonwebtoken::DecodingKey::from_ec_components(&x, &y).unwrap();
    let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::ES256);
    rules.set_audience(&["https://relay.example.com"]);
    let decoded = jsonwebtoken::decode::<Value>(&token, &key, &rules).unwrap();
    assert_eq!(decoded.claims, claims());

    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::ES256);
    header.x5c = Some(vec![BASE64_STANDARD.encode(&alice.chain()[0])]);
    let key = jsonwebtoken::EncodingKey::from_ec_der(alice.key_der());
    let token = jsonwebtoken::encode(&header, &claims(), &key).unwrap();
    assert_eq!(check(&world, &token).unwrap().1, claims());
}

#[tokio::test]
async fn headers_that_are_refused() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let token = sign(&alice, &claims()).unwrap();
    let refused = |change: fn(&mut Value)| {
        let result = check(&world, &with_header(&alice, &token, change));
        assert!(matches!(result, Err(JwsError::Header(_))), "{result:?}");
    };
    refused(|header| header["alg"] = value!("none"));
    refused(|header| header["alg"] = value!("HS256"));
    refused(|header| header["alg"] = value!("es256"));
    refused(|header| header["crit"] = value!(["exp"]));
    refused(|header| header["crit"] = value!([]));
    refused(|header| header["b64"] = value!(false));
    refused(|header| header["x5c"] = value!([]));
    refused(|header| drop(header.as_object_mut().unwrap().remove("x5c")));
    // A key or an address in the header is of no interest.
    let token = with_header(&alice, &token, |header| {
        header["jwk"] = value!({ "kty": "EC" });
        header["x5u"] = value!("https://evil.example.com");
    });
    check(&world, &token).unwrap();
}

#[tokio::test]
async fn sizes_are_bounded() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let token = sign(&alice, &claims()).unwrap();
    let long = with_header(&alice, &token, |header| {
        header["x5c"] = value!(["A".repeat(MAX_X5C + 1)])
    });
    assert_eq!(
        check(&world, &long).unwrap_err(),
        JwsError::TooBig("certificate chain")
    );
    let long = "A".repeat(MAX_TOKEN + 1);
    assert_eq!(check(&world, &long).unwrap_err(), JwsError::TooBig("token"));
}

#[tokio::test]
async fn signatures_of_others_are_refused() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let token = sign(&alice, &claims()).unwrap();
    let (header, payload, signature) = parts(&token);
    let forged = with_header(&bob, &token, |_| ());
    assert_eq!(check(&world, &forged).unwrap_err(), JwsError::BadSignature);
    let header = BASE64_URL_SAFE_NO_PAD.encode(header.to_string());
    let other = BASE64_URL_SAFE_NO_PAD.encode(value!({ "sub": "root" }).to_string());
    for forged in [
        format!("{header}.{other}.{signature}"),
        format!("{header}.{payload}."),
        format!(
            "{header}.{payload}.{}",
            BASE64_URL_SAFE_NO_PAD.encode([0; 64])
        ),
    ] {
        assert_eq!(check(&world, &forged).unwrap_err(), JwsError::BadSignature);
    }
    let stranger = World::new().await.user("alice").await;
    let result = check(&world, &sign(&stranger, &claims()).unwrap());
    assert_eq!(
        result.unwrap_err(),
        JwsError::Certificate(CheckError::UnknownIssuer)
    );
}

#[tokio::test]
async fn expiry_is_reported_only_to_the_holder_of_the_key() {
    let world = World::new().await;
    let (alice, bob) = (world.user("alice").await, world.user("bob").await);
    let token = sign(&alice, &claims()).unwrap();
    let later = SystemTime::now() + Duration::from_secs(2 * 86_400);
    let check = |token: &str, want| {
        verify::<Value>(token, world.authority.validator(), want, later).unwrap_err()
    };
    let expired = check(&token, ExpectedPeer::CARRIER);
    assert!(
        matches!(expired, JwsError::Certificate(CheckError::Expired { .. })),
        "{expired}"
    );
    let forged = with_header(&bob, &token, |_| ());
    assert_eq!(
        check(&forged, ExpectedPeer::CARRIER),
        JwsError::BadSignature
    );
    let clusters = ExpectedPeer {
        kinds: &[Kind::Cluster],
        usage: Usage::Client,
    };
    assert_eq!(
        check(&token, clusters),
        JwsError::Certificate(CheckError::WrongKind(Kind::User))
    );
}

#[tokio::test]
async fn bad_input_is_malformed() {
    let world = World::new().await;
    let alice = world.user("alice").await;
    let token = sign(&alice, &claims()).unwrap();
    for bad in [
        "",
        ".",
        "..",
        "a.b.c",
        "e30.e30.e30",
        "a.b",
        &format!("{token}."),
        &token[..99],
    ] {
        assert!(check(&world, bad).is_err(), "{bad}");
    }
    // Padding and the other alphabet are not base64url.
    for bad in [format!("{token}="), token.replace('.', "=.")] {
        assert!(matches!(check(&world, &bad), Err(JwsError::Malformed(_))));
    }
    // Claims of another shape.
    let odd = sign(&alice, &value!(["not", "claims"])).unwrap();
    let result = verify::<std::collections::HashMap<String, Value>>(
        &odd,
        world.authority.validator(),
        ExpectedPeer::CARRIER,
        SystemTime::now(),
    );
    assert!(matches!(result, Err(JwsError::Malformed(_))));
    proptest!(|(text in "[A-Za-z0-9_-]{0,40}(\\.[A-Za-z0-9_-]{0,40}){0,3}", any: String)| {
        prop_assert!(check(&world, &text).is_err());
        prop_assert!(check(&world, &any).is_err());
    });
}
