//! The channel frames of Kubernetes' WebSocket protocols.
#![no_main]

#[allow(dead_code, reason = "the crate uses more of it than this target")]
#[path = "../../demo-cluster/src/stream/channel.rs"]
mod channel;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    for closing in [false, true] {
        let _ = channel::decode_channel(data, closing);
    }
    if let Some((rows, columns)) = channel::terminal_size(data) {
        let _ = (rows, columns);
    }
});
