//! A peer that has proved itself, and then sends any bytes to the mux.
#![no_main]

#[path = "shared/carrier.rs"]
mod carrier;

use libfuzzer_sys::fuzz_target;
use throwline_tunnel::proto::messages::{Proof, Role};
use throwline_tunnel::proto::wire;

fuzz_target!(|data: &[u8]| {
    let proof = Proof {
        version: 1,
        nonce: vec![7; 32],
        signature: vec![1; 70],
        role: Role::Agent.into(),
        instance: "fuzz".to_owned(),
        software: "fuzz 0".to_owned(),
        shares_identity: false,
        bulk: false,
    };
    let mut bytes = Vec::new();
    let proof = wire::encode(&proof, wire::HANDSHAKE_CAP).expect("a proof fits");
    carrier::frame(&mut bytes, &proof);
    // One message or several is the same stream; several reach more of the buffering.
    for piece in data.chunks(997) {
        carrier::frame(&mut bytes, piece);
    }
    carrier::feed(&bytes);
});
