//! Assertions with their certificate chain: only what our authority's key holder signed passes.
#![no_main]

#[path = "shared/authority.rs"]
mod authority;

use std::time::SystemTime;

use authority::FIXTURE;
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::CertificateDer;
use throwline_certs::{ExpectedPeer, jws};

// A byte of the input chooses: the token as it is, one of ours with bytes changed, a chain.
fuzz_target!(|data: &[u8]| {
    let fixture = &*FIXTURE;
    let (validator, now) = (fixture.authority.validator(), SystemTime::now());
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 3 {
        0 => {
            let Ok(text) = std::str::from_utf8(data) else {
                return;
            };
            let verified =
                jws::verify::<serde_json::Value>(text, validator, ExpectedPeer::CARRIER, now);
            assert!(verified.is_err(), "a token was forged");
        }
        1 => {
            let claims = serde_json::json!({"sub": "x", "jti": data.len()});
            let good = jws::sign(&fixture.identity, &claims).expect("signed");
            let mut bytes = good.clone().into_bytes();
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % bytes.len();
                bytes[at] = change[2];
            }
            let Ok(text) = String::from_utf8(bytes) else {
                return;
            };
            let verified =
                jws::verify::<serde_json::Value>(&text, validator, ExpectedPeer::CARRIER, now);
            // The last letter of an unpadded part has bits that say nothing; decoders refuse them.
            assert_eq!(verified.is_ok(), text == good, "{text}");
        }
        _ => {
            let mut chain = vec![CertificateDer::from(data.to_vec())];
            assert!(
                validator.check(&chain, ExpectedPeer::CARRIER, now).is_err(),
                "a chain was forged"
            );
            chain.extend(fixture.identity.chain().iter().cloned());
            assert!(
                validator.check(&chain, ExpectedPeer::CARRIER, now).is_err(),
                "a chain was forged"
            );
            let mut der = fixture.identity.chain()[0].to_vec();
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % der.len();
                der[at] = change[2];
            }
            let same = der == fixture.identity.chain()[0].as_ref();
            let checked = validator.check(&[CertificateDer::from(der)], ExpectedPeer::CARRIER, now);
            assert!(same || checked.is_err(), "a changed certificate passed");
        }
    }
});
