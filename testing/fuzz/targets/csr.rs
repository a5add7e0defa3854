//! Certificate requests: what is taken was signed by its own key, and names nothing but it.
#![no_main]

#[path = "shared/authority.rs"]
mod authority;

use authority::FIXTURE;
use libfuzzer_sys::fuzz_target;
use throwline_certs::{PendingIdentity, renewal};

fuzz_target!(|data: &[u8]| {
    let fixture = &*FIXTURE;
    let peer = fixture.identity.as_peer();
    let mut request = data.to_vec();
    if data.first().is_some_and(|first| first % 2 == 0) {
        // A good one with bytes changed goes deeper than chance would.
        request = PendingIdentity::generate()
            .expect("a key")
            .csr_der()
            .to_vec();
        for change in data[1..].chunks_exact(3) {
            let at = usize::from(u16::from_be_bytes([change[0], change[1]])) % request.len();
            request[at] = change[2];
        }
    }
    let authority = &fixture.authority;
    let challenge = authority.renewal_challenge().expect("a challenge");
    let (nonce, pin) = (challenge.nonce(), challenge.authority());
    let (identity, roots) = (&fixture.identity, authority.roots());
    let signature = renewal::sign(identity, roots, nonce, pin, &request).expect("a signature");
    let asked = renewal::Request {
        chain: identity.chain(),
        csr: &request,
        signature: &signature,
    };
    let renewed = authority.renew(challenge, identity.id(), asked);
    let issued = fixture.runtime.block_on(renewed);
    if let Ok(issued) = issued {
        let renewed = throwline_certs::tls::peer_of(&issued.chain).expect("our own certificate");
        assert_eq!(renewed.id, peer.id, "a request changed who it is for");
        assert_eq!(renewed.groups, peer.groups);
    }
});
