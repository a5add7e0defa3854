//! The bytes after the 101, as any bytes: WebSocket frames, the proof, the mux.
#![no_main]

#[path = "shared/carrier.rs"]
mod carrier;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| carrier::feed(data));
