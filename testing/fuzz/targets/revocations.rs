//! Lists of revocations: only what the authority has signed is read, and no version goes back.
#![no_main]

#[path = "shared/authority.rs"]
mod authority;

use std::sync::LazyLock;

use authority::FIXTURE;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject as _;
use throwline_certs::revocation::{ListError, MAX_LIST};
use throwline_certs::{SignedRevocations, Validator};
use throwline_tunnel::proto::messages::RevocationList;
use throwline_tunnel::proto::wire::{self, REVOCATIONS_CAP};

/// The CA's own key: without it no list of any content would be read.
static KEY: LazyLock<EcdsaKeyPair> = LazyLock::new(|| {
    let file = FIXTURE.dir.path().join("ca.key");
    let der = PrivatePkcs8KeyDer::from_pem_file(file).expect("the CA's key");
    EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der.secret_pkcs8_der())
        .expect("a key on P-256")
});

fn signed(list: &[u8]) -> SignedRevocations {
    let message = [b"throwline revocations\0", list].concat();
    let signature = KEY.sign(&SystemRandom::new(), &message).expect("signed");
    SignedRevocations {
        list: list.to_vec(),
        signature: signature.as_ref().to_vec(),
    }
}

// A byte of the input chooses: an answer of a relay as received, a list that the authority has signed
// with bytes changed, or any list with its signature.
fuzz_target!(|data: &[u8]| {
    let roots = FIXTURE.authority.roots();
    let domain = FIXTURE.authority.trust_domain();
    let Some((which, data)) = data.split_first() else {
        return;
    };
    match which % 3 {
        0 => {
            let mut buffer = BytesMut::from(data);
            let Ok(Some(RevocationList { list, signature })) =
                wire::decode_long(&mut buffer, REVOCATIONS_CAP)
            else {
                return;
            };
            let forged = SignedRevocations { list, signature };
            assert!(forged.verify(roots).is_err(), "a list was forged");
        }
        1 => {
            let text = format!(r#"{{"domain":"{domain}","version":7,"serials":["0a"]}}"#);
            let good = signed(text.as_bytes());
            let mut changed = good.clone();
            for change in data.chunks_exact(3) {
                let at = usize::from(u16::from_be_bytes([change[0], change[1]]));
                let (list, signature) = (&mut changed.list, &mut changed.signature);
                match at.checked_sub(list.len()) {
                    None => list[at] = change[2],
                    Some(at) => {
                        let at = at % signature.len();
                        signature[at] = change[2];
                    }
                }
            }
            let read = changed.verify(roots);
            assert!(
                changed.list == good.list || read.is_err(),
                "a list was changed"
            );
            assert!(changed != good || read.is_ok(), "a good list was refused");
            // What was not sent whole.
            changed = good.clone();
            changed.list.truncate(data.len());
            assert!(changed == good || changed.verify(roots).is_err());
        }
        _ => {
            let large = data.len() > MAX_LIST;
            let list = match signed(data).verify(roots) {
                Ok(list) => list,
                Err(error) => {
                    assert_ne!(error, ListError::BadSignature);
                    assert_eq!(error == ListError::TooBig, large);
                    return;
                }
            };
            assert!(!large && list.len() <= data.len());
            let version = list.version();
            let validator = Validator::new(roots.clone(), domain.clone());
            // Whether this identity is revoked can be checked with any list.
            let _ = list.covers(FIXTURE.identity.as_peer());
            assert_eq!(validator.replace_revocations(list.clone()), version > 0);
            assert!(!validator.replace_revocations(list), "a list came twice");
            assert_eq!(validator.revocations().version(), version);
        }
    }
});
