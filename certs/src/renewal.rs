//! What the key of an old certificate signs so that a new one is issued in its place.
//!
//! A carrier, and an intermediary that terminates its TLS, only transports a renewal: the authority
//! relies on the old key's signature over the new request alone. It is bound to one challenge, one authority and one trust domain, so
//! that it is good once, there, and for that one new key.

use crate::{Error, Identity, InvalidInput, PeerIdentity, Roots, TrustDomain, verify_signature};
use std::time::{Duration, SystemTime};

/// Domain separation: nothing else that these keys sign begins so.
const CONTEXT: &[u8] = b"throwline certificate renewal\0";
/// Bytes of a challenge's nonce.
pub const NONCE: usize = 32;
/// How long a challenge may be answered: a client has to sign once.
const ANSWER: Duration = Duration::from_secs(60);

/// A nonce that the authority has drawn for one renewal. It is in the memory of this process and
/// nowhere else, and [`Directory::renew`](crate::directory::Directory::renew) consumes it: so an
/// answer is good once, also where several relays share a database.
#[derive(Debug)]
pub struct Challenge {
    nonce: [u8; NONCE],
    authority: [u8; 32],
    at: SystemTime,
}

/// The answer to a [`Challenge`], unchecked.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// DER, leaf first: the certificate to renew.
    pub chain: &'a [rustls_pki_types::CertificateDer<'a>],
    /// PKCS #10, DER, for the new key.
    pub csr: &'a [u8],
    /// By the old key, over the transcript.
    pub signature: &'a [u8],
}

impl Challenge {
    /// A challenge of the authority with this CA pin, with a random nonce.
    pub fn new(authority: [u8; 32], now: SystemTime) -> Self {
        Self {
            nonce: rand::random(),
            authority,
            at: now,
        }
    }

    /// Random bytes, used once.
    pub fn nonce(&self) -> &[u8; NONCE] {
        &self.nonce
    }

    /// SHA-256 of the certificate of the CA that will sign.
    pub fn authority(&self) -> &[u8; 32] {
        &self.authority
    }

    /// Whether `signature` is `peer`'s, over this challenge and `csr`, and in time.
    pub fn is_answered(
        &self,
        peer: &PeerIdentity,
        csr: &[u8],
        signature: &[u8],
        now: SystemTime,
    ) -> bool {
        // A clock that was set back makes it no older than it is.
        let age = now.duration_since(self.at).unwrap_or_default();
        let domain = peer.id.domain();
        let signed = transcript(&self.nonce, &self.authority, domain, &peer.fingerprint, csr);
        age <= ANSWER && verify_signature(peer, &signed, signature)
    }
}

/// Answers the challenge `nonce` of the authority whose CA has the hash `authority`: the signature by
/// the key of `identity` over the request `csr` (PKCS #10, DER) for the key that is to follow it.
///
/// # Errors
/// The challenge is malformed, or of an authority that is not among `roots`: then nothing is signed.
pub fn sign(
    identity: &Identity,
    roots: &Roots,
    nonce: &[u8],
    authority: &[u8],
    csr: &[u8],
) -> Result<Vec<u8>, Error> {
    let nonce: &[u8; NONCE] = nonce.try_into().map_err(|_| InvalidInput::Challenge)?;
    let pins = roots.pins();
    let authority = pins.iter().find(|pin| pin.as_slice() == authority);
    let authority = authority.ok_or(InvalidInput::OtherAuthority)?;
    let old = identity.as_peer();
    identity.sign(&transcript(
        nonce,
        authority,
        roots.trust_domain(),
        &old.fingerprint,
        csr,
    ))
}

/// The bytes to sign. Every part is preceded by its length as 64 bits, so that no two sets of parts
/// give the same bytes.
fn transcript(
    nonce: &[u8; NONCE],
    authority: &[u8; 32],
    domain: &TrustDomain,
    old: &[u8; 32],
    csr: &[u8],
) -> Vec<u8> {
    let parts: [&[u8]; 5] = [nonce, authority, domain.as_str().as_bytes(), old, csr];
    let mut out = Vec::with_capacity(CONTEXT.len() + 512);
    out.extend_from_slice(CONTEXT);
    for part in parts {
        out.extend_from_slice(&(part.len() as u64).to_be_bytes());
        out.extend_from_slice(part);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Forger, World};

    #[test]
    fn golden_bytes() {
        let domain: TrustDomain = "d".parse().unwrap();
        let got = transcript(&[1; NONCE], &[2; 32], &domain, &[3; 32], b"csr");
        let mut want = b"throwline certificate renewal\0".to_vec();
        for part in [&[1; 32][..], &[2; 32], b"d", &[3; 32], b"csr"] {
            want.extend_from_slice(&[0, 0, 0, 0, 0, 0, 0]);
            want.push(u8::try_from(part.len()).unwrap());
            want.extend_from_slice(part);
        }
        assert_eq!(got, want);
    }

    #[tokio::test]
    async fn nothing_is_signed_for_another_authority() {
        let world = World::new().await;
        let alice = world.user("alice").await;
        let roots = world.authority.roots();
        let stranger = crate::sha256(&Forger::new("relay.example.com").ca);
        let own = roots.pins()[0];
        let signed = |nonce: &[u8], authority: &[u8]| sign(&alice, roots, nonce, authority, b"csr");
        assert!(signed(&[0; NONCE], &own).is_ok());
        let error = signed(&[0; NONCE], &stranger).unwrap_err().to_string();
        assert!(error.contains("not ours"), "{error}");
        assert!(signed(&[0; NONCE], b"").is_err());
        assert!(signed(&[0; NONCE - 1], &own).is_err());
        assert!(signed(&[0; NONCE + 1], &own).is_err());
    }

    #[tokio::test]
    async fn an_answer_is_for_one_challenge_one_request_and_one_key() {
        let world = World::new().await;
        let (alice, bob) = (world.user("alice").await, world.user("bob").await);
        let roots = world.authority.roots();
        let now = SystemTime::now();
        let challenge = Challenge::new(roots.pins()[0], now);
        let sign = |identity, challenge: &Challenge| {
            let (nonce, authority) = (challenge.nonce(), challenge.authority());
            super::sign(identity, roots, nonce, authority, b"csr").unwrap()
        };
        let signature = sign(&alice, &challenge);
        let holds = |challenge: &Challenge, csr: &[u8], signature: &[u8], now| {
            challenge.is_answered(alice.as_peer(), csr, signature, now)
        };
        assert!(holds(&challenge, b"csr", &signature, now));
        assert!(!holds(&challenge, b"other", &signature, now));
        assert!(!holds(&challenge, b"csr", &sign(&bob, &challenge), now));
        assert!(!holds(&challenge, b"csr", b"", now));
        assert!(!holds(&challenge, b"csr", &signature, now + ANSWER * 2));
        let next = Challenge::new(roots.pins()[0], now);
        assert!(!holds(&next, b"csr", &signature, now));
        // A signature over anything else that this key signs is none over this.
        let proof = alice.sign(challenge.nonce()).unwrap();
        assert!(!holds(&challenge, b"csr", &proof, now));
    }
}
